"""Splits one large computation into shards for the workers of an executor.

Shards have a fixed size and are merged in their order. So the result does not depend on the number of workers, on their
speed, or on whether one was lost.

Shapes: ``n`` sequences of ``seq`` tokens each, ``d_in`` the width of a projection's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.protocols import Executor
from editcore.models import LanguageModel
from editcore.models.options import LoadOptions
from editcore.plugins.registry import Plugins
from editcore.second_moments.statistics import second_moments

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModelSource", "sharded_moments"]

T = TypeVar("T")
R = TypeVar("R")

SEQUENCES = 64
"""Sequences in a shard of second moments. It is a multiple of the sequences that go through the model together, so that
the same products are summed as without shards."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """How every worker gets the same unedited model."""

    name: str
    """A catalogue name, a folder or a hub id."""
    device: str = "cpu"
    """The device, as torch names it."""
    dtype: str = "float32"
    """One of :data:`editcore.models.DTYPES`."""

    def load(self) -> LanguageModel:
        """Load the model.

        Raises:
            ModelError: the model cannot be loaded.
        """
        return LanguageModel.load(
            self.name,
            LoadOptions(device=self.device, dtype=self.dtype),
            families=Plugins.load().family_paths(),
        )


def sharded_moments(
    source: ModelSource,
    sequences: Tensor,
    layers: Sequence[int],
    executor: Executor,
    *,
    fingerprint: str,
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """C = E[k kᵀ] of each layer, ``[d_in, d_in]`` float64, over all tokens of ``sequences [n, seq]``.

    The result is that of :func:`editcore.second_moments.statistics.second_moments`, up to the order of float64 sums.

    Args:
        fingerprint: fingerprint of the model. A worker that loads another model refuses.

    Raises:
        RunError: a shard failed.
    """
    shards = [
        _MomentShard(source=source, fingerprint=fingerprint, layers=tuple(layers), sequences=rows.cpu().numpy())
        for rows in torch.split(sequences, SEQUENCES)
    ]
    totals: dict[int, Tensor] = {}
    for found in _in_order(executor, _Moments, shards, "second moments", progress, accelerator=source.device != "cpu"):
        for layer, total in found.items():
            totals[layer] = totals[layer] + torch.from_numpy(total) if layer in totals else torch.from_numpy(total)
    return {layer: total / sequences.numel() for layer, total in totals.items()}


def _in_order(
    executor: Executor,
    make: Callable[[], Callable[[T], R]],
    items: Sequence[T],
    what: str,
    progress: Progress,
    *,
    accelerator: bool = False,
) -> list[R]:
    values: dict[int, Any] = {}
    try:
        with progress.task(what, len(items)) as advance:
            for outcome in executor.map(make, items, started=lambda _index: None, accelerator=accelerator):
                if outcome.failed:
                    raise RunError(f"A part of the work ({what}) failed. {outcome.kind}: {outcome.error}")
                values[outcome.index] = outcome.value
                advance(1)
    finally:
        executor.close()
    return [values[index] for index in range(len(items))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _MomentShard:
    source: ModelSource
    fingerprint: str
    layers: tuple[int, ...]
    sequences: np.ndarray[Any, Any]


class _Moments:
    """Sums of k kᵀ, with one model in memory."""

    def __init__(self) -> None:
        self._models: dict[ModelSource, LanguageModel] = {}

    def __call__(self, shard: _MomentShard) -> Mapping[int, np.ndarray[Any, Any]]:
        if shard.source not in self._models:
            self._models = {shard.source: shard.source.load()}
        model = self._models[shard.source]
        if model.base_fingerprint != shard.fingerprint:
            raise RunError(
                f"'{shard.source.name}' is another model on the worker: its weights have the fingerprint "
                f"{model.base_fingerprint[:12]}, not {shard.fingerprint[:12]}."
            )
        sequences = torch.from_numpy(shard.sequences)
        moments = second_moments(model, sequences, shard.layers)
        return {layer: (moment * sequences.numel()).cpu().numpy() for layer, moment in moments.items()}
