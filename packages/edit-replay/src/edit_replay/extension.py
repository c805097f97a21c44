"""The extension: adds earlier facts to each batch and keeps what the batch solved.

Its state is a function of the ledger and the model: a resumed run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import math
import pkgutil
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
    KnownTarget,
    PluginError,
    RunError,
    hookimpl,
)

from edit_replay.buffer import EditRecord, ReplayBuffer
from edit_replay.hparams import ReplayHParams
from edit_replay.strategies import Strategy

if TYPE_CHECKING:
    from editcore import LanguageModel
    from torch import Tensor

__all__ = ["STRATEGY_KIND", "ReplayExtension"]

STRATEGY_KIND = "replay.strategy"


class ReplayExtension:
    """Replays edited facts: a sample of the buffer joins each batch, with the values it was solved for.

    Nothing is optimised for a replayed fact. After each batch every kept fact is checked in closed form: how far the
    projection's output at its key is from its value. ``priority`` reads that.
    """

    def __init__(self, hparams: ReplayHParams, context: ExtensionContext) -> None:
        self.hparams = hparams
        self.context = context
        self._strategy = _load_strategy(hparams.replay_strategy, context)
        self.buffer = self._empty_buffer()

    @hookimpl
    def editcore_before_run(self, event: BeforeRun) -> None:
        """Rebuild the buffer from the batches that are already applied."""
        self._rebuild(event)

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
        """Add a sample of the facts that this batch does not edit anew."""
        batch = event.batch
        edited = {request.fact_key for request in batch.requests}
        candidates = [record for record in self.buffer.records if record.request.fact_key not in edited]
        # Exact: 0.55 · 100 is 55.00000000000001 in floating point.
        wanted = math.ceil(Decimal(str(self.hparams.replay_rate)) * batch.num_new)
        count = min(wanted, len(candidates))
        if count == 0:
            return None
        # Drawn from (seed, batch) and nothing earlier, so that a resumed run draws the same. The seed is a string
        # because that is hashed: nearby batches draw independently.
        rng = random.Random(f"replay:{self.context.seed}:{batch.index}")
        chosen = self._strategy(candidates, count, rng)
        _refuse_foreign(chosen, candidates, count, self.hparams.replay_strategy)
        return BatchAddition(
            requests=tuple(record.request for record in chosen),
            weights=(self.hparams.replay_weight,) * len(chosen),
            known={record.request.id: record.known for record in chosen},
        )

    @hookimpl
    def editcore_after_batch(self, event: AfterBatch) -> None:
        """Keep what the batch solved, and check what the model holds now."""
        self._absorb(event.batch.index, event.batch.requests, event.batch.num_new, event.proposal.known)
        self._check(event.model)

    @hookimpl
    def editcore_after_undo(self, event: AfterUndo) -> None:
        """Rebuild the buffer from what is active now: facts that are undone are no longer replayed."""
        self._rebuild(event)

    def statistics(self) -> dict[str, float | int | None]:
        """For results: the buffer's counts, and how well the model holds what is in it."""
        strengths = [record.strength for record in self.buffer.records if record.strength is not None]
        return {
            **asdict(self.buffer.statistics),
            "capacity": self.buffer.capacity,
            "mean_strength": sum(strengths) / len(strengths) if strengths else None,
            "least_strength": min(strengths, default=None),
        }

    def _empty_buffer(self) -> ReplayBuffer:
        return ReplayBuffer(self.hparams.replay_buffer_size, eviction=self.hparams.replay_eviction)

    def _rebuild(self, event: BeforeRun | AfterUndo) -> None:
        self.buffer = self._empty_buffer()
        for entry in event.history:
            self._absorb(entry.batch, entry.requests, entry.num_new, entry.known)
        self._check(event.model)

    def _absorb(
        self, batch: int, requests: Sequence[EditRequest], num_new: int, known: Mapping[str, KnownTarget]
    ) -> None:
        # Replayed facts first: the batch has used them, so under lru its own new facts must not push them out.
        for request in requests[num_new:]:
            record = self.buffer.get(request)  # None for what another extension added
            if record is not None:
                self.buffer.replayed(record, known[request.id].keys)
        for request in requests[:num_new]:
            self.buffer.store(request, known[request.id], batch=batch)

    @torch.inference_mode()
    def _check(self, model: LanguageModel) -> None:
        records = self.buffer.records
        rows: dict[str, list[int]] = defaultdict(list)
        for index, record in enumerate(records):
            for name in record.known.values:
                rows[name].append(index)
        strengths = torch.ones(len(records), dtype=torch.float64)
        for name, members in rows.items():
            held = _held(model, name, [records[index] for index in members])
            strengths[members] = torch.minimum(strengths[members], held)
        for record, strength in zip(records, strengths.tolist(), strict=True):
            self.buffer.checked(record, strength)


def _held(model: LanguageModel, name: str, records: Sequence[EditRecord]) -> Tensor:
    """``1 - ‖W k - v‖ / ‖v‖`` of each record at one weight, not below 0: ``[records]`` float64 on the CPU.

    Raises:
        RunError: a key or value does not fit the weight.
    """
    out_in = model.as_out_in(name, model.weight(name))  # [d_out, d_in]
    for record in records:
        key, value = record.known.keys[name], record.known.values[name]
        if (len(value), len(key)) != tuple(out_in.shape):
            raise RunError(
                f"replay: the stored key and value of '{record.request.text}' are {len(key)} and {len(value)} wide, "
                f"but {name} of {model.name} takes {out_in.shape[1]} and gives {out_in.shape[0]}: "
                "they come from another model. Start a new run."
            )
    keys = torch.stack([record.known.keys[name] for record in records])  # [records, d_in]
    values = torch.stack([record.known.values[name] for record in records])  # [records, d_out]
    projection = model.projection(model.layout.layer_of(name))
    found: Tensor = projection(keys.to(out_in)).to(values)  # the module itself, so that its bias and any adapter count
    missed: Tensor = (found - values).norm(dim=1) / values.norm(dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    return (1 - missed).clamp_min(0.0)


def _load_strategy(name: str, context: ExtensionContext) -> Strategy:
    spec = context.plugins.component(STRATEGY_KIND, name)
    try:
        strategy: Strategy = pkgutil.resolve_name(spec.target)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(f"The {STRATEGY_KIND} '{name}' cannot be loaded from '{spec.target}': {error}.") from error
    return strategy


def _refuse_foreign(chosen: Sequence[EditRecord], candidates: Sequence[EditRecord], count: int, name: str) -> None:
    offered = {id(record) for record in candidates}
    different = {id(record) for record in chosen}
    if len(different) != len(chosen) or not different <= offered or len(chosen) > count:
        raise PluginError(
            f"The {STRATEGY_KIND} '{name}' must return at most {count} different ones of the {len(candidates)} records "
            f"it is given; it returned {len(chosen)}, {len(different & offered)} of them different ones of those."
        )
