"""The record of every batch: what was asked, what was solved, what was written, and what was taken back.

On disk it is one JSON line per event in ``ledger.jsonl``, each with a checksum, and one safetensors file per solve in
``deltas/``. The tensors are on the disk before the line is; a batch counts once its line is there. Lines are only ever
added. What is active is a function of the lines (:meth:`Ledger.history`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from editcore._util.memory import uncollected
from editcore.interfaces.changes import Written
from editcore.interfaces.errors import RunError
from editcore.interfaces.history import LedgerEntry, Signature
from editcore.interfaces.values import EditBatch, EditRequest, KnownTarget
from editcore.ledger.entries import attachment_line, batch_line, entry_composed_anew, entry_of, entry_without
from editcore.ledger.file import DELTAS_NAME, LEDGER_NAME, LedgerFile
from editcore.ledger.held import HeldReferences
from editcore.ledger.lines import BatchLine, HeaderLine, Line, RevisionLine, TensorFile, UndoLine
from editcore.ledger.reading import StoredTensors, TensorReader
from editcore.ledger.states import Edit, LeftOut, State
from editcore.ledger.tensors import entry_tensors, written_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Edit", "Ledger", "write_ledger"]

L = TypeVar("L", bound=Line)

_NOTHING = LeftOut()
_log = logging.getLogger(__name__)


class Ledger:
    """Batches, oldest first, and which of their edits are undone; durable if it has a directory.

    Args:
        header: the model and editor that the edits are made for; needed for the first line of a directory.
    """

    def __init__(self, directory: Path | None = None, header: HeaderLine | None = None) -> None:
        self.directory = directory
        self.header = header
        self.batches: list[LedgerEntry] = []
        """Every batch, rejected ones too."""
        self.events: list[LedgerEntry | UndoLine] = []
        """Every batch, and every time that edits were undone or redone, in the order in which it happened."""
        self.note = ""
        """A sentence on what could not be read; empty if the file was whole."""
        self._by_index: dict[int, LedgerEntry] = {}
        self._revisions: dict[int, dict[LeftOut, LedgerEntry]] = {}
        self._state = State()
        # By batch, the state when it was added.
        self._state_before: dict[int, State] = {}
        self._by_subject: dict[str, list[Edit]] = {}
        self._files: dict[tuple[int, LeftOut], TensorFile] = {}
        self._file = None if directory is None else LedgerFile(directory)
        self.reader = None if directory is None else TensorReader(directory / DELTAS_NAME)
        """Reads the tensors of a directory."""
        self._held = HeldReferences(self._by_index.get)

    @classmethod
    def open(cls, directory: Path | str, header: HeaderLine) -> Ledger:
        """The ledger of a directory; an empty one if it has none yet.

        Raises:
            RunError: as for :meth:`read`; or the edits were made for another model.
        """
        directory = Path(directory)
        if not (directory / LEDGER_NAME).exists():
            return cls(directory, header)
        ledger = cls.read(directory)
        if ledger.header is None:  # not even the first line was finished
            ledger.header = header
        elif ledger.header.fingerprint != header.fingerprint:
            raise RunError(
                f"{directory / LEDGER_NAME} is about another model: its edits were made for weights with the "
                f"fingerprint {ledger.header.fingerprint[:12]}, those of '{header.model}' have "
                f"{header.fingerprint[:12]}."
            )
        return ledger

    @classmethod
    def read(cls, directory: Path | str) -> Ledger:
        """The ledger of a run directory. A last line that was cut off by a crash is left out, with a note.

        Tensors are read, and their files compared with their hashes, when they are looked up. Only those that were read
        last stay in memory.

        Raises:
            RunError: a line is missing or damaged; the message names it.
        """
        directory = Path(directory)
        ledger = cls(directory)
        with uncollected():
            for line, where in ledger.lines():
                if isinstance(line, RunError):
                    raise line
                ledger.take(line, where)
        return ledger

    def lines(self) -> Iterator[tuple[Line | RunError, str]]:
        """Every line on disk, or the error in it, and its place in the file. Sets :attr:`note`.

        Raises:
            RunError: the file cannot be read.
        """
        assert self._file is not None
        yield from self._file.lines()
        self.note = self._file.note
        if self.note:
            _log.warning("%s", self.note)

    def take(self, line: Line, where: str) -> None:
        """Add a line to what is known.

        Raises:
            RunError: the line contradicts those before it.
        """
        try:
            if isinstance(line, HeaderLine):
                if self.header is not None:
                    raise ValueError("a second header")
                self.header = line
            elif self.header is None:
                raise ValueError("a ledger begins with its header")
            elif isinstance(line, BatchLine):
                self._add(self._entry(line, where))
            elif isinstance(line, RevisionLine):
                self._add_revision(line.batch, _left_out(line), self._revised(line, where))
            else:
                self._state = self._marked(line.kind, line.edits, as_if_never=line.as_if_never)
                self.events.append(line)
        except ValueError as error:
            raise RunError(f"{where}: {error}.") from error

    def tensors_of(self, line: BatchLine | RevisionLine, where: str) -> tuple[Written, Mapping[str, KnownTarget]]:
        """The tensors of a line. They are read when they are looked up."""
        stored = self._stored(line.file, where, line.requests)
        return stored.written(line.attachment), stored.known

    @property
    def entries(self) -> list[LedgerEntry]:
        """The batches that were applied, as they were solved, including undone edits."""
        return [entry for entry in self.batches if entry.applied]

    def history(self) -> tuple[LedgerEntry, ...]:
        """The active batches, oldest first, without undone edits. Batches that have no active edit are left out."""
        return self._views(self.entries, self._state)

    def history_before(self, batch: int, out: LeftOut = _NOTHING) -> tuple[LedgerEntry, ...]:
        """What was active when that batch came, whatever was undone or redone since.

        Args:
            out: of earlier edits, those that were active then and are left out, and those that were undone then and are
                taken in.
        """
        state = self._state_before[batch].without(out, before=batch)
        return self._views((entry for entry in self.entries if entry.batch < batch), state)

    def active(self) -> list[Written]:
        """What the active batches write, in order."""
        return [entry.written for entry in self.history()]

    def active_hashes(self) -> dict[int, str]:
        """By active batch, in order, the SHA-256 of the file with what it writes; an empty text if it has none, as in a
        ledger in memory."""
        found = {}
        for entry in self.entries:
            out = self.left_out(entry.batch)
            if not out or not self._is_empty(entry.batch, out):
                found[entry.batch] = self._hash(entry.batch, out)
        return found

    def is_same_batch(self, batch: int, other: Ledger) -> bool:
        """Whether another ledger has that batch, too, with the same requests and tensors as they were first solved."""
        ours, theirs = self._by_index.get(batch), other._by_index.get(batch)
        if ours is None or theirs is None or ours.requests != theirs.requests or ours.scale != theirs.scale:
            return False
        hashes = self._hash(batch), other._hash(batch)
        return hashes[0] == hashes[1] and bool(hashes[0] or not ours.changes)

    def _hash(self, batch: int, out: LeftOut = _NOTHING) -> str:
        file = self._files.get((batch, out))
        return "" if file is None else file.sha256

    def batch(self, index: int) -> LedgerEntry:
        """The batch of that index, as it was solved."""
        return self._by_index[index]

    def facts(self) -> tuple[EditRequest, ...]:
        """The active facts, one per subject and prompt, oldest first. A fact that was edited again counts where it was
        edited last."""
        latest: dict[tuple[str, str], EditRequest] = {}
        for entry in self.history():
            for request in entry.new_requests:
                latest.pop(request.fact_key, None)
                latest[request.fact_key] = request
        return tuple(latest.values())

    def written(self) -> Iterator[EditRequest]:
        """Every request that a batch wrote, oldest first, including undone ones."""
        for entry in self.entries:
            yield from entry.new_requests

    def undone(self, batch: int) -> frozenset[str]:
        """Ids of the edits of a batch that are undone."""
        return self._state.undone.get(batch, frozenset())

    def state(self, entry: LedgerEntry) -> str:
        """The state of a batch: ``active``, ``partly undone``, ``undone`` or ``rejected``."""
        undone = len(self.undone(entry.batch))
        if not entry.applied:
            return "rejected"
        return "active" if not undone else "undone" if undone == entry.num_new else "partly undone"

    def states(self) -> dict[tuple[int, str], str]:
        """The state of every edit, by batch and id: ``active``, ``edited anew``, ``undone`` or ``rejected``."""
        active = {fact.id for fact in self.facts()}
        found: dict[tuple[int, str], str] = {}
        for entry in self.batches:
            undone = self.undone(entry.batch)
            for name in entry.new_ids:
                written = "undone" if name in undone else "active" if name in active else "edited anew"
                found[entry.batch, name] = written if entry.applied else "rejected"
            found |= {(entry.batch, rejection.request.id): "rejected" for rejection in entry.rejected}
        return found

    def left_out(self, batch: int, state: State | None = None) -> LeftOut:
        """What makes a batch need another solution than its first.

        Args:
            state: what is undone; left out, as it is now.
        """
        state, then = state or self._state, self._state_before[batch]
        own = {(batch, name) for name in state.undone.get(batch, ())}
        changed = {edit for edit in self._by_index[batch].builds_on if state.has(edit) != then.has(edit)}
        never = {edit for edit in state.never if edit[0] == batch or (edit[0] < batch and not then.has(edit))}
        return LeftOut(frozenset(own | changed), frozenset(never))

    def edits_about(self, requests: Iterable[EditRequest]) -> tuple[Edit, ...]:
        """Every edit so far about the subjects of ``requests``, whatever is undone."""
        subjects = {request.subject_key for request in requests}
        return tuple(sorted(edit for subject in subjects for edit in self._by_subject.get(subject, ())))

    def state_after(self, kind: Literal["undo", "redo"], edits: Iterable[Edit], *, as_if_never: bool = False) -> State:
        """What would be undone after undoing or redoing ``edits``.

        Args:
            as_if_never: whether they are undone as if they had never been solved.

        Raises:
            ValueError: there is no such edit, or it is so already.
        """
        changed: dict[int, frozenset[str]] = {}
        edits = tuple(edits)
        for batch, name in edits:
            entry = self._by_index.get(batch)
            if entry is None or not entry.applied or name not in entry.new_ids:
                raise ValueError(f"batch {batch} did not write an edit '{name}'")
            undone = changed.get(batch, self.undone(batch))
            if (name in undone) == (kind == "undo"):
                raise ValueError(
                    f"the edit '{name}' of batch {batch} is {'' if name in undone else 'not '}undone already"
                )
            changed[batch] = undone ^ {name}
        never = self._state.never | set(edits) if as_if_never else self._state.never - set(edits)
        return State({**self._state.undone, **changed}, never)

    def revisions(self, batch: int) -> list[LedgerEntry]:
        """The solutions of a batch without some edits, whether they are in use or not."""
        return list(self._revisions.get(batch, {}).values())

    def is_solved(self, batch: int, out: LeftOut) -> bool:
        """Whether a batch has a solution without the edits ``out``."""
        return not out or self._is_empty(batch, out) or out in self._revisions.get(batch, {})

    def unsolved(self, state: State) -> list[int]:
        """The batches that have no solution yet for what would be undone, oldest first.

        Args:
            state: as :meth:`state_after` gives it.
        """
        batches = [entry.batch for entry in self.entries]
        return [batch for batch in batches if not self.is_solved(batch, self.left_out(batch, state))]

    def needed_for(self, batch: int, out: LeftOut) -> list[tuple[int, LeftOut]]:
        """What must be solved of earlier batches before :meth:`history_before` can be told, oldest first."""
        state = self._state_before[batch].without(out, before=batch)
        needed = ((entry.batch, self.left_out(entry.batch, state)) for entry in self.entries if entry.batch < batch)
        return [(earlier, without) for earlier, without in needed if not self.is_solved(earlier, without)]

    def _is_empty(self, batch: int, out: LeftOut) -> bool:
        """Whether nothing is left of a batch without the edits ``out``."""
        return out.own(batch) >= set(self._by_index[batch].new_ids)

    def append(self, entry: LedgerEntry) -> LedgerEntry:
        """Add a batch. With a directory, it is made durable first.

        Returns:
            The batch as the ledger has it: with a directory, its tensors are read from there, and not kept in memory.

        Raises:
            StorageError: the batch cannot be written; the ledger is as it was.
            RunError: another process has changed the ledger meanwhile.
        """
        self._check(entry)
        tensors = entry_tensors(entry) if entry.applied else {}
        held = self._held.line_of(entry)
        line = self._write(lambda file: batch_line(entry, file, held), f"batch-{entry.batch:05d}.safetensors", tensors)
        kept = entry if line is None else self._entry(*line)
        self._add(kept)
        return kept

    def revise(self, batch: int, out: LeftOut, written: Written, anew: EditBatch | None = None) -> None:
        """Keep the solution of a batch without some edits. Nothing changes before :meth:`mark`.

        Args:
            anew: what was solved, if the values of its requests were found anew or replayed requests were left out;
                otherwise it is the remaining requests of the batch, with the values that it has.

        Raises:
            StorageError, RunError: as :meth:`append`.
        """
        entry = self._by_index[batch]
        revised = (
            entry_without(entry, out.own(batch), written) if anew is None else entry_composed_anew(entry, anew, written)
        )
        number = 1 + len(self._revisions.get(batch, {}))

        def line(file: TensorFile | None) -> RevisionLine:
            return RevisionLine(
                batch=batch,
                without=tuple(sorted(out.edits)),
                never=tuple(sorted(out.never)),
                requests=() if anew is None else revised.requests,
                weights=() if anew is None else revised.weights,
                file=file,
                attachment=attachment_line(written),
            )

        tensors = written_tensors(written) if anew is None else entry_tensors(revised)
        written_line = self._write(line, f"batch-{batch:05d}-{number}.safetensors", tensors)
        self._add_revision(batch, out, revised if written_line is None else self._revised(*written_line))

    def mark(
        self,
        kind: Literal["undo", "redo"],
        edits: Sequence[Edit],
        signature: Signature | None = None,
        *,
        as_if_never: bool = False,
    ) -> None:
        """Note, in one line, that edits are undone or back, and who made them so.

        Args:
            as_if_never: whether they are undone as if they had never been solved.

        Raises:
            StorageError, RunError: as :meth:`append`.
            ValueError: there is no such edit, it is so already, or a batch was not solved for it.
        """
        state = self._marked(kind, edits, as_if_never=as_if_never)
        line = UndoLine(kind=kind, edits=tuple(edits), as_if_never=as_if_never, signature=signature)
        self._write(lambda _file: line)
        self._state = state
        self.events.append(line)

    # What the lines say

    def _entry(self, line: BatchLine, where: str) -> LedgerEntry:
        writes = line.file is not None or line.attachment is not None
        if writes != (line.scale > 0):
            what = "something" if writes else "nothing"
            raise ValueError(f"batch {line.batch} is scaled by {line.scale:g} and writes {what}")
        stored = self._stored(line.file, where, line.requests)
        if line.file is not None:
            self._files[line.batch, _NOTHING] = line.file
        held = () if line.held is None else self._held.take(line.batch, line.held)
        return entry_of(line, stored, held)

    def _stored(self, file: TensorFile | None, where: str, requests: Sequence[EditRequest] = ()) -> StoredTensors:
        assert self.reader is not None
        return StoredTensors(self.reader, file, where, tuple(request.id for request in requests))

    def _check(self, entry: LedgerEntry) -> None:
        if self.batches and entry.batch <= self.batches[-1].batch:
            raise ValueError(f"batch {entry.batch} cannot follow batch {self.batches[-1].batch}")
        if len(entry.weights) != len(entry.requests) or entry.num_new > len(entry.requests):
            raise ValueError(
                f"batch {entry.batch} has {len(entry.requests)} requests, {len(entry.weights)} weights and "
                f"{entry.num_new} new requests"
            )
        if any(not weight > 0 for weight in entry.weights):
            raise ValueError(f"batch {entry.batch} has weights that are not positive")
        new = [*entry.new_ids, *(rejection.request.id for rejection in entry.rejected)]
        if len({request.id for request in entry.requests}) < len(entry.requests) or len(set(new)) < len(new):
            raise ValueError(f"batch {entry.batch} has an id twice")

    def _add(self, entry: LedgerEntry) -> None:
        self._check(entry)
        self.batches.append(entry)
        self.events.append(entry)
        self._by_index[entry.batch] = entry
        self._state_before[entry.batch] = self._state
        for request in entry.new_requests if entry.applied else ():
            if request.subject:
                self._by_subject.setdefault(request.subject_key, []).append((entry.batch, request.id))

    def _revised(self, line: RevisionLine, where: str) -> LedgerEntry:
        entry = self._by_index.get(line.batch)
        if entry is None or not entry.applied:
            raise ValueError(f"batch {line.batch} was not applied and cannot be solved again")
        if line.file is not None:
            self._files[line.batch, _left_out(line)] = line.file
        own = {name for index, name in line.without if index == line.batch}
        if not line.requests:
            return entry_without(entry, own, self._stored(line.file, where).written(line.attachment))
        stored = self._stored(line.file, where, line.requests)
        anew = EditBatch(
            index=line.batch,
            requests=line.requests,
            weights=line.weights,
            num_new=sum(name not in own for name in entry.new_ids),
            known=stored.known,
        )
        return entry_composed_anew(entry, anew, stored.written(line.attachment))

    def _add_revision(self, batch: int, out: LeftOut, revised: LedgerEntry) -> None:
        entry = self._by_index.get(batch)
        possible = set() if entry is None else {*entry.builds_on, *((batch, name) for name in entry.new_ids)}
        late = any(index > batch for index, _ in out.never)
        if entry is None or not entry.applied or not out.edits <= possible or late or not revised.num_new:
            named = ", ".join(sorted(name for _, name in out.edits | out.never))
            raise ValueError(f"batch {batch} cannot be without {named}")
        self._revisions.setdefault(batch, {})[out] = revised

    def _marked(self, kind: Literal["undo", "redo"], edits: Sequence[Edit], *, as_if_never: bool) -> State:
        """What is undone behind a line that says so.

        Raises:
            ValueError: there is no such edit, it is so already, or a batch was not solved for it.
        """
        state = self.state_after(kind, edits, as_if_never=as_if_never)
        for batch in self.unsolved(state):
            out = self.left_out(batch, state)
            names = ", ".join(sorted(name for _, name in out.edits | out.never))
            raise ValueError(f"batch {batch} was not solved without {names}")
        return state

    def _views(self, entries: Iterable[LedgerEntry], state: State) -> tuple[LedgerEntry, ...]:
        """The entries without the edits that are undone. An entry that has no edit left is left out."""
        views: list[LedgerEntry] = []
        for entry in entries:
            out = self.left_out(entry.batch, state)
            if not out:
                views.append(entry)
            elif not self._is_empty(entry.batch, out):
                views.append(self._revisions[entry.batch][out])
        return tuple(views)

    def _write(
        self,
        line_of: Callable[[TensorFile | None], L],
        name: str = "",
        tensors: Mapping[str, Tensor] | None = None,
    ) -> tuple[L, str] | None:
        """Write a line. Returns the line and its place, for messages; ``None`` if the ledger is in memory."""
        if self._file is None:
            return None
        assert self.header is not None, "a ledger on disk needs a header"
        line = self._file.write(self.header, line_of, name, tensors)
        return line, f"{self._file.directory / LEDGER_NAME}, the line of {name}"


def _left_out(line: RevisionLine) -> LeftOut:
    return LeftOut(frozenset(line.without), frozenset(line.never))


def write_ledger(directory: Path | str, entries: Iterable[LedgerEntry], header: HeaderLine) -> None:
    """Write a new ledger, with batches that were made elsewhere or with none.

    Raises:
        StorageError: it cannot be written.
    """
    directory = Path(directory)
    batches = list(entries)
    if not batches:
        LedgerFile(directory).begin(header)
    ledger = Ledger(directory, header)
    for entry in batches:
        ledger.append(entry)
