"""The equation that one layer has to solve, and the keys and weights in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import NumericalError
from editcore.interfaces.values import HeldKey
from editcore.locate_then_edit.key_memory import FactKey
from editcore.second_moments.linalg import Metric

__all__ = ["FactsAtLayer", "LayerProblem", "held_keys_at", "moment_weight", "moment_weight_name"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProblem:
    """The equation that one layer has to solve. All tensors are float64, on the device of the layer."""

    layer: int
    """Number of the block."""
    name: str
    """Address of the weight, for error messages and for :meth:`StatisticsStore.derived`."""
    keys: Tensor
    """K, one row per fact, ``[n, d_in]``."""
    residuals: Tensor
    """R, what each fact asks for on top of the present output for its key, ``[n, d_out]``."""
    weights: Tensor
    """Weight of each fact, ``[n]``."""
    text: Metric
    """C, the second moment of the unedited model's keys."""
    moment_weight: float
    """w, the prior's weight as a number."""
    priced: Metric
    """The prior, w·C + ``update_norm_lambda``·I; a method may have another one in place of C."""
    metric: Metric
    """C', the price of a change: ``priced`` + Σ kkᵀ over the facts in memory + w Σ μ kkᵀ over the held keys."""
    held_keys: Tensor
    """Keys of earlier facts that the change should leave alone, ``[h, d_in]``."""
    held_weights: Tensor
    """Weight μ of each held key, ``[h]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactsAtLayer:
    """Keys, residuals and weights of the facts of a batch at one layer."""

    keys: Tensor
    """``[n, d_in]``"""
    residuals: Tensor
    """``[n, d_out]``"""
    weights: Tensor
    """``[n]``"""
    rewritten: Sequence[FactKey] = ()
    """Facts of the whole batch; the keys that a memory has of them do not count."""


def held_keys_at(held: Sequence[HeldKey], name: str, width: int) -> tuple[Tensor, Tensor]:
    """Keys ``[h, width]`` and weights ``[h]`` of the held facts that have a key at this weight. A held fact without one
    was written elsewhere, so a change of this weight does not move it.

    Raises:
        NumericalError: a key does not fit the weight.
    """
    here = [fact for fact in held if name in fact.keys and fact.weight > 0]
    for fact in here:
        if fact.keys[name].shape != (width,):
            raise NumericalError(
                f"The stored key of '{fact.request_id}' (batch {fact.batch}) has the shape "
                f"{list(fact.keys[name].shape)}, but {name} takes {width} numbers: it comes from another model."
            )
    weights = torch.tensor([fact.weight for fact in here], dtype=torch.float64)
    if not here:
        return torch.empty(0, width, dtype=torch.float64), weights
    return torch.stack([fact.keys[name].double() for fact in here]), weights


def moment_weight_name(layer: int) -> str:
    """The name of w of a layer among the diagnostics of a batch."""
    return f"layer_{layer}_moment_weight"


def moment_weight(weight: float | Literal["auto"], keys: Tensor, prior: Metric, ridge: float, fraction: float) -> float:
    """w of a prior w·C. With ``auto``, the w at which the median key, alone, reaches the fraction f = q/(q + λw) of its
    residual, where q = kᵀC⁻¹k."""
    if weight != "auto":
        return weight
    if ridge == 0:
        return 1.0  # the scale of C cancels
    energies = (keys * prior.inverse_times(keys.T).T).sum(1)  # q, [n]
    return float(energies.median()) * (1 - fraction) / (fraction * ridge)
