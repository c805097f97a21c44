"""Hyperparameters of the LoRA backend; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from editcore import HParams
from pydantic import Field

__all__ = ["LoraHParams"]


class LoraHParams(HParams):
    """How edits become an adapter. By default the adapter is exact, and its rank grows with the edits."""

    lora_rank: Annotated[int, Field(ge=1)] | None = None
    """Largest rank of the adapter at a weight. ``none``: the rank of the active edits. With a number, the adapter is an
    approximation of that rank, always computed from the exact edits."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """α of the adapter. Its factors are divided by α/r, so it does not change the effect of the adapter.
    ``none`` is the rank, for a scaling of 1."""
    lora_scale: Annotated[float, Field(ge=0)] = 1.0
    """Strength of all edits together: at 1 they act as they were solved, at 0 they have no effect."""
    lora_criterion: Literal["weighted", "frobenius"] = "weighted"
    """Error that an approximation BA of a change Δ minimises. ``weighted``: ‖(Δ − BA) C^½‖, the error of the
    projection's output on ordinary text (C: second moment of its inputs). ``frobenius``: ‖Δ − BA‖, which is also used
    at weights other than MLP output projections, because C is not known there."""
    lora_use_svd: bool = True
    """Approximate by a singular value decomposition. False keeps the ``lora_rank`` largest rank-one terms of the
    edits."""
    lora_fit_steps: Annotated[int, Field(ge=0, le=10_000)] = 0
    """L-BFGS steps that refine the approximation. They minimise its relative error at the edited keys plus its relative
    error by ``lora_criterion``. At MLP output projections only."""
    lora_residual_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest relative error, by ``lora_criterion``, that an approximation may have at a weight; ``none`` for any."""
    allow_fallback: bool = False
    """Above ``lora_residual_threshold``: True writes the edits of that weight into the weight itself, as the backend
    raw does; False ends with an error."""
