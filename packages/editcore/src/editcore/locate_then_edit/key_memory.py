"""The memory of a sequence of edits: the keys of all facts that are written, and the sums over them.

Both follow from the active batches of the ledger alone, so a resumed run has the same bits, and an undone fact is no
longer in the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore.second_moments.accumulator import Accumulator

if TYPE_CHECKING:
    from editcore.interfaces.history import LedgerEntry
    from editcore.second_moments.linalg import Metric

__all__ = ["FactKey", "KeyMemory"]

FactKey = tuple[str, str]
"""``EditRequest.fact_key``: requests that have it in common are about the same fact."""


@dataclass(slots=True)
class _Sum:
    """The sum at one weight, over the first ``absorbed`` batches."""

    accumulator: Accumulator
    moment_weight: float
    keys: dict[FactKey, Tensor] = field(default_factory=dict)
    """The key that each fact was solved with last, ``[d_in]``."""
    absorbed: int = 0


class KeyMemory:
    """Keys of the facts that a run has written and not undone.

    Args:
        weight: weight of each fact in the sum.
    """

    def __init__(self, *, weight: float) -> None:
        self.weight = weight
        self.ids: set[str] = set()
        """Ids of the requests whose keys are kept."""
        self._entries: list[LedgerEntry] = []
        self._sums: dict[str, _Sum] = {}

    def recall(self, history: Iterable[LedgerEntry]) -> None:
        """Forget everything, then keep the active batches, oldest first. Their tensors are read when first needed."""
        self._entries, self._sums, self.ids = [], {}, set()
        for entry in history:
            self.absorb(entry)

    def absorb(self, entry: LedgerEntry) -> None:
        """Keep one more batch."""
        self._entries.append(entry)
        self.ids.update(request.id for request in entry.requests)

    def moment_weight(self, layer: int) -> float | None:
        """w of the first active batch at a layer, so that all batches have one prior; ``None`` if there is none yet."""
        name = f"layer_{layer}_moment_weight"
        return next((entry.diagnostics[name] for entry in self._entries if name in entry.diagnostics), None)

    def sum_at(
        self, name: str, moment_weight: float, prior: Callable[[], Metric], *, rewritten: Sequence[FactKey]
    ) -> tuple[Metric, Metric]:
        """The prior S₀ of a weight, and S = S₀ + Σ kkᵀ over the facts in memory.

        Args:
            name: address of the weight.
            moment_weight: w, with which ``prior`` is made. With another one than before, the sum is computed anew.
            prior: makes S₀.
            rewritten: facts of the batch at hand. The batch gives them another value, so their keys do not count.
        """
        found = self._sums.get(name)
        if found is None or found.moment_weight != moment_weight:
            found = self._sums[name] = _Sum(Accumulator(prior()), moment_weight)
        for entry in self._entries[found.absorbed :]:
            self._add(found, name, entry)
        found.absorbed = len(self._entries)
        metric, gone = found.accumulator.metric, [found.keys[fact] for fact in rewritten if fact in found.keys]
        return found.accumulator.prior, metric.minus(*self._weighted(gone)) if gone else metric

    def _add(self, found: _Sum, name: str, entry: LedgerEntry) -> None:
        """Add the keys of a batch at one weight. A fact that was there before has its new key only."""
        keys = {
            request.fact_key: entry.known[request.id].keys[name]
            for request in entry.requests
            if request.id in entry.known and name in entry.known[request.id].keys
        }
        if not keys:
            return
        if replaced := [found.keys[fact] for fact in keys if fact in found.keys]:
            found.accumulator.downdate(*self._weighted(replaced))
        found.accumulator.update(*self._weighted(list(keys.values())))
        found.keys |= keys

    def _weighted(self, keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.stack(list(keys)).double(), torch.full((len(keys),), self.weight, dtype=torch.float64)
