"""The record of every batch: what was asked, what was solved, what was written, and what was taken back.

On disk it is one JSON line per event in ``ledger.jsonl``, each with a checksum, and one safetensors file per solve in
``deltas/``. The tensors are on the disk before the line is; a batch counts once its line is there. Lines are only ever
added. What is active is a function of the lines (:meth:`Ledger.history`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import ValidationError

from editcore._util.files import sync_directory, write_tensors
from editcore.interfaces.changes import Attachment, WeightChange, Written, as_change
from editcore.interfaces.errors import PluginError, RunError, StorageError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.values import EditRequest, HeldKey, KnownTarget, first_problem
from editcore.ledger.lines import (
    AttachmentLine,
    BatchLine,
    HeaderLine,
    HeldLine,
    Line,
    RevisionLine,
    TensorFile,
    UndoLine,
    decode,
    encode,
    is_whole as is_whole_line,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DELTAS_NAME",
    "LEDGER_NAME",
    "Ledger",
    "batch_line",
    "entry_without",
    "write_ledger",
    "written_from",
    "written_tensors",
]

_log = logging.getLogger(__name__)

V = TypeVar("V")
LEDGER_NAME = "ledger.jsonl"
DELTAS_NAME = "deltas"
MAX_BYTES = 1 << 30
"""Largest ``ledger.jsonl`` that is read. 10,000 edits take 3 to 7 MB."""


class Ledger:
    """Batches, oldest first, and which of their edits are undone; durable if it has a directory.

    Args:
        header: what the edits are made for; needed to write the first line of a directory.
    """

    def __init__(self, directory: Path | None = None, header: HeaderLine | None = None) -> None:
        self.directory = directory
        self.header = header
        self.batches: list[LedgerEntry] = []
        """Every batch, rejected ones too."""
        self.note = ""
        """What reading it had to leave out; empty if it was whole."""
        self._by_index: dict[int, LedgerEntry] = {}
        self._revisions: dict[int, dict[frozenset[str], Written]] = {}
        self._undone: Mapping[int, frozenset[str]] = {}  # replaced, never changed
        self._undone_before: dict[int, Mapping[int, frozenset[str]]] = {}  # as it was when a batch came
        self._size = 0  # of the complete lines on disk, in bytes

    @classmethod
    def open(cls, directory: Path | str, header: HeaderLine) -> Ledger:
        """The ledger of a directory; an empty one if it has none yet.

        Raises:
            RunError: as :meth:`read`, or its edits were made for another model.
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

        Tensors are read, and held against their hashes, when they are first looked at.

        Raises:
            RunError: a line is missing or damaged; the message names it.
        """
        directory = Path(directory)
        ledger = cls(directory)
        for line, where in ledger.lines():
            if isinstance(line, RunError):
                raise line
            ledger.take(line, where)
        return ledger

    def lines(self) -> Iterator[tuple[Line | RunError, str]]:
        """Every line on disk, or what is wrong with it, and where it stands. Sets :attr:`note`.

        Raises:
            RunError: the file cannot be read.
        """
        assert self.directory is not None
        path = self.directory / LEDGER_NAME
        *complete, rest = _read_lines(path)  # what follows the last line end was never finished
        for number, raw in enumerate(complete, start=1):
            where = f"{path}, line {number}"
            try:
                line: Line | RunError = decode(raw, where)
            except RunError as error:
                line = error
            self._size += len(raw) + 1
            yield line, where
        where = f"{path}, line {len(complete) + 1}"
        if is_whole_line(rest[:-1]):
            yield RunError(f"{where}: the line end is damaged."), where
        elif rest:
            self.note = f"{where}: the line was cut off while it was written, and is left out."
            _log.warning("%s", self.note)

    def take(self, line: Line, where: str) -> None:
        """Let a line that was read count.

        Raises:
            RunError: it does not follow from those before it.
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
                self._add_revision(
                    line.batch, frozenset(line.without), self._stored(line.file, where).written(line.attachment)
                )
            else:
                self._undone = {**self._undone, **self._marked(line.kind, line.edits)}
        except ValueError as error:
            raise RunError(f"{where}: {error}.") from error

    def tensors_of(self, line: BatchLine | RevisionLine, where: str) -> tuple[Written, Mapping[str, KnownTarget]]:
        """What a line's file holds: read when it is looked at, and kept by nobody but the caller."""
        stored = self._stored(line.file, where, line.requests if isinstance(line, BatchLine) else ())
        return stored.written(line.attachment), stored.known

    @property
    def entries(self) -> list[LedgerEntry]:
        """The batches that were applied, as they were solved, whatever is undone."""
        return [entry for entry in self.batches if entry.applied]

    def history(self) -> tuple[LedgerEntry, ...]:
        """What is active, oldest first: batches without the edits that are undone, and without those that have none
        left."""
        return self._views(self.entries, self._undone)

    def history_before(self, batch: int) -> tuple[LedgerEntry, ...]:
        """What was active when that batch came, whatever was undone or redone since."""
        earlier = (entry for entry in self.entries if entry.batch < batch)
        return self._views(earlier, self._undone_before[batch])

    def active(self) -> list[Written]:
        """What makes up the model's state beside its base weights, in order."""
        return [entry.written for entry in self.history()]

    def batch(self, index: int) -> LedgerEntry:
        """The batch of that index, as it was solved."""
        return self._by_index[index]

    def facts(self) -> tuple[EditRequest, ...]:
        """What is active, by subject and prompt, oldest first; a fact edited again counts where it was edited last."""
        latest: dict[tuple[str, str], EditRequest] = {}
        for entry in self.history():
            for request in entry.new_requests:
                latest.pop(request.fact_key, None)
                latest[request.fact_key] = request
        return tuple(latest.values())

    def written(self) -> Iterator[EditRequest]:
        """Every request that a batch wrote, whatever is undone, oldest first."""
        for entry in self.entries:
            yield from entry.new_requests

    def undone(self, batch: int) -> frozenset[str]:
        """Ids of the edits of a batch that are undone."""
        return self._undone.get(batch, frozenset())

    def state(self, entry: LedgerEntry) -> str:
        """What became of a batch: ``active``, ``partly undone``, ``undone`` or ``rejected``."""
        undone = len(self.undone(entry.batch))
        if not entry.applied:
            return "rejected"
        return "active" if not undone else "undone" if undone == entry.num_new else "partly undone"

    def states(self) -> dict[tuple[int, str], str]:
        """What became of every edit, by batch and id: ``active``, ``edited anew``, ``undone`` or ``rejected``."""
        active = {fact.id for fact in self.facts()}
        found: dict[tuple[int, str], str] = {}
        for entry in self.batches:
            undone = self.undone(entry.batch)
            for name in entry.new_ids:
                written = "undone" if name in undone else "active" if name in active else "edited anew"
                found[entry.batch, name] = written if entry.applied else "rejected"
            found |= {(entry.batch, one.request.id): "rejected" for one in entry.rejected}
        return found

    def revisions(self, batch: int) -> list[LedgerEntry]:
        """What a batch was solved as without some of its edits, whether it is used or not."""
        entry = self._by_index[batch]
        return [entry_without(entry, undone, written) for undone, written in self._revisions.get(batch, {}).items()]

    def is_solved(self, batch: int, undone: frozenset[str]) -> bool:
        """Whether it is known what a batch is without some of its edits."""
        whole_or_nothing = undone in (frozenset(), frozenset(self._by_index[batch].new_ids))
        return whole_or_nothing or undone in self._revisions.get(batch, {})

    def append(self, entry: LedgerEntry) -> None:
        """Keep a batch; with a directory, make it durable first.

        Raises:
            StorageError: it cannot be written; the ledger is as it was.
            RunError: another process has changed the ledger meanwhile.
        """
        self._check(entry)
        tensors = _tensors(entry) if entry.applied else {}
        held = self._references(entry)
        self._write(lambda file: batch_line(entry, file, held), f"batch-{entry.batch:05d}.safetensors", tensors)
        self._add(entry)

    def revise(self, batch: int, undone: frozenset[str], written: Written) -> None:
        """Keep what a batch is without some of its edits, durably. Nothing changes before :meth:`mark`.

        Raises:
            StorageError, RunError: as :meth:`append`.
        """
        without = tuple(name for name in self._by_index[batch].new_ids if name in undone)
        number = 1 + len(self._revisions.get(batch, {}))

        def line(file: TensorFile | None) -> Line:
            return RevisionLine(batch=batch, without=without, file=file, attachment=_attachment_line(written))

        self._write(line, f"batch-{batch:05d}-{number}.safetensors", written_tensors(written))
        self._add_revision(batch, undone, written)

    def mark(self, kind: Literal["undo", "redo"], edits: Sequence[tuple[int, str]]) -> None:
        """Note, in one line, that edits (batch and id of each) are undone or back.

        Raises:
            StorageError, RunError: as :meth:`append`.
            ValueError: there is no such edit, it is so already, or its batch was not solved for it.
        """
        changed = self._marked(kind, edits)
        self._write(lambda _file: UndoLine(kind=kind, edits=tuple(edits)))
        self._undone = {**self._undone, **changed}

    # What is known

    def _entry(self, line: BatchLine, where: str) -> LedgerEntry:
        writes = line.file is not None or line.attachment is not None
        if writes != (line.scale > 0):
            what = "something" if writes else "nothing"
            raise ValueError(f"batch {line.batch} is scaled by {line.scale:g} and writes {what}")
        stored = self._stored(line.file, where, line.requests)
        written = stored.written(line.attachment)
        return LedgerEntry(
            batch=line.batch,
            requests=line.requests,
            weights=line.weights,
            num_new=line.num_new,
            changes=written.changes,
            attachment=written.attachment,
            known=stored.known,
            memory=written.memory,
            diagnostics=line.diagnostics,
            scale=line.scale,
            evidence=line.evidence,
            notes=line.notes,
            reason=line.reason,
            verdicts=line.verdicts,
            held=HeldKey.ordered(self._held(line)),
            rejected=line.rejected,
        )

    def _held(self, line: BatchLine) -> Iterator[HeldKey]:
        for reference in line.held:
            entry = self._by_index.get(reference.batch)
            if entry is None or not entry.applied or max(reference.rows) >= len(entry.requests):
                raise ValueError(
                    f"batch {line.batch} holds row {max(reference.rows)} of batch {reference.batch}, which is not there"
                )
            for row in reference.rows:
                name = entry.requests[row].id
                yield HeldKey(batch=entry.batch, request_id=name, keys=_keys_of(entry, name), weight=reference.weight)

    def _references(self, entry: LedgerEntry) -> list[HeldLine]:
        """Where the keys are that a batch left alone, those of one batch and weight together.

        Raises:
            PluginError: one is not in the ledger.
        """
        rows: dict[tuple[int, float], list[int]] = {}
        places: dict[int, dict[str, int]] = {}
        for one in entry.held:
            if one.batch not in places:
                found = self._by_index.get(one.batch)
                requests = found.requests if found is not None and found.applied else ()
                places[one.batch] = {request.id: row for row, request in enumerate(requests)}
            if one.request_id not in places[one.batch]:
                raise PluginError(
                    f"Batch {entry.batch} holds the key of '{one.request_id}' of batch {one.batch}, which the ledger "
                    "does not have."
                )
            rows.setdefault((one.batch, one.weight), []).append(places[one.batch][one.request_id])
        return [HeldLine(batch=batch, rows=tuple(sorted(r)), weight=w) for (batch, w), r in sorted(rows.items())]

    def _stored(self, file: TensorFile | None, where: str, requests: Sequence[EditRequest] = ()) -> _Stored:
        assert self.directory is not None
        return _Stored(self.directory / DELTAS_NAME, file, where, tuple(request.id for request in requests))

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
        new = [*entry.new_ids, *(one.request.id for one in entry.rejected)]
        if len({request.id for request in entry.requests}) < len(entry.requests) or len(set(new)) < len(new):
            raise ValueError(f"batch {entry.batch} has an id twice")

    def _add(self, entry: LedgerEntry) -> None:
        self._check(entry)
        self.batches.append(entry)
        self._by_index[entry.batch] = entry
        self._undone_before[entry.batch] = self._undone

    def _add_revision(self, batch: int, undone: frozenset[str], written: Written) -> None:
        entry = self._by_index.get(batch)
        if entry is None or not entry.applied or not undone < set(entry.new_ids):
            raise ValueError(f"batch {batch} cannot be without {', '.join(sorted(undone))}")
        self._revisions.setdefault(batch, {})[undone] = written

    def _marked(self, kind: Literal["undo", "redo"], edits: Sequence[tuple[int, str]]) -> dict[int, frozenset[str]]:
        changed: dict[int, frozenset[str]] = {}
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
        for batch, undone in changed.items():
            if not self.is_solved(batch, undone):
                raise ValueError(f"batch {batch} was not solved without {', '.join(sorted(undone))}")
        return changed

    def _views(self, entries: Iterable[LedgerEntry], undone: Mapping[int, frozenset[str]]) -> tuple[LedgerEntry, ...]:
        """Those of the entries that have an edit left, without the edits that are ``undone``."""
        views: list[LedgerEntry] = []
        for entry in entries:
            out = undone.get(entry.batch, frozenset())
            if not out:
                views.append(entry)
            elif out != set(entry.new_ids):
                views.append(entry_without(entry, out, self._revisions[entry.batch][out]))
        return tuple(views)

    # On disk

    def _write(
        self,
        line_of: Callable[[TensorFile | None], Line],
        name: str = "",
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a line, and before it the tensors that it speaks of, if there are any."""
        if self.directory is None:
            return
        self._refuse_foreign(self.directory / LEDGER_NAME)
        if not tensors:
            self._append(self.directory, line_of(None))
            return
        path = self.directory / DELTAS_NAME / name
        write_tensors(path, tensors, {})
        try:
            raw = path.read_bytes()
            self._append(
                self.directory,
                line_of(TensorFile(name=name, size=len(raw), sha256=hashlib.sha256(raw).hexdigest())),
            )
        except Exception:
            path.unlink(missing_ok=True)  # no line speaks of it
            raise

    def _append(self, directory: Path, line: Line) -> None:
        assert self.header is not None, "a ledger on disk needs a header"
        header = encode(self.header) if self._size == 0 else b""
        try:
            self._append_bytes(directory, header + encode(line))
        except OSError as error:
            raise StorageError(
                f"Cannot write {directory / LEDGER_NAME}: {error.strerror}. The ledger is as it was."
            ) from error

    def _refuse_foreign(self, path: Path) -> None:
        """Refuse to write behind lines that this process does not know, or without those that it does."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(self._size)
                rest = file.read()
        except FileNotFoundError:
            size, rest = 0, b""
        if size < self._size or b"\n" in rest:
            raise RunError(f"{path} was changed by another process. The ledger is as that one left it.")

    def _append_bytes(self, directory: Path, content: bytes) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / LEDGER_NAME
        # Unbuffered: a buffer that could not be written would be written again before the file is cut.
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb+", buffering=0) as file:
            try:
                file.truncate(self._size)  # what a crash left of a line
                file.seek(self._size)
                written = 0
                while written < len(content):
                    written += file.write(content[written:])
                os.fsync(file.fileno())
                sync_directory(directory)
            except BaseException:
                file.truncate(self._size)  # half a line would damage the next one
                raise
        self._size += len(content)


def _read_lines(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RunError(
            f"{path.parent} is not a run directory: {path.name} cannot be read ({error.strerror})."
        ) from error
    if len(raw) > MAX_BYTES:
        raise RunError(f"{path} has more than {MAX_BYTES >> 20} MiB, which no ledger of a run has.")
    return raw.split(b"\n")


def batch_line(entry: LedgerEntry, file: TensorFile | None, held: Sequence[HeldLine] = ()) -> BatchLine:
    """The entry without its tensors, which are in ``file``.

    Args:
        held: where the keys are that it left alone.

    Raises:
        PluginError: a plugin's diagnostics or verdicts are not what they should be.
    """
    try:
        return BatchLine(
            batch=entry.batch,
            file=file,
            attachment=_attachment_line(entry.written),
            scale=entry.scale,
            num_new=entry.num_new,
            requests=entry.requests,
            weights=entry.weights,
            held=tuple(held),
            diagnostics=entry.diagnostics,
            evidence=entry.evidence,
            notes=entry.notes,
            reason=entry.reason,
            verdicts=entry.verdicts,
            rejected=entry.rejected,
        )
    except ValidationError as error:
        raise PluginError(f"Batch {entry.batch} cannot be kept: {first_problem(error)}.") from error


def entry_without(entry: LedgerEntry, undone: Collection[str], written: Written) -> LedgerEntry:
    """The entry without some of its new requests, solved as ``written``."""
    rows = entry.kept_rows(undone)
    requests = tuple(entry.requests[row] for row in rows)
    kept = {request.id for request in requests}
    return replace(
        entry,
        requests=requests,
        weights=tuple(entry.weights[row] for row in rows),
        num_new=sum(row < entry.num_new for row in rows),
        changes=written.changes,
        attachment=written.attachment,
        known=_Lazy(lambda: {name: known for name, known in entry.known.items() if name in kept}),
        memory=written.memory,
        evidence=tuple(one for one in entry.evidence if one.request_id in kept),
    )


def _keys_of(entry: LedgerEntry, request_id: str) -> Mapping[str, Tensor]:
    return _Lazy(lambda: entry.known[request_id].keys)


class _Lazy(Mapping[str, V]):
    """A mapping that is made when it is first looked at."""

    def __init__(self, make: Callable[[], Mapping[str, V]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, V]:
        return self._make()

    def __getitem__(self, name: str) -> V:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


@dataclass(frozen=True)
class _Stored:
    """The tensors of one line, read and checked when first asked for."""

    folder: Path
    file: TensorFile | None
    where: str
    ids: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file, for messages."""
        return self.folder / (self.file.name if self.file is not None else "")

    def written(self, attachment: AttachmentLine | None) -> Written:
        """What the batch put into the model."""
        return Written(
            changes=self._lazy(_changes),
            attachment=None
            if attachment is None
            else Attachment(
                kind=attachment.kind,
                fields=attachment.fields,
                tensors=self._lazy(lambda tensors: _named(tensors, "attachment")),
            ),
            memory=self._lazy(lambda tensors: _named(tensors, "memory")),
        )

    @property
    def known(self) -> Mapping[str, KnownTarget]:
        """Keys and values by request id."""
        return self._lazy(lambda tensors: _known(tensors, self.ids))

    def _lazy(self, pick: Callable[[Mapping[str, Tensor]], Mapping[str, V]]) -> Mapping[str, V]:
        return {} if self.file is None else _Lazy(lambda: self._checked(pick))

    def _checked(self, pick: Callable[[Mapping[str, Tensor]], Mapping[str, V]]) -> Mapping[str, V]:
        try:
            return pick(self._tensors)
        except (KeyError, ValueError, IndexError) as error:
            raise RunError(f"{self.where}: {self.path} does not hold what a batch holds ({error}).") from error

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        assert self.file is not None
        try:
            size = self.path.stat().st_size
            if size != self.file.size:
                raise RunError(
                    f"{self.where}: {self.path} has {size} bytes, {self.file.size} were written; it was cut off or "
                    "changed."
                )
            raw = self.path.read_bytes()
        except OSError as error:
            raise RunError(f"{self.where}: {self.path} cannot be read ({error.strerror}).") from error
        if hashlib.sha256(raw).hexdigest() != self.file.sha256:
            raise RunError(f"{self.where}: {self.path} is not the file that was written; its sha256 differs.")
        try:
            return load(raw)
        except SafetensorError as error:
            raise RunError(f"{self.where}: {self.path} is not a safetensors file ({error}).") from error


def _attachment_line(written: Written) -> AttachmentLine | None:
    attachment = written.attachment
    return None if attachment is None else AttachmentLine(kind=attachment.kind, fields=attachment.fields)


def _tensors(entry: LedgerEntry) -> dict[str, Tensor]:
    tensors = written_tensors(entry.written)
    for row, request in enumerate(entry.requests):
        known = entry.known.get(request.id)
        if known is not None:
            tensors |= {f"key/{row}/{name}": key.clone() for name, key in known.keys.items()}
            tensors |= {f"value/{row}/{name}": value.clone() for name, value in known.values.items()}
    return tensors


def written_tensors(written: Written) -> dict[str, Tensor]:
    """Every tensor of what a batch writes, by names of which each says what it is; :func:`written_from` reads them."""
    # A copy each: safetensors refuses tensors that share memory, as one key under two names does.
    found = {
        f"{part}/{address}": tensor.contiguous().clone()
        for address, change in written.changes.items()
        for part, tensor in change.tensors().items()
    }
    beside = {} if written.attachment is None else written.attachment.tensors
    for kind, tensors in (("attachment", beside), ("memory", written.memory)):
        found |= {f"{kind}/{name}": tensor.contiguous().clone() for name, tensor in tensors.items()}
    return found


_BESIDE = {"key", "value", "attachment", "memory"}
"""First words of the names of tensors that are no part of a change."""


def _changes(tensors: Mapping[str, Tensor]) -> dict[str, WeightChange]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        part, _, address = key.partition("/")
        if part not in _BESIDE:
            parts.setdefault(address, {})[part] = tensors[key]
    return {address: as_change(parts[address]) for address in sorted(parts)}


def written_from(tensors: Mapping[str, Tensor], attachment: AttachmentLine | None) -> Written:
    """What a batch writes, from its tensors.

    Raises:
        ValueError: they are not those of changes.
    """
    beside = None
    if attachment is not None:
        beside = Attachment(kind=attachment.kind, fields=attachment.fields, tensors=_named(tensors, "attachment"))
    return Written(changes=_changes(tensors), attachment=beside, memory=_named(tensors, "memory"))


def _named(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{kind}/"): tensors[key] for key in sorted(tensors) if key.startswith(f"{kind}/")}


def _known(tensors: Mapping[str, Tensor], ids: Sequence[str]) -> dict[str, KnownTarget]:
    parts: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    rows: dict[int, str] = dict(enumerate(ids))
    for key in sorted(tensors):
        kind, _, rest = key.partition("/")
        if kind in ("key", "value"):
            row, _, name = rest.partition("/")
            found = parts.setdefault(rows[int(row)], ({}, {}))
            found[kind == "value"][name] = tensors[key]
    return {name: KnownTarget(keys=parts[name][0], values=parts[name][1]) for name in ids if name in parts}


def write_ledger(directory: Path | str, entries: Iterable[LedgerEntry], header: HeaderLine) -> None:
    """A new ledger of batches that were made elsewhere.

    Raises:
        StorageError: it cannot be written.
    """
    directory = Path(directory)
    ledger = Ledger(directory, header)
    for entry in entries:
        ledger.append(entry)
