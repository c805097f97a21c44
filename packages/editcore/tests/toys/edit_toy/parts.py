"""The toys themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from editcore import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
    EditBatch,
    EditContext,
    ExtensionContext,
    FactoredDelta,
    FactRecord,
    LanguageModel,
    NumericalError,
    Progress,
    Proposal,
    Rejection,
    Verdict,
    hookimpl,
)
from editcore.evaluation import CounterFactEvaluator, PromptScore
from editcore.interfaces.progress import silent
from editcore.locate_then_edit.editor import prepare, propose
from editcore.runs.backends import RawBackend
from editcore.second_moments.linalg import solve_update

from edit_toy.hparams import GateHParams, HalfHParams, ToyHParams

CALLS: list[tuple[str, str, Any]] = []
"""What the recording extensions were told: name, hook, a detail. Emptied by the fixture that offers the toys."""


class ToyEditor:
    """Least squares, and the mistakes that its hyperparameters ask for."""

    def __init__(self, hparams: ToyHParams) -> None:
        self.hparams = hparams

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        self.prepared = prepare(model, self.hparams, context, owner="toy")
        return {"context_templates": list(self.prepared.templates)}

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        if batch.index == self.hparams.fails_at:
            raise NumericalError(f"Batch {batch.index} cannot be solved.")
        proposal = propose(
            model,
            batch,
            context,
            hparams=self.hparams,
            prepared=self.prepared,
            solve=lambda keys, residuals, metric, weights: solve_update(keys, residuals, metric),
            ridge=0.0,
        )
        return _spoilt(proposal, self.hparams.spoils)


def _spoilt(proposal: Proposal, how: str | None) -> Proposal:
    [(name, delta)] = proposal.changes.items()
    if how == "name":
        return replace(proposal, deltas={"nowhere.weight": delta})
    if how == "shape":
        return replace(proposal, deltas={name: FactoredDelta(delta.right.T, delta.left.T)})
    if how == "nan":
        return replace(proposal, deltas={name: FactoredDelta(delta.left * math.nan, delta.right)})
    if how == "memory":  # one tensor for all facts
        shared = next(iter(proposal.known.values()))
        return replace(proposal, known=dict.fromkeys(proposal.known, shared))
    return proposal


class HalfBackend:
    """Raw, with a factor on every delta."""

    def __init__(self, hparams: HalfHParams) -> None:
        self._raw, self._strength = RawBackend(), hparams.strength

    def open(self, model: LanguageModel) -> None:
        self._raw.open(model)

    def apply(self, deltas: Mapping[str, FactoredDelta]) -> None:
        self._raw.apply(self._scaled(deltas))

    def rebuild(self, active: Sequence[Mapping[str, FactoredDelta]]) -> None:
        self._raw.rebuild([self._scaled(deltas) for deltas in active])

    def _scaled(self, deltas: Mapping[str, FactoredDelta]) -> Mapping[str, FactoredDelta]:
        return {name: FactoredDelta(self._strength * delta.left, delta.right) for name, delta in deltas.items()}


class Dead:
    """Cannot be made."""

    def __init__(self, *_arguments: object) -> None:
        raise ZeroDivisionError("no luck")


class _Recorder:
    name = ""

    def __init__(self, _hparams: None, _context: ExtensionContext) -> None: ...

    @hookimpl
    def editcore_before_run(self, event: BeforeRun) -> None:
        CALLS.append((self.name, "before_run", len(event.history)))

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> None:
        CALLS.append((self.name, "before_batch", event.batch.index))

    @hookimpl
    def editcore_before_apply(self, event: BeforeApply) -> Verdict:
        CALLS.append((self.name, "before_apply", event.batch.index))
        return Verdict(action="accept", reason="fine", figures={"checked": 1.0})

    @hookimpl
    def editcore_after_batch(self, event: AfterBatch) -> None:
        CALLS.append((self.name, "after_batch", event.entry.batch))

    @hookimpl
    def editcore_after_evaluation(self, event: AfterEvaluation) -> None:
        CALLS.append((self.name, "after_evaluation", event.phase))

    @hookimpl
    def editcore_after_run(self, event: AfterRun) -> None:
        CALLS.append((self.name, "after_run", event.num_edits))


class First(_Recorder):
    name = "first"


class Second(_Recorder):
    name = "second"


class Gate:
    """Objects to one batch."""

    def __init__(self, hparams: GateHParams, _context: ExtensionContext) -> None:
        self.hparams = hparams
        self.judged = 0
        self.seen: list[list[str]] = []

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition:
        present = {request.id for request in event.batch.new_requests} | {"nobody"}
        return BatchAddition(
            withdrawn={one: Rejection(reason="not today") for one in self.hparams.withdraws if one in present}
        )

    @hookimpl
    def editcore_before_apply(self, event: BeforeApply) -> Verdict | None:
        self.judged += 1
        present = {request.id for request in event.batch.new_requests}
        self.seen.append(sorted(present))
        if self.hparams.rejects:
            out = [one for one in self.hparams.rejects if one in present or one == "nobody"][:1]
            rejected = {one: Rejection(reason="unwanted", figures={"harm": 2.0}) for one in out}
            return Verdict(action="accept", reason="fine", rejected=rejected)
        if event.batch.index != self.hparams.batch:
            return None
        figures = {"oddness": 0.75, "ratio": math.inf}
        action: Any = self.hparams.action
        return Verdict(action=action, reason="it looks odd", scale=self.hparams.scale, figures=figures)

    def statistics(self) -> dict[str, float | int | None]:
        return {"judged": self.judged, "mean": math.nan}


class Miscounting:
    """Answers with what no summary can hold."""

    def __init__(self, *_arguments: object) -> None: ...

    def statistics(self) -> dict[str, Any]:
        return {"tensor": torch.zeros(1)}


class Rewrites:
    """Asks the edited prompts only, and says that the new object has won."""

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], *, progress: Progress = silent
    ) -> list[PromptScore]:
        asked = [record.model_copy(update={"paraphrase_prompts": (), "neighborhood_prompts": ()}) for record in records]
        found = CounterFactEvaluator().evaluate(model, asked, progress=progress)
        return [replace(score, success=True) for score in found]
