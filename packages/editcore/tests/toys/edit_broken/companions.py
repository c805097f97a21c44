"""Extensions: one that keeps the contract, and ones that each break a clause."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import torch
from editcore import (
    AfterBatch,
    AfterEvaluation,
    AfterUndo,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
    EditRequest,
    ExtensionContext,
    HeldKey,
    LedgerEntry,
    Rejection,
    Verdict,
    hookimpl,
)

from edit_broken.hparams import CompanionHParams


class Honest:
    """Replays the oldest fact, holds the key of the newest one, and counts what is active."""

    def __init__(self, hparams: CompanionHParams, context: ExtensionContext) -> None:
        self.hparams, self.context = hparams, context
        self.entries: list[LedgerEntry] = []

    @hookimpl
    def editcore_before_run(self, event: BeforeRun) -> None:
        self.entries = list(event.history)

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
        if not self.entries:
            return None
        oldest, newest = self.entries[0], self.entries[-1]
        request, last = oldest.new_requests[0], newest.new_requests[-1]
        held = HeldKey(batch=newest.batch, request_id=last.id, keys=newest.known[last.id].keys, weight=0.01)
        return BatchAddition(
            requests=(request,), weights=(self.hparams.weight,), known={request.id: oldest.known[request.id]},
            held=(held,),
        )  # fmt: skip

    @hookimpl
    def editcore_before_apply(self, event: BeforeApply) -> Verdict:
        return Verdict(action="accept", reason="fine", figures={"active": float(len(self.entries))})

    @hookimpl
    def editcore_after_batch(self, event: AfterBatch) -> None:
        self.entries.append(event.entry)

    @hookimpl
    def editcore_after_undo(self, event: AfterUndo) -> None:
        self.entries = list(event.history)

    @hookimpl
    def editcore_after_evaluation(self, event: AfterEvaluation) -> None: ...

    def statistics(self) -> Mapping[str, float | int | None]:
        return {"active": len(self.entries), "mean_size": None}


class Settling(Honest):
    """Keeps the first of two requests for one fact."""

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
        first: dict[tuple[str, str], EditRequest] = {}
        for request in event.batch.requests:
            first.setdefault(request.fact_key, request)
        again = [request for request in event.batch.requests if first[request.fact_key] != request]
        return BatchAddition(withdrawn={request.id: Rejection(reason="it repeats another") for request in again})


class Unmarked(Honest):
    """Has a hook that is never called."""

    def editcore_after_run(self) -> None: ...


class Leaky(Honest):
    """Changes the embedding of a token that no test reads."""

    @hookimpl
    def editcore_after_evaluation(self, event: AfterEvaluation) -> None:
        with torch.no_grad():
            event.model.hf.get_input_embeddings().weight[-1] += 1


class Shouting(Honest):
    """Has a statistic whose name is not that of one."""

    def statistics(self) -> Mapping[str, float | int | None]:
        return {"Active!": len(self.entries)}


class Inexact(Honest):
    """Has a statistic that is no number."""

    def statistics(self) -> Mapping[str, float | int | None]:
        return {"active": torch.tensor(len(self.entries))}  # type: ignore[dict-item]


class Inventing(Honest):
    """Replays what was never edited."""

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition:
        request = EditRequest(subject="Nina Simone", prompt="{} was born in", target_new="Rome", id="invented")
        return BatchAddition(requests=(request,), weights=(1.0,))


class Random(Honest):
    """Draws from the process's generator."""

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
        added = super().editcore_before_batch(event)
        return added and replace(added, weights=(0.5 + random.random(),))


class Measured(Honest):
    """Lets evaluations decide."""

    seen = 0

    @hookimpl
    def editcore_after_evaluation(self, event: AfterEvaluation) -> None:
        self.seen += 1

    @hookimpl
    def editcore_before_apply(self, event: BeforeApply) -> Verdict:
        return Verdict(action="accept", reason="fine", figures={"evaluations": float(self.seen)})


class Deaf(Honest):
    """Does not hear of undone edits."""

    @hookimpl
    def editcore_after_undo(self, event: AfterUndo) -> None:
        if event.redone:
            self.entries = list(event.history)


class Final(Honest):
    """Does not hear of redone edits."""

    @hookimpl
    def editcore_after_undo(self, event: AfterUndo) -> None:
        if event.undone:
            self.entries = list(event.history)


class Newborn(Honest):
    """Knows nothing of what is active when a session begins."""

    @hookimpl
    def editcore_before_run(self, event: BeforeRun) -> None: ...


class Counting(Honest):
    """Counts what it was asked, whatever became of it."""

    asked = 0

    @hookimpl
    def editcore_before_apply(self, event: BeforeApply) -> Verdict:
        self.asked += 1
        return super().editcore_before_apply(event)

    def statistics(self) -> Mapping[str, float | int | None]:
        return {"asked": self.asked}
