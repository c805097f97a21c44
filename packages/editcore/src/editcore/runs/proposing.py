"""Proposals of an editor: checked, judged by the gates, and made again for the rest of a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from editcore.interfaces.changes import Written
from editcore.interfaces.events import BatchAddition, BeforeApply
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.protocols import EditContext, Editor, Remembers, Resolves
from editcore.interfaces.specs import EditorSpec
from editcore.interfaces.values import EditBatch, Proposal, RejectedRequest, Verdict
from editcore.ledger.entries import entry_without
from editcore.ledger.ledger import Edit, Ledger
from editcore.models.edited import EditedModel
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

    def __init__(self, editor: Editor, spec: EditorSpec, edited: EditedModel, context: EditContext) -> None:
        self._editor, self._spec = editor, spec
        self._edited, self._context = edited, context
        self._facts = FactsBySubject()

    def propose(self, batch: EditBatch) -> Proposal:
        """What the editor proposes for a batch.

        Raises:
            PluginError: the proposal is not what the editor announces, or does not fit the model or the backend.
            NumericalError: the proposal has NaN or Inf.
        """
        proposal = self._editor.propose(self._edited.model, batch, self._context)
        check_written(self._edited.model, proposal.written, self._spec, self._edited.spec)
        if all(change.norm() == 0 for change in proposal.changes.values()) and proposal.attachment is None:
            note = "The change of this batch is zero, so the model is as it was."
            proposal = replace(proposal, notes=(*proposal.notes, note))
        return proposal

    def judged(self, batch: EditBatch, proposal: Proposal, lifecycle: Lifecycle) -> Judged:
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
            verdicts = dict(lifecycle.before_apply(event))
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

    def solve_without(
        self, entry: LedgerEntry, out: frozenset[Edit], ledger: Ledger
    ) -> tuple[Written, EditBatch | None]:
        """What a batch writes without some edits; the model is as before when this returns.

        Args:
            out: new requests of the batch to leave out, and earlier edits that it builds on whose state is another
                one than when it came.

        Returns:
            What is written, and the batch that was solved for it; ``None`` for the remaining requests with the values
            that they have.

        Raises:
            NumericalError: the rest cannot be solved.
        """
        own = {name for index, name in out if index == entry.batch}
        if subjects := self._subjects_to_solve_again(entry, out, own, ledger):
            rest = self._composed_anew(entry, own, subjects, out, ledger)
            batch, written = self._propose_again(entry, rest, out, ledger)
            check_written(self._edited.model, written, self._spec, self._edited.spec)
            return on_cpu(written), batch
        solved = None
        if isinstance(self._editor, Resolves):
            solved = self._editor.resolve(self._edited.model, entry, entry.kept_rows(own), self._context)
        if solved is None:
            rest = entry_without(entry, own, Written()).as_batch()
            _, solved = self._propose_again(entry, rest, out, ledger)
        check_written(self._edited.model, solved, self._spec, self._edited.spec)
        return on_cpu(solved), None

    def _subjects_to_solve_again(
        self, entry: LedgerEntry, out: frozenset[Edit], own: Collection[str], ledger: Ledger
    ) -> set[str]:
        """Subjects of a batch whose facts need another value: those that they share with an edit in ``out``."""
        if not self._spec.capabilities.rewrites_subject:
            return set()
        removed = [request for request in entry.requests if request.id in own]
        removed += [
            request
            for index, name in out
            if index != entry.batch
            for request in ledger.batch(index).new_requests
            if request.id == name
        ]
        subjects = {request.subject_key for request in removed} - {""}
        return subjects & {request.subject_key for request in entry.requests if request.id not in own}

    def _composed_anew(
        self, entry: LedgerEntry, own: Collection[str], subjects: Collection[str], out: frozenset[Edit], ledger: Ledger
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
        self, entry: LedgerEntry, batch: EditBatch, out: frozenset[Edit], ledger: Ledger
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
