"""The toys themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from editcore import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    Attachment,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
    Changes,
    DenseDelta,
    EditBatch,
    EditContext,
    EvaluationContext,
    ExtensionContext,
    FactoredDelta,
    FactRecord,
    LanguageModel,
    LedgerEntry,
    NumericalError,
    Observation,
    Proposal,
    Rejection,
    Verdict,
    hookimpl,
)
from editcore.locate_then_edit import LocateThenEdit
from editcore.runs.backends import RawBackend

from edit_toy.hparams import GateHParams, HalfHParams, ToyHParams

CALLS: list[tuple[str, str, Any]] = []
"""What the recording extensions were told: name, hook, a detail. Emptied by the fixture that offers the toys."""


class ToyEditor(LocateThenEdit):
    """Least squares, and the mistakes that its hyperparameters ask for."""

    name = "toy"
    hparams: ToyHParams

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        if batch.index == self.hparams.fails_at:
            raise NumericalError(f"Batch {batch.index} cannot be solved.")
        return _spoilt(super().propose(model, batch, context), self.hparams.spoils)


class Remembering(ToyEditor):
    """Notes what it is told of the past, and keeps the number of its batches."""

    def recall(self, history: Sequence[LedgerEntry]) -> None:
        CALLS.append(("memory", "recall", [entry.batch for entry in history]))
        self.seen = len(history)

    def absorb(self, entry: LedgerEntry) -> None:
        CALLS.append(("memory", "absorb", entry.batch))
        self.seen += 1

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        CALLS.append(("memory", "propose", batch.index))
        proposal = super().propose(model, batch, context)
        return replace(proposal, memory={"seen": torch.tensor(self.seen)})


def _spoilt(proposal: Proposal, how: str | None) -> Proposal:
    [(name, delta)] = proposal.changes.items()
    assert isinstance(delta, FactoredDelta)
    if how == "name":
        return replace(proposal, changes={"nowhere.weight": delta})
    if how == "shape":
        return replace(proposal, changes={name: FactoredDelta(delta.right.T, delta.left.T)})
    if how == "nan":
        return replace(proposal, changes={name: FactoredDelta(delta.left * math.nan, delta.right)})
    if how == "memory":  # one tensor for all facts
        shared = next(iter(proposal.known.values()))
        return replace(proposal, known=dict.fromkeys(proposal.known, shared))
    if how == "dense":
        return replace(proposal, changes={name: DenseDelta(delta.dense())})
    if how == "nothing":
        return replace(proposal, changes={})
    if how == "kept":
        return replace(proposal, memory={"sum": torch.tensor([1.0, math.nan])})
    if how in ("beside", "fields"):  # a set is nothing that JSON has
        text = ", ".join(figure.request_id for figure in proposal.evidence)
        beside = Attachment(kind="toy-preface", fields={"text": text if how == "beside" else {text}})
        return replace(proposal, attachment=beside)
    return proposal


class HalfBackend:
    """Raw, with a factor on every change."""

    def __init__(self, hparams: HalfHParams) -> None:
        self._raw, self._strength = RawBackend(), hparams.strength

    def open(self, model: LanguageModel) -> None:
        self._raw.open(model)

    def apply(self, changes: Changes) -> None:
        self._raw.apply(self._scaled(changes))

    def rebuild(self, active: Sequence[Changes]) -> None:
        self._raw.rebuild([self._scaled(changes) for changes in active])

    def trial(self, changes: Changes) -> AbstractContextManager[None]:
        return self._raw.trial(self._scaled(changes))

    def _scaled(self, changes: Changes) -> Changes:
        return {address: change.scaled(self._strength) for address, change in changes.items()}


class Dead:
    """Cannot be made."""

    def __init__(self, *_arguments: object) -> None:
        raise ZeroDivisionError("no luck")


class _Recorder:
    name = ""

    def __init__(self, _hparams: None, _context: ExtensionContext) -> None:
        self.evaluations: list[AfterEvaluation] = []

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
        self.evaluations.append(event)

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
            withdrawn={name: Rejection(reason="not today") for name in self.hparams.withdraws if name in present}
        )

    @hookimpl
    def editcore_before_apply(self, event: BeforeApply) -> Verdict | None:
        self.judged += 1
        present = {request.id for request in event.batch.new_requests}
        self.seen.append(sorted(present))
        if self.hparams.rejects:
            out = [name for name in self.hparams.rejects if name in present or name == "nobody"][:1]
            rejected = {name: Rejection(reason="unwanted", figures={"harm": 2.0}) for name in out}
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
    """Asks nothing: says that every edited prompt is won, and how long it is."""

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        found = []
        for record in records:
            asked = {"request_id": record.request.id, "prompt": record.request.text}
            found.append(Observation(metric="won", value=1.0, **asked))
            found.append(Observation(metric="length", value=float(len(record.request.text)), **asked))
        return found


class Lengths(Rewrites):
    """Of what that one sees the lengths alone, which nothing can be decided by."""

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        return [
            observation for observation in super().evaluate(model, records, context) if observation.metric == "length"
        ]
