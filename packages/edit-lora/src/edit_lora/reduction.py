"""Makes the adapter for the active changes of one weight, cut to a rank if asked."""

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

__all__ = ["Reduction", "reduce", "without_moment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """What an adapter keeps of the active changes of one weight."""

    delta: FactoredDelta
    """The change that the adapter makes, before ``lora_scale``; float64, balanced."""
    exact_rank: int
    """Rank of the factors of the exact change."""
    kept_frobenius: float = 1.0
    """1 − ‖Δ − BA‖² / ‖Δ‖²."""
    kept_weighted: float | None = 1.0
    """1 − ‖(Δ − BA) C^½‖² / ‖Δ C^½‖²: the share that is kept of the mean squared change of the projection's output on
    ordinary text. ``None`` where C is not known: for a cut at any weight but an MLP output projection."""
    kept_keys: float | None = 1.0
    """1 − ‖(Δ − BA) Kᵀ‖² / ‖ΔKᵀ‖², over the keys of the edits (:func:`edit_lora.factors.dual_keys`); ``None`` where
    ``kept_weighted`` is."""
    fell_back: bool = False
    """True if the cut would have left out too much, so that ``delta`` is the exact change."""

    @property
    def whole(self) -> bool:
        """True if nothing was cut."""
        return self.delta.rank == self.exact_rank


def reduce(
    deltas: Sequence[FactoredDelta], hparams: LoraHParams, metric: Callable[[], Metric] | None, *, name: str
) -> Reduction:
    """The adapter for the sum of ``deltas``: exact where their rank allows it, else cut as ``hparams`` say.

    It depends on its arguments alone: equal deltas give equal bits.

    Args:
        metric: gives the second moment of the module's inputs; called only when there is something to cut. ``None``
            where that moment is not known: then the cut keeps the most of ‖Δ‖ and is not fitted at the keys
            (:func:`without_moment`).

    Raises:
        NumericalError: the cut leaves more than ``lora_residual_threshold`` and no fallback is allowed.
    """
    exact = join(deltas)
    if hparams.lora_rank is None or exact.rank <= hparams.lora_rank:
        return Reduction(delta=balanced(exact), exact_rank=exact.rank)
    weighted = metric is not None and hparams.lora_criterion == "weighted"
    found = _cut(exact, deltas, hparams, metric().to(exact.left.device) if metric is not None else None)
    kept = found.kept_weighted if weighted and found.kept_weighted is not None else found.kept_frobenius
    left_out = sqrt(max(1.0 - kept, 0.0))
    if hparams.lora_residual_threshold is None or left_out <= hparams.lora_residual_threshold:
        return found
    if hparams.allow_fallback:
        return Reduction(delta=balanced(exact), exact_rank=exact.rank, fell_back=True)
    raise NumericalError(
        f"lora: rank {hparams.lora_rank} leaves out {left_out:.3g} of the edits at {name}, in units of their own size "
        f"({'weighted' if weighted else 'frobenius'}); lora_residual_threshold is "
        f"{hparams.lora_residual_threshold:g}. Raise lora_rank (the edits have rank {exact.rank}) or the threshold, or "
        "set allow_fallback=true."
    )


def without_moment(hparams: LoraHParams, name: str) -> str | None:
    """The warning about a cut at a module whose inputs have no second moment; ``None`` if the settings ask for no
    more."""
    if hparams.lora_criterion == "frobenius" and not hparams.lora_fit_steps:
        return None
    fit = " and is not fitted at the edited keys" if hparams.lora_fit_steps else ""
    return (
        f"{name} is not an MLP output projection, and second moments are known of their inputs alone: the bounded rank "
        f"keeps the most of ‖Δ‖ there (lora_criterion frobenius){fit}, as at all such modules."
    )


def _cut(
    exact: FactoredDelta, deltas: Sequence[FactoredDelta], hparams: LoraHParams, moment: Metric | None
) -> Reduction:
    assert hparams.lora_rank is not None
    shorten = project if hparams.lora_use_svd else strongest_terms
    if moment is None:
        cut = shorten(exact, hparams.lora_rank)
        return Reduction(
            delta=balanced(cut),
            exact_rank=exact.rank,
            kept_frobenius=_kept(exact, cut),
            kept_weighted=None,
            kept_keys=None,
        )
    priced = moment.factor[0] if hparams.lora_criterion == "weighted" else None
    cut = shorten(exact, hparams.lora_rank, priced)
    keys = torch.cat([dual_keys(delta.right.double(), moment.matrix) for delta in deltas])
    if hparams.lora_fit_steps:
        cut = refine(exact, cut, keys, hparams.lora_fit_steps, priced)
    return Reduction(
        delta=balanced(cut),
        exact_rank=exact.rank,
        kept_frobenius=_kept(exact, cut),
        kept_weighted=_kept(exact, cut, moment.factor[0]),
        kept_keys=_kept(exact, cut, keys.T),
    )


def _kept(exact: FactoredDelta, cut: FactoredDelta, view: Tensor | None = None) -> float:
    whole = energy(exact, view)
    return 1.0 - energy(residual(exact, cut), view) / whole if whole > 0 else 1.0
