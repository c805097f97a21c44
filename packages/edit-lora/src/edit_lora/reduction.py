"""From the active changes of one projection to the adapter that stands for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from editcore import FactoredDelta, NumericalError
from editcore.second_moments import Metric
from torch import Tensor

from edit_lora.factors import balanced, dual_keys, energy, join, project, refine, residual, strongest_terms
from edit_lora.hparams import LoraHParams

__all__ = ["Reduction", "reduce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """What an adapter keeps of the active changes at one projection."""

    delta: FactoredDelta
    """The change that the adapter makes, before ``lora_scale``; float64, balanced."""
    exact_rank: int
    """Rank of the factors of the exact change."""
    kept_frobenius: float = 1.0
    """1 − ‖Δ − BA‖² / ‖Δ‖²."""
    kept_weighted: float = 1.0
    """1 − ‖(Δ − BA) C^½‖² / ‖Δ C^½‖²: of the mean squared change of the projection's output on ordinary text."""
    kept_keys: float = 1.0
    """1 − ‖(Δ − BA) Kᵀ‖² / ‖ΔKᵀ‖², over the keys of the edits (:func:`edit_lora.factors.dual_keys`)."""
    fell_back: bool = False
    """True if the cut left too much out, and ``delta`` is the exact change after all."""

    @property
    def whole(self) -> bool:
        """True if nothing was cut."""
        return self.delta.rank == self.exact_rank


def reduce(
    deltas: Sequence[FactoredDelta], hparams: LoraHParams, metric: Callable[[], Metric], *, name: str
) -> Reduction:
    """The adapter for the sum of ``deltas``: exact where their rank allows it, else cut as ``hparams`` say.

    A function of its arguments alone: equal deltas give equal bits.

    Args:
        metric: gives the second moment of the projection's inputs; asked only when there is something to cut.

    Raises:
        NumericalError: the cut leaves more than ``lora_residual_threshold`` and no fallback is allowed.
    """
    exact = join(deltas)
    if hparams.lora_rank is None or exact.rank <= hparams.lora_rank:
        return Reduction(delta=balanced(exact), exact_rank=exact.rank)
    moment = metric().to(exact.left.device)
    priced = moment.factor[0] if hparams.lora_criterion == "weighted" else None
    cut = (project if hparams.lora_use_svd else strongest_terms)(exact, hparams.lora_rank, priced)
    keys = torch.cat([dual_keys(delta.right.double(), moment.matrix) for delta in deltas])
    if hparams.lora_fit_steps:
        cut = refine(exact, cut, keys, hparams.lora_fit_steps, priced)
    found = Reduction(
        delta=balanced(cut),
        exact_rank=exact.rank,
        kept_frobenius=_kept(exact, cut),
        kept_weighted=_kept(exact, cut, moment.factor[0]),
        kept_keys=_kept(exact, cut, keys.T),
    )
    kept = found.kept_weighted if priced is not None else found.kept_frobenius
    left_out = sqrt(max(1.0 - kept, 0.0))
    if hparams.lora_residual_threshold is None or left_out <= hparams.lora_residual_threshold:
        return found
    if hparams.allow_fallback:
        return Reduction(delta=balanced(exact), exact_rank=exact.rank, fell_back=True)
    raise NumericalError(
        f"lora: rank {hparams.lora_rank} leaves out {left_out:.3g} of the edits at {name}, in units of their own size "
        f"({hparams.lora_criterion}); lora_residual_threshold is {hparams.lora_residual_threshold:g}. Raise lora_rank "
        f"(the edits have rank {exact.rank}) or the threshold, or set allow_fallback=true."
    )


def _kept(exact: FactoredDelta, cut: FactoredDelta, view: Tensor | None = None) -> float:
    whole = energy(exact, view)
    return 1.0 - energy(residual(exact, cut), view) / whole if whole > 0 else 1.0
