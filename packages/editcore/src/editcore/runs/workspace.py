"""A run directory that takes more edits, day after day: facts are added, corrected, checked and taken out."""

from __future__ import annotations

import getpass
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from editcore._util.files import remove_leftovers, uninterrupted
from editcore._util.lock import locked
from editcore.interfaces.history import Signature
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import EditRequest, FactRecord
from editcore.ledger.file import DELTAS_NAME
from editcore.ledger.finding import edits_of_subject
from editcore.ledger.ledger import Ledger
from editcore.ledger.states import Edit, LeftOut
from editcore.ledger.undo import change, changing, edits_named
from editcore.plugins.registry import Plugins
from editcore.runs.added import keep_added
from editcore.runs.check_record import CHECK_NAME, CheckRecord
from editcore.runs.facts import recorded_editor
from editcore.runs.fit import check_subjects
from editcore.runs.log import BatchLog
from editcore.runs.planned_edit import PlannedEdit, plan_edit
from editcore.runs.record import RunRecord, active_facts
from editcore.runs.resume import refuse_unfinished
from editcore.runs.state import STATE_NAME, DirectoryState, ledger_bytes

if TYPE_CHECKING:
    from editcore.interfaces.changes import Written
    from editcore.interfaces.history import LedgerEntry
    from editcore.interfaces.values import EditBatch
    from editcore.runs.batches import BatchResult
    from editcore.runs.checking import CheckOptions
    from editcore.runs.session import EditSession

__all__ = ["Workspace", "signed", "workspace"]


@contextmanager
def workspace(
    directory: Path | str,
    *,
    device: str | None = None,
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> Iterator[Workspace]:
    """A run directory that takes more edits, inside the block only. No other process can write to it meanwhile. The
    model is loaded when it is first needed, and has its base bits again when the block ends.

    >>> with editcore.workspace("facts") as ws:  # doctest: +SKIP
    ...     ws.edit([EditRequest(subject="Rome", prompt="{} is in", target_new="France")], note="a test")
    ...     ws.check().said
    100.0

    Args:
        device: where the model runs; left out, where it ran when the directory was made.

    Raises:
        RunError: there is no run directory, its run is not finished, or another process uses it.
    """
    directory = Path(directory)
    refuse_unfinished(directory, RunRecord.read(directory))
    with locked(directory):
        for folder in (directory, directory / DELTAS_NAME):
            remove_leftovers(folder)  # of a process that was killed
        opened = Workspace(directory, device=device, plugins=plugins or Plugins.load(), progress=progress)
        try:
            yield opened
        finally:
            opened.close()


class Workspace:
    """A run directory that takes more edits. Made by :func:`workspace`."""

    def __init__(self, directory: Path, *, device: str | None, plugins: Plugins, progress: Progress) -> None:
        self.directory = directory
        self.record = record = RunRecord.read(directory)
        if device is not None:
            self.record = record.model_copy(update={"config": record.config.model_copy(update={"device": device})})
        self._plugins, self._progress = plugins, progress
        self._ledger = Ledger.read(directory)
        self._session: EditSession | None = None

    @property
    def ledger(self) -> Ledger:
        """The directory's ledger."""
        return self._ledger if self._session is None else self._session.ledger

    @property
    def session(self) -> EditSession:
        """The session of the directory; its model is loaded when this is first asked for.

        Raises:
            RunError: the model or the text of its second moments is another one than when the directory was made.
        """
        if self._session is None:
            from editcore.runs.reopening import open_session

            self._session = open_session(self.directory, self.record, plugins=self._plugins, progress=self._progress)
        return self._session

    def plan(self, facts: Sequence[EditRequest | FactRecord], *, again: bool = False) -> PlannedEdit:
        """What :meth:`edit` would do.

        Raises:
            RequestError: two of the facts contradict each other, or the editor cannot write one.
        """
        records = [fact if isinstance(fact, FactRecord) else FactRecord(request=fact) for fact in facts]
        check_subjects([record.request for record in records], *recorded_editor(self._plugins, self.record))
        return plan_edit(self.ledger, records, again=again)

    def edit(
        self,
        facts: Sequence[EditRequest | FactRecord],
        *,
        note: str = "",
        author: str | None = None,
        again: bool = False,
    ) -> list[BatchResult]:
        """Write facts, with the directory's settings. Each batch is durable before the next one starts.

        Args:
            note: why, for the ledger.
            author: who; left out, the name of the user who is logged in.
            again: whether to write facts that are active with the same target, too.

        Returns:
            A result per batch; none if every fact is active already.

        Raises:
            RequestError: as :meth:`plan`; nothing is written.
            EditcoreError: a batch could not be solved; the batches before it stay applied.
        """
        planned = self.plan(facts, again=again)
        return self.write(planned, signed(note, author)) if planned.records else []

    def write(self, planned: PlannedEdit, signature: Signature) -> list[BatchResult]:
        """Write what :meth:`plan` found."""
        from editcore.models.tokens import refuse_too_long

        session, requests = self.session, [record.request for record in planned.records]
        refuse_too_long(session.model, requests)
        written = {name for entry in session.ledger.batches for name in entry.new_ids}
        with_probes = [record for record in planned.records if record.probes or record.relation or record.extra]
        if with_probes:
            keep_added(self.directory, with_probes, written=written)
        session.context = replace(
            session.context,
            records={**session.context.records, **{record.request.id: record for record in planned.records}},
        )
        log = BatchLog(self.directory, session.ledger)
        size = min(self.record.config.batch_size, session.max_batch or len(requests))
        results = []
        with self._progress.task("editing", len(requests)) as advance:
            for start in range(0, len(requests), size):
                for result in session.edit(requests[start : start + size], signature=signature):
                    log.add(session.ledger.batch(result.batch.index), result.seconds, result.proposal.seconds)
                    advance(result.batch.num_new + len(result.rejected))
                    results.append(result)
        self._keep_state()
        return results

    def undo(
        self,
        *edits: str,
        batches: Sequence[int] = (),
        subjects: Sequence[str] = (),
        note: str = "",
        as_if_never: bool = False,
    ) -> tuple[EditRequest, ...]:
        """Take edits out, by id, by batch or by subject, in any order.

        Args:
            note: why, for the ledger.
            as_if_never: as in :meth:`EditSession.undo`.

        Returns:
            The requests that this call took out.

        Raises:
            RunError: there is no such edit, batch or subject, or all are undone already.
            StorageError: the ledger cannot be written; nothing was changed.
        """
        meant = self._meant("undo", edits, batches, subjects)
        return self.change("undo", meant, signed(note), as_if_never=as_if_never)

    def redo(
        self, *edits: str, batches: Sequence[int] = (), subjects: Sequence[str] = (), note: str = ""
    ) -> tuple[EditRequest, ...]:
        """Put undone edits back; as :meth:`undo`."""
        return self.change("redo", self._meant("redo", edits, batches, subjects), signed(note))

    def _meant(
        self, kind: Literal["undo", "redo"], edits: Sequence[str], batches: Sequence[int], subjects: Sequence[str]
    ) -> tuple[Edit, ...]:
        about = [edit for subject in subjects for edit in edits_of_subject(self.ledger, subject)]
        return changing(self.ledger, kind, [*edits_named(self.ledger, edits, batches), *about])

    def change(
        self,
        kind: Literal["undo", "redo"],
        edits: Collection[Edit],
        signature: Signature | None = None,
        *,
        as_if_never: bool = False,
    ) -> tuple[EditRequest, ...]:
        """Undo or redo edits. The model is loaded only if a batch must be solved again.

        Args:
            edits: as :mod:`editcore.ledger.undo` and :mod:`editcore.ledger.finding` find them.
            signature: who changes them, and why; see :func:`signed`.
            as_if_never: as in :meth:`EditSession.undo`.

        Returns:
            The requests whose state was changed.

        Raises:
            NumericalError, StorageError: nothing was changed.
        """
        signature = signature or signed("")
        if self._session is not None:
            return self._session.change(kind, tuple(edits), signature, as_if_never=as_if_never)
        changed = change(
            self._ledger, kind, tuple(edits), solve=self._solve, signature=signature, as_if_never=as_if_never
        )
        if self._session is not None:  # it was opened for a solve, and its model has the edits of before
            self._session.close()
            self._session, self._ledger = None, Ledger.read(self.directory)
        return changed

    def _solve(self, entry: LedgerEntry, out: LeftOut) -> tuple[Written, EditBatch | None]:
        return self.session.solve_without(entry, out, self._ledger)

    def check(self, options: CheckOptions | None = None) -> CheckRecord:
        """Ask the model everything again: its facts, other subjects, and a text. The record is kept in the directory.

        Raises:
            StatisticsError: the text cannot be read or is too short.
        """
        from editcore.runs.checking import check_model

        session = self.session
        found = check_model(
            session.edited,
            self.active_records(),
            options,
            changes=len(session.ledger.events),
            directory=self.directory,
            progress=self._progress,
        )
        found.write_file(self.directory / CHECK_NAME)
        self._keep_state()
        return found

    def active_records(self) -> list[FactRecord]:
        """The active facts, with their probes."""
        return active_facts(self.directory, self.ledger)

    def _keep_state(self) -> None:
        from editcore.runs.running_sums import keep_sums
        from editcore.runs.sizes import RelativeChanges

        session = self.session
        keep_sums(session.edited, session.ledger)
        sizes = RelativeChanges(session.edited)
        relative_change = sizes.of(session.ledger.active())
        state = DirectoryState(
            ledger_bytes=ledger_bytes(self.directory), relative_change=relative_change, norms=sizes.norms
        )
        with uninterrupted():
            state.write_file(self.directory / STATE_NAME)

    def close(self) -> None:
        """Give the model its base bits back."""
        if self._session is not None:
            self._ledger = self._session.ledger
            self._session.close()
            self._session = None


def signed(note: str, author: str | None = None) -> Signature:
    """The signature of a change that is made now."""
    return Signature(
        author=author or _user(), time=datetime.now(UTC).isoformat(timespec="seconds"), note=" ".join(note.split())
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # the system knows no name of the user
        return "unknown"
