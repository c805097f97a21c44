"""The extension: adds earlier facts to each batch, and keeps the facts of the batch for later ones.

Its state is a function of the ledger and the model: a resumed run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import TYPE_CHECKING

import torch
from editcore import (
    AfterBatch,
    AfterUndo,
    BatchAddition,
    BeforeBatch,
    BeforeRun,
    EditRequest,
    ExtensionContext,
    HeldKey,
    KnownTarget,
    PluginError,
    RunError,
    hookimpl,
)
from editcore.evaluation import score_targets
from editcore.models import project
from editcore.plugins import resolve

from edit_replay.buffer import EditRecord, ReplayBuffer
from edit_replay.hparams import ReplayHParams
from edit_replay.strategies import Strategy

if TYPE_CHECKING:
    from editcore import LanguageModel, LedgerEntry
    from editcore.evaluation import TargetScore
    from torch import Tensor

__all__ = ["STRATEGY_KIND", "ReplayExtension"]

STRATEGY_KIND = "replay.strategy"

_NOTHING = KnownTarget(keys={}, values={})


class ReplayExtension:
    """Replays edited facts. A sample of the buffer joins each batch with the values that its facts were solved for; the
    keys of the other facts go to the editor, whose change should leave them alone.

    A replayed fact is not optimised again, unless the model no longer says it although its value holds. After each
    batch every kept fact is checked, in closed form (how far the projection's output at its key is from its value) or
    on the model. The strategy ``priority`` uses these checks.
    """

    def __init__(self, hparams: ReplayHParams, context: ExtensionContext) -> None:
        self.hparams = hparams
        self.context = context
        self._strategy: Strategy = resolve(context.plugins.component(STRATEGY_KIND, hparams.replay_strategy).target)
        editor_can = context.capabilities.uses_held
        self._rate = hparams.rate(editor_can=editor_can)
        self._holds = hparams.holds_keys(editor_can=editor_can)
        self.buffer = self._empty_buffer()

    @hookimpl
    def editcore_before_run(self, event: BeforeRun) -> None:
        """Rebuild the buffer from the batches that are already applied."""
        self._rebuild(event)

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
        """Add a sample of the facts that this batch does not edit anew, and hold the others."""
        batch = event.batch
        edited = {self.buffer.key(request) for request in batch.requests}
        candidates = [record for record in self.buffer.records if self.buffer.key(record.request) not in edited]
        chosen = (
            self._choose(candidates, batch.index, batch.num_new) if self.hparams.replay_mode != "statistics" else []
        )
        lost = self._lost(event.model, candidates, but=chosen, batch=batch.index, num_new=batch.num_new)
        stale = self._stale(event.model, chosen) | {record.order for record in lost}
        chosen = [*chosen, *lost]
        held = []
        if self._holds:
            solved_for = {record.order for record in chosen}
            held = [key for record in candidates if record.order not in solved_for for key in self._held_keys(record)]
        if not chosen and not held:
            return None
        return BatchAddition(
            requests=tuple(record.request for record in chosen),
            weights=(self.hparams.replay_weight,) * len(chosen),
            known={
                record.request.id: record.known
                for record in chosen
                if record.known.values and record.order not in stale
            },
            held=held,
        )

    @hookimpl
    def editcore_after_batch(self, event: AfterBatch) -> None:
        """Keep the facts of the batch, and check how well the model holds all kept facts."""
        self._absorb(event.entry)
        self._check(event.model)

    @hookimpl
    def editcore_after_undo(self, event: AfterUndo) -> None:
        """Rebuild the buffer from the facts that are still active, so that undone facts are no longer replayed."""
        self._rebuild(event)

    def statistics(self) -> dict[str, float | int | None]:
        """For results: the buffer's counts, and how well the model holds what is in it."""
        records = self.buffer.records
        strengths = [record.strength for record in records if record.strength is not None]
        successes = [record.success for record in records if record.success is not None]
        return {
            **asdict(self.buffer.statistics),
            "capacity": self.buffer.capacity,
            "failed": sum(record.failed for record in records),
            "mean_strength": sum(strengths) / len(strengths) if strengths else None,
            "least_strength": min(strengths, default=None),
            "mean_success": sum(successes) / len(successes) if successes else None,
        }

    # What joins a batch

    def _choose(self, candidates: Sequence[EditRecord], batch: int, num_new: int) -> list[EditRecord]:
        count = min(self._wanted(num_new, len(candidates)), len(candidates))
        if count == 0:
            return []
        # Drawn from (seed, batch) and nothing earlier, so that a resumed run draws the same. The seed is a string
        # because that is hashed: nearby batches draw independently.
        rng = random.Random(f"replay:{self.context.seed}:{batch}")
        chosen = list(self._strategy(candidates, count, rng))
        _refuse_foreign(chosen, candidates, count, self.hparams.replay_strategy)
        return chosen

    def _wanted(self, num_new: int, kept: int) -> int:
        rate = Decimal(str(self._rate))  # exact; in floating point 0.55 · 100 is 55.00000000000001
        if not self.hparams.replay_adaptive:
            return math.ceil(rate * num_new)
        wanted = math.ceil(rate * Decimal(num_new * kept).sqrt())
        return max(self.hparams.adaptive_min, min(wanted, self.hparams.adaptive_max))

    def _stale(self, model: LanguageModel, chosen: Sequence[EditRecord]) -> set[int]:
        """Records whose value holds, but no longer makes the model say the target, by ``order``.

        A record whose value has drifted is not among them: it is solved for the same value again, and only a value
        that holds can be found stale.
        """
        if self.hparams.replay_refresh == 0:
            return set()
        held = [
            record
            for record in chosen
            if record.strength is not None and 1 - record.strength <= self.hparams.replay_drift
        ]
        successes = _successes(model, held)
        return {
            record.order
            for record, success in zip(held, successes, strict=True)
            if success < self.hparams.replay_refresh * (1.0 if record.reached is None else record.reached)
        }

    def _lost(
        self,
        model: LanguageModel,
        candidates: Sequence[EditRecord],
        *,
        but: Sequence[EditRecord],
        batch: int,
        num_new: int,
    ) -> list[EditRecord]:
        """Those of the asked facts that the model does not say. Every fact is asked in turn."""
        count = self.hparams.asked(num_new)
        if self.hparams.replay_mode == "statistics" or count == 0 or not candidates:
            return []
        turns = math.ceil(len(candidates) / count)
        chosen = {record.order for record in but}
        asked = [record for record in candidates[batch % turns :: turns] if record.order not in chosen]
        scores = _scores(model, asked)
        return [record for record, score in zip(asked, scores, strict=True) if not score.correct]

    def _held_keys(self, record: EditRecord) -> list[HeldKey]:
        """A held key for each batch that has keys of the fact. There are several only if layers are drawn at random."""
        keys: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, key in record.known.keys.items():
            keys[record.sources[name]][name] = key
        weight = self.hparams.replay_statistics_weight
        return [
            HeldKey(batch=batch, request_id=record.request.id, keys=found, weight=weight)
            for batch, found in keys.items()
        ]

    # What is kept

    def _empty_buffer(self) -> ReplayBuffer:
        return ReplayBuffer(
            self.hparams.replay_buffer_size,
            eviction=self.hparams.replay_eviction,
            duplicates=self.hparams.replay_duplicates,
        )

    def _rebuild(self, event: BeforeRun | AfterUndo) -> None:
        self.buffer = self._empty_buffer()
        for entry in event.history:
            self._absorb(entry)
        self._check(event.model)

    def _absorb(self, entry: LedgerEntry) -> None:
        # Replayed facts come first: they were used in this batch, so with lru its new facts must not push them out.
        fresh = [evidence for evidence in entry.evidence if "target_loss" in evidence.figures]
        optimised = {evidence.request_id: evidence.figures.get("target_probability") for evidence in fresh}
        for request in entry.requests[entry.num_new :]:
            record = self.buffer.get(request)  # None for what another extension added
            if record is not None:
                known = entry.known.get(request.id, _NOTHING)
                self.buffer.replayed(
                    record,
                    known,
                    batch=entry.batch,
                    refreshed=request.id in optimised,
                    reached=optimised.get(request.id),
                )
        for request in entry.new_requests:
            known = entry.known.get(request.id, _NOTHING)
            self.buffer.store(
                request,
                known,
                batch=entry.batch,
                importance=self._importance(request),
                reached=optimised.get(request.id),
            )

    def _importance(self, request: EditRequest) -> float:
        return math.prod(self.hparams.replay_importance.get(tag, 1.0) for tag in request.tags)

    def _check(self, model: LanguageModel) -> None:
        self.buffer.load()
        records = self.buffer.records
        rows: dict[str, list[int]] = defaultdict(list)
        for index, record in enumerate(records):
            for name in record.known.values:
                rows[name].append(index)
        strengths: dict[int, float] = {}
        for name, members in rows.items():
            found = _strengths(model, name, [records[index] for index in members])
            for index, strength in zip(members, found, strict=True):
                strengths[index] = min(strength, strengths.get(index, 1.0))
        successes: Sequence[float | None] = [None] * len(records)
        if self.hparams.replay_check == "model" and records:
            successes = _successes(model, records)
        for index, (record, success) in enumerate(zip(records, successes, strict=True)):
            self.buffer.checked(record, strength=strengths.get(index), success=success)


def _strengths(model: LanguageModel, name: str, records: Sequence[EditRecord]) -> list[float]:
    """``1 - ‖W k - v‖ / ‖v‖`` of each record at one weight, not below 0.

    Raises:
        RunError: a key or value does not fit the weight.
    """
    d_out, d_in = model.as_out_in(name, model.weight(name)).shape
    for record in records:
        key, value = record.known.keys[name], record.known.values[name]
        if (len(value), len(key)) != (d_out, d_in):
            raise RunError(
                f"replay: the stored key and value of '{record.request.text}' are {len(key)} and {len(value)} wide, "
                f"but {name} of {model.name} takes {d_in} and gives {d_out}: "
                "they come from another model. Start a new run."
            )
    keys = torch.stack([record.known.keys[name] for record in records])  # [records, d_in]
    values = torch.stack([record.known.values[name] for record in records])  # [records, d_out]
    found = project(model, name, keys)
    missed = (found - values).norm(dim=1) / values.norm(dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    strengths: list[float] = (1 - missed).clamp_min(0.0).tolist()
    return strengths


def _successes(model: LanguageModel, records: Sequence[EditRecord]) -> list[float]:
    """Probability per target token, exp(−NLL), that the model gives the target of each record."""
    return [math.exp(-score.nll) for score in _scores(model, records)]


def _scores(model: LanguageModel, records: Sequence[EditRecord]) -> list[TargetScore]:
    requests = [record.request for record in records]
    return score_targets(
        model,
        [request.text for request in requests],
        [request.target_new for request in requests],
        joins=[request.join for request in requests],
    )


def _refuse_foreign(chosen: Sequence[EditRecord], candidates: Sequence[EditRecord], count: int, name: str) -> None:
    offered = {id(record) for record in candidates}
    different = {id(record) for record in chosen}
    if len(different) != len(chosen) or not different <= offered or len(chosen) > count:
        raise PluginError(
            f"The {STRATEGY_KIND} '{name}' must return at most {count} different ones of the {len(candidates)} records "
            f"it is given; it returned {len(chosen)}, {len(different & offered)} of them different ones of those."
        )
