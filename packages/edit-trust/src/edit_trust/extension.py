"""The extension: settles conflicts before a batch is computed, and judges its proposal before it is kept.

Its state is a function of the ledger: a resumed run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editcore import (
    AfterBatch,
    AfterSolve,
    AfterUndo,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
    EditEvidence,
    EditRequest,
    ExtensionContext,
    Proposal,
    Rejection,
    Rework,
    Verdict,
    hookimpl,
)
from editcore.runs import json_text, write_text

from edit_trust.closed_form import FactScore, reference_cost, score_facts
from edit_trust.conflicts import Active, settle
from edit_trust.guards import guarded
from edit_trust.hparams import TrustHParams
from edit_trust.measure import Baseline, Measurement, Probe
from edit_trust.search import split

if TYPE_CHECKING:
    from editcore import LedgerEntry

__all__ = ["RECORD_NAME", "TrustExtension"]

_log = logging.getLogger(__name__)

RECORD_NAME = "trust.json"
"""In the run directory: the held-out prompts and the text that batches are measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assessment:
    """The judgement of a proposal."""

    scores: Mapping[str, FactScore]
    """Scores of the new facts, by request id."""
    low: tuple[str, ...]
    """Ids of the facts that score below the threshold."""
    measured: Measurement | None
    failures: tuple[str, ...]
    """The limits that the proposal breaks, in words; empty if it passes."""

    def figures(self) -> dict[str, float]:
        """The smallest of each closed-form term and the measured figures, by name."""
        scores = [score.figures() for score in self.scores.values()]
        least = {
            f"least_{name}": min(figures[name] for figures in scores) for name in ("score", "gain", "preservation")
        }
        return {**least, **(self.measured.figures() if self.measured else {})}


class TrustExtension:
    """Judges every batch: it scores each new fact in closed form, measures the batch on trial, and leaves out
    the facts that fail or make the batch fail.

    Nothing is optimised twice: parts of a batch are solved again with the values already found.
    """

    def __init__(self, hparams: TrustHParams, context: ExtensionContext) -> None:
        self.hparams = hparams
        self._active: dict[tuple[str, str], Active] = {}
        self._costs: list[float] = []
        measures = hparams.trust_enable and hparams.trust_measure
        self._probe = Probe(hparams, context.plugins, seed=context.seed) if measures else None
        self._baseline: Baseline | None = None
        self._notes: list[str] = []

    @hookimpl
    def editcore_before_run(self, event: BeforeRun) -> None:
        """Note the active facts, and record in the run directory what batches are measured on."""
        self._rebuild(event.history)
        if self._probe is None:
            return
        self._probe.read_text(event.model)
        if event.directory is not None:
            record = {"heldout_prompts": self._probe.prompts, "text": self._probe.text}
            write_text(event.directory / RECORD_NAME, json_text(record, indent=2) + "\n")

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
        """Withdraw requests that contradict or repeat others."""
        self._baseline = None
        settled = settle(event.batch.requests, self._active, on_conflict=self.hparams.on_conflict)
        self._notes = settled.notes
        for note in settled.notes:
            _log.warning("batch %d: %s", event.batch.index, note)
        return BatchAddition(withdrawn=settled.withdrawn) if settled.withdrawn else None

    @hookimpl
    def editcore_after_solve(self, event: AfterSolve) -> Rework | None:
        """Make a proposed change smaller, if a guard is set."""
        return guarded(event.model, event.changes, self.hparams)

    @hookimpl
    def editcore_before_apply(self, event: BeforeApply) -> Verdict | None:
        """Judge a proposal: accept it, scale it, or say which facts must go."""
        if not self.hparams.trust_enable:
            return Verdict(action="accept", reason="; ".join(self._notes)) if self._notes else None
        assessment = self._assess(event, event.proposal, event.batch.new_requests)
        if not assessment.failures:
            return Verdict(action="accept", reason=self._noted("every limit is kept"), figures=assessment.figures())
        # An attachment has no scale.
        if self.hparams.trust_action == "scale" and event.proposal.attachment is None:
            scale = self.hparams.trust_scale
            scaled = self._assess(event, event.proposal, event.batch.new_requests, scale=scale)
            if not scaled.failures:
                reason = f"{_joined(assessment.failures)}; scaled by {scale:g}, every limit is kept"
                return Verdict(action="scale", reason=self._noted(reason), scale=scale, figures=scaled.figures())
        rejected = self._low(assessment) if assessment.low else self._harmful(event, assessment)
        return Verdict(
            action="accept", reason=_joined(assessment.failures), figures=assessment.figures(), rejected=rejected
        )

    @hookimpl
    def editcore_after_batch(self, event: AfterBatch) -> None:
        """Note the facts of the batch as active."""
        self._absorb(event.entry)

    @hookimpl
    def editcore_after_undo(self, event: AfterUndo) -> None:
        """Note the facts that are still active: those that are undone no longer conflict."""
        self._rebuild(event.history)

    def _noted(self, reason: str) -> str:
        """The reason, followed by the sentences about active facts that the batch replaces."""
        return "; ".join([reason, *self._notes])

    def _rebuild(self, history: Sequence[LedgerEntry]) -> None:
        self._active, self._costs = {}, []
        for entry in history:
            self._absorb(entry)

    def _absorb(self, entry: LedgerEntry) -> None:
        for request in entry.new_requests:
            self._active.pop(request.fact_key, None)  # so that it goes to the end, as the fact edited last
            self._active[request.fact_key] = Active(request=request, batch=entry.batch)
        for evidence in entry.evidence:
            if not evidence.replayed and "preservation_cost" in evidence.figures:
                self._costs.append(entry.scale**2 * evidence.figures["preservation_cost"])

    def _assess(
        self, event: BeforeApply, proposal: Proposal, new: Sequence[EditRequest], *, scale: float = 1.0
    ) -> _Assessment:
        """Judge a proposal on both levels. The second one costs more, and is left out where the first one fails."""
        hparams = self.hparams
        given = {evidence.request_id: evidence for evidence in proposal.evidence}
        evidence = [given.get(request.id, EditEvidence(request_id=request.id)) for request in new]
        # The reference is that of the unscaled change: scaling must not move what the change is compared with.
        reference = reference_cost([*self._costs, *(fact.figures.get("preservation_cost", 0.0) for fact in evidence)])
        scores = score_facts(
            evidence,
            reference=reference,
            weights=hparams.trust_weights,
            cost_ratio=hparams.trust_cost_ratio,
            scale=scale,
        )
        low = tuple(name for name, score in scores.items() if score.score < hparams.trust_threshold)
        failures = [f"{len(low)} of {len(scores)} facts score below {hparams.trust_threshold:g}"] if low else []
        measured = None
        if self._probe is not None and not low:
            if self._baseline is None:
                active = [fact.request for fact in self._active.values()]
                # Kept for the whole batch: it must not depend on which facts the search leaves out.
                self._baseline = self._probe.baseline(event.model, new, active, batch=event.batch.index)
            changes = {address: change.scaled(scale) for address, change in proposal.changes.items()}
            trial = event.trial(proposal, scale)
            measured = self._probe.measure(event.model, self._baseline, new, changes, trial)
            failures += measured.failures(hparams)
        return _Assessment(scores=scores, low=low, measured=measured, failures=tuple(failures))

    def _low(self, assessment: _Assessment) -> dict[str, Rejection]:
        """The facts that fail in closed form, each with a reason."""
        threshold = self.hparams.trust_threshold
        return {
            name: Rejection(
                reason=(
                    f"score {score.score:.2f} is below {threshold:g} (gain {score.gain:.2f}, preservation "
                    f"{score.preservation:.2f}: {score.cost_ratio:.3g} times the median cost)"
                ),
                figures=score.figures(),
            )
            for name, score in assessment.scores.items()
            if name in assessment.low
        }

    def _harmful(self, event: BeforeApply, assessment: _Assessment) -> dict[str, Rejection]:
        """The facts that make the batch fail when it is measured, each with a reason."""
        assert assessment.measured is not None
        unsaid = assessment.measured.unsaid
        new = {request.id: request for request in event.batch.new_requests}
        # The most suspect last: facts that the model does not say in spite of the change, and among them those that
        # score low.
        order = sorted(new, key=lambda name: (name in unsaid, -assessment.scores[name].score))

        def passes(kept: Sequence[str]) -> bool:
            part = event.without([name for name in new if name not in kept])
            requests = [request for name, request in new.items() if name in kept]
            measured = self._assess(event, part, requests).measured
            return measured is not None and not measured.failures(self.hparams)

        found = split(order, passes, looks=self.hparams.trust_looks)
        why = _joined(assessment.failures)
        reasons = dict.fromkeys(found.culprits, f"with it the batch fails ({why}), without it the rest passes")
        ended = f"the batch fails ({why}), and after {self.hparams.trust_looks} looks it was not cleared"
        reasons |= dict.fromkeys(found.unexamined, ended)
        return {
            name: Rejection(
                reason=reason, figures={**assessment.scores[name].figures(), **assessment.measured.figures()}
            )
            for name, reason in reasons.items()
        }


def _joined(failures: Sequence[str]) -> str:
    return ", ".join(failures)
