"""Proposals of an editor: checked, judged by the gates, and made again for the rest of a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from editcore.interfaces.changes import Written
from editcore.interfaces.events import BeforeApply
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.protocols import EditContext, Editor, Remembers, Resolves
from editcore.interfaces.specs import EditorSpec
from editcore.interfaces.values import EditBatch, Proposal, RejectedRequest, Verdict
from editcore.ledger.entries import entry_without
from editcore.ledger.ledger import Ledger
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
)

__all__ = ["Proposer"]


class Proposer:
    """Asks the editor of a session for changes, and checks them against the announcements of editor and backend."""

    def __init__(self, editor: Editor, spec: EditorSpec, edited: EditedModel, context: EditContext) -> None:
        self._editor, self._spec = editor, spec
        self._edited, self._context = edited, context

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
        """The proposal for a batch without some of its new requests, with the targets that ``proposal`` found: nothing
        is optimised again."""
        rest = batch.without(rejected, proposal.known)
        check_rejected(rest, batch, rejected)
        again = self.propose(rest)
        stages = [*proposal.seconds, *(name for name in again.seconds if name not in proposal.seconds)]
        return replace(
            again,
            notes=tuple(dict.fromkeys([*proposal.notes, *again.notes])),
            seconds={name: proposal.seconds.get(name, 0.0) + again.seconds.get(name, 0.0) for name in stages},
        )

    def solve_without(self, entry: LedgerEntry, undone: frozenset[str], ledger: Ledger) -> Written:
        """What a batch writes without some of its new requests; the model is as before when this returns.

        Raises:
            NumericalError: the rest cannot be solved.
        """
        written = None
        if isinstance(self._editor, Resolves):
            written = self._editor.resolve(self._edited.model, entry, entry.kept_rows(undone), self._context)
        if written is None:
            written = self._propose_again(entry_without(entry, undone, Written()), ledger)
        check_written(self._edited.model, written, self._spec, self._edited.spec)
        return on_cpu(written)

    def _propose_again(self, entry: LedgerEntry, ledger: Ledger) -> Written:
        """Propose a batch with the targets that it had, on the model as it was when the batch came. What was undone
        since makes no difference, so the order of undoing does not matter."""
        earlier = ledger.history_before(entry.batch)
        try:
            self._edited.rebuild([past.written for past in earlier])
            self.recall(earlier)
            proposal = self._editor.propose(self._edited.model, entry.as_batch(), self._context)
        finally:
            self._edited.rebuild(ledger.active())
            self.recall(ledger.history())
        return scaled(proposal.written, entry.scale)

    def recall(self, history: Sequence[LedgerEntry]) -> None:
        """Tell the editor which batches are active, if it remembers them."""
        if isinstance(self._editor, Remembers):
            self._editor.recall(history)

    def absorb(self, entry: LedgerEntry) -> None:
        """Tell the editor which batch was just written, if it remembers batches."""
        if isinstance(self._editor, Remembers):
            self._editor.absorb(entry)
