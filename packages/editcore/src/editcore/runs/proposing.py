"""Proposals of an editor: checked, judged by the gates, and made again for the rest of a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from editcore.interfaces.changes import Written
from editcore.interfaces.errors import RunError
from editcore.interfaces.events import AfterSolve, BatchAddition, BeforeApply
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.protocols import EditContext, Editor, Remembers, Resolves, SolvesAtStoredKeys
from editcore.interfaces.specs import EditorSpec
from editcore.interfaces.values import EditBatch, Proposal, RejectedRequest, Verdict
from editcore.ledger.entries import entry_without
from editcore.ledger.ledger import Ledger
from editcore.ledger.states import LeftOut
from editcore.models.edited import EditedModel
from editcore.models.writing import in_float64
from editcore.plugins.extensions import Lifecycle
from editcore.runs.batches import (
    Judged,
    check_rejected,
    check_written,
    ids_of,
    judgement,
    on_cpu,
    rejected_by,
    scaled,
    with_additions,
)
from editcore.runs.same_subject import FactsBySubject, ids_about

__all__ = ["Proposer"]


class Proposer:
    """Asks the editor of a session for changes, and checks them against the announcements of editor and backend."""

    def __init__(
        self, editor: Editor, spec: EditorSpec, edited: EditedModel, context: EditContext, lifecycle: Lifecycle
    ) -> None:
        self._editor, self._spec, self._lifecycle = editor, spec, lifecycle
        self._edited, self._context = edited, context
        self._facts = FactsBySubject()
        self._missing = _Difference()

    def propose(self, batch: EditBatch) -> Proposal:
        """What the editor proposes for a batch, as extensions rework it.

        Raises:
            PluginError: the proposal is not what the editor announces, or does not fit the model or the backend.
            NumericalError: the proposal has NaN or Inf.
        """
        proposal = self._editor.propose(self._edited.model, batch, self._context)
        check_written(self._edited.model, proposal.written, self._spec, self._edited.spec)
        if self._lifecycle.reworks and proposal.changes:
            rework = self._lifecycle.after_solve(AfterSolve(model=self._edited.model, changes=proposal.changes))
            proposal = replace(
                proposal,
                changes=rework.changes,
                diagnostics={**proposal.diagnostics, **rework.diagnostics},
                notes=(*proposal.notes, *rework.notes),
            )
            check_written(self._edited.model, proposal.written, self._spec, self._edited.spec)
        if all(change.norm() == 0 for change in proposal.changes.values()) and proposal.attachment is None:
            note = "The change of this batch is zero, so the model is as it was."
            proposal = replace(proposal, notes=(*proposal.notes, note))
        return proposal

    def judged(self, batch: EditBatch, proposal: Proposal) -> Judged:
        """Ask the gates until they reject no more requests. That takes at most one round per new request, because each
        round but the last takes one out."""
        whole, first = batch, proposal
        verdicts: dict[str, Verdict] = {}
        rejected: list[RejectedRequest] = []

        def without(ids: Collection[str]) -> Proposal:
            return self._propose_rest(whole, first, {*ids_of(rejected), *ids})

        while batch.num_new:
            event = BeforeApply(
                model=self._edited.model, batch=batch, proposal=proposal, trial=self._trial, without=without
            )
            verdicts = dict(self._lifecycle.before_apply(event))
            found = list(rejected_by(batch, {name: verdict.rejected for name, verdict in verdicts.items()}))
            if not found or judgement(verdicts)[0] == 0:
                break
            rejected += found
            batch = whole.without(ids_of(rejected))
            if batch.num_new:
                proposal = without(())
        if not batch.num_new:  # without new requests, the added ones are not written either
            batch = batch.without({request.id for request in batch.requests})
            proposal, verdicts = Proposal(), {}
        return Judged(batch=batch, proposal=proposal, verdicts=verdicts, rejected=rejected)

    @contextmanager
    def _trial(self, proposal: Proposal, scale: float) -> Iterator[None]:
        with self._edited.trial(scaled(proposal.written, scale)):
            yield

    def _propose_rest(self, batch: EditBatch, proposal: Proposal, rejected: Collection[str]) -> Proposal:
        """The proposal for a batch without some of its new requests, with the targets that ``proposal`` found.

        Only the values of facts that have a subject in common with a rejected one are optimised again: the rejected
        fact may have shared them.
        """
        again = ids_about((request.subject_key for request in batch.requests if request.id in rejected), batch.requests)
        found = {name: target for name, target in proposal.known.items() if name not in again}
        rest = batch.without(rejected, found)
        check_rejected(rest, batch, rejected)
        second = self.propose(rest)
        stages = [*proposal.seconds, *(name for name in second.seconds if name not in proposal.seconds)]
        return replace(
            second,
            notes=tuple(dict.fromkeys([*proposal.notes, *second.notes])),
            seconds={name: proposal.seconds.get(name, 0.0) + second.seconds.get(name, 0.0) for name in stages},
        )

    def solve_without(self, entry: LedgerEntry, out: LeftOut, ledger: Ledger) -> tuple[Written, EditBatch | None]:
        """What a batch writes without some edits; the model is as before when this returns.

        Args:
            out: new requests of the batch to leave out, earlier edits that it builds on whose state is another one than
                when it came, and edits that are to be as if they had never been solved.

        Returns:
            What is written, and the batch that was solved for it; ``None`` for the remaining requests with the values
            that they have.

        Raises:
            NumericalError: the rest cannot be solved.
            RunError: an edit is to be as if it had never been, and the editor cannot do that.
        """
        written, remaining = self._solved_without(entry, out, ledger)
        if self._lifecycle.reworks and written.changes:
            written = self._reworked(written, entry, ledger.history_before(entry.batch, out), ledger)
        check_written(self._edited.model, written, self._spec, self._edited.spec)
        return on_cpu(written), remaining

    def _solved_without(self, entry: LedgerEntry, out: LeftOut, ledger: Ledger) -> tuple[Written, EditBatch | None]:
        """:meth:`solve_without`, before extensions rework what the editor gives."""
        own = out.own(entry.batch)
        if subjects := self._subjects_to_solve_again(entry, out, own, ledger):
            rest = self._composed_anew(entry, own, subjects, out, ledger)
            batch, written = self._propose_again(entry, rest, out, ledger)
            return written, batch
        if out.never:
            return self._solve_as_if_never(entry, out, ledger)
        solved = None
        if isinstance(self._editor, Resolves):
            solved = self._editor.resolve(self._edited.model, entry, entry.kept_rows(own), self._context)
        if solved is None:
            rest = entry_without(entry, own, Written()).as_batch()
            _, solved = self._propose_again(entry, rest, out, ledger)
        return solved, None

    def _reworked(
        self, written: Written, entry: LedgerEntry, earlier: Sequence[LedgerEntry], ledger: Ledger
    ) -> Written:
        """What extensions make of a batch that was solved again, on the model with the ``earlier`` batches."""
        try:
            self._edited.rebuild([past.written for past in earlier])
            proposed = scaled(written, 1 / entry.scale)
            rework = self._lifecycle.after_solve(AfterSolve(model=self._edited.model, changes=proposed.changes))
        finally:
            self._edited.rebuild(ledger.active())
        return scaled(replace(written, changes=rework.changes), entry.scale)

    def _subjects_to_solve_again(
        self, entry: LedgerEntry, out: LeftOut, own: Collection[str], ledger: Ledger
    ) -> set[str]:
        """Subjects of a batch whose facts need another value: those that they share with an edit in ``out``."""
        if not self._spec.capabilities.rewrites_subject:
            return set()
        removed = [request for request in entry.requests if request.id in own]
        removed += [
            request
            for index, name in out.edits
            if index != entry.batch
            for request in ledger.batch(index).new_requests
            if request.id == name
        ]
        subjects = {request.subject_key for request in removed} - {""}
        return subjects & {request.subject_key for request in entry.requests if request.id not in own}

    def _composed_anew(
        self, entry: LedgerEntry, own: Collection[str], subjects: Collection[str], out: LeftOut, ledger: Ledger
    ) -> EditBatch:
        """The batch as it would have come: with the facts about ``subjects`` that it would have been given, and without
        the values that were found together with others."""
        again = ids_about(subjects, entry.requests)
        replayed = {request.id for request in entry.requests[entry.num_new :]} & again
        batch = entry.as_batch().without({*own, *replayed})
        batch = replace(batch, known={name: target for name, target in batch.known.items() if name not in again})
        new = [request for request in batch.new_requests if request.subject_key in subjects]
        earlier = FactsBySubject(ledger.history_before(entry.batch, out))
        return with_additions(batch, [earlier.addition(new)])

    def _propose_again(
        self, entry: LedgerEntry, batch: EditBatch, out: LeftOut, ledger: Ledger
    ) -> tuple[EditBatch, Written]:
        """Propose a batch on the model as it was when the batch came, but for the earlier edits in ``out``. Whatever
        else was undone since makes no difference, so the order of undoing does not matter."""
        earlier = ledger.history_before(entry.batch, out)
        try:
            self._edited.rebuild([past.written for past in earlier])
            self.recall(earlier)
            proposal = self._editor.propose(self._edited.model, batch, self._context)
        finally:
            self._edited.rebuild(ledger.active())
            self.recall(ledger.history())
        known = {name: replace(target, figures={}) for name, target in proposal.known.items()}
        return replace(batch, known=known), scaled(proposal.written, entry.scale)

    def _solve_as_if_never(self, entry: LedgerEntry, out: LeftOut, ledger: Ledger) -> tuple[Written, EditBatch | None]:
        """A batch solved for the keys and values that the ledger has, on the weights that it would have met if some
        earlier edits had never been. Replayed requests and held keys of these edits are left out, too."""
        if not isinstance(self._editor, SolvesAtStoredKeys):
            raise RunError(_no_never(self._spec.name))
        gone = {name for index, name in out.never if index < entry.batch}
        replayed = {request.id for request in entry.requests[entry.num_new :]} & gone
        left = {*out.own(entry.batch), *replayed}
        rows = [row for row, request in enumerate(entry.requests) if request.id not in left]
        held = tuple(key for key in entry.held if key.request_id not in gone)  # its batch may have replayed the fact
        before = ledger.history_before(entry.batch, LeftOut(never=out.never))
        missing = self._missing.between(ledger.history_before(entry.batch), before, entry.changes)
        try:
            self.recall(before)
            solved = self._editor.solve_at_stored_keys(
                self._edited.model, replace(entry, held=held), rows, missing, self._context
            )
        finally:
            self.recall(ledger.history())
        if solved is None:
            raise RunError(_no_never(self._spec.name))
        return solved, entry.as_batch().without(left) if replayed else None

    def facts_of_its_subjects(self, batch: EditBatch) -> BatchAddition:
        """The active facts about the subjects of a batch, if the editor would otherwise overwrite them."""
        if not self._spec.capabilities.rewrites_subject:
            return BatchAddition()
        return self._facts.addition(batch.new_requests)

    def recall(self, history: Sequence[LedgerEntry]) -> None:
        """Note which batches are active. The editor is told, if it remembers them."""
        self._facts = FactsBySubject(history)
        if isinstance(self._editor, Remembers):
            self._editor.recall(history)

    def absorb(self, entry: LedgerEntry) -> None:
        """Note the batch that was just written. The editor is told, if it remembers batches."""
        self._facts.absorb(entry)
        if isinstance(self._editor, Remembers):
            self._editor.absorb(entry)


class _Difference:
    """How the weights of two histories differ. Batches that were compared already are not read again."""

    def __init__(self) -> None:
        self._compared: list[tuple[LedgerEntry | None, LedgerEntry | None]] = []
        self._sums: dict[str, Tensor] = {}

    def between(
        self, first: Sequence[LedgerEntry], second: Sequence[LedgerEntry], addresses: Collection[str]
    ) -> Mapping[str, Tensor]:
        """By address, what the changes of ``first`` have more than those of ``second``, ``[d_out, d_in]`` float64."""
        by_batch = [{entry.batch: entry for entry in history} for history in (first, second)]
        batches = sorted({*by_batch[0], *by_batch[1]})
        pairs = [(by_batch[0].get(batch), by_batch[1].get(batch)) for batch in batches]
        known = self._compared
        same = len(known) <= len(pairs) and all(
            ours[0] is theirs[0] and ours[1] is theirs[1] for ours, theirs in zip(known, pairs, strict=False)
        )
        if not same:
            known, self._sums = [], {}
        for pair in pairs[len(known) :]:
            if pair[0] is not pair[1]:
                self._add(pair[0], 1.0)
                self._add(pair[1], -1.0)
        self._compared = pairs
        return {address: self._sums[address] for address in addresses if address in self._sums}

    def _add(self, entry: LedgerEntry | None, sign: float) -> None:
        for address, change in ({} if entry is None else entry.changes).items():
            if address not in self._sums:
                self._sums[address] = torch.zeros(change.shape, dtype=torch.float64)
            self._sums[address] += sign * in_float64(change, self._sums[address])


def _no_never(editor: str) -> str:
    return (
        f"What '{editor}' wrote cannot be solved again without an earlier edit: the ledger does not have the keys and "
        "values of its batches. Undo it without --as-if-never, which leaves later batches as they were solved."
    )
