"""Hyperparameters of the LoRA backend; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from editcore import HParams
from pydantic import Field

__all__ = ["LoraHParams"]


class LoraHParams(HParams):
    """How edits become an adapter. As it is, the adapter is exact and its rank grows with the edits."""

    lora_rank: Annotated[int, Field(ge=1)] | None = None
    """Largest rank of the adapter at a weight. ``none``: as many as the active edits need. With a number, what does
    not fit is left out, always counted from the exact edits and never from an adapter that was cut before."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """α of the adapter. Its factors are divided by α/r, so it changes how the adapter is written and not what it does.
    ``none`` is the rank, for a scaling of 1."""
    lora_scale: Annotated[float, Field(ge=0)] = 1.0
    """Strength of all edits together: 1 as they were solved, 0 none."""
    lora_criterion: Literal["weighted", "frobenius"] = "weighted"
    """What a bounded rank keeps of a change Δ: the most of ‖Δ C^½‖, the change of the projection's output on ordinary
    text (C: second moment of its inputs), or the most of ‖Δ‖. C is known at MLP output projections; at any other weight
    the most of ‖Δ‖ is kept."""
    lora_use_svd: bool = True
    """Cut to the rank by a singular value decomposition. False keeps the ``lora_rank`` largest of the edits' own
    rank-one terms."""
    lora_fit_steps: Annotated[int, Field(ge=0, le=10_000)] = 0
    """L-BFGS steps that refine the cut factors: their error on the edited keys, and by ``lora_criterion``, each in
    units of what the exact change has there. At MLP output projections only."""
    lora_residual_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest ‖Δ - BA‖ / ‖Δ‖, by ``lora_criterion``, that a cut may leave at a weight; ``none`` for any."""
    allow_fallback: bool = False
    """Past ``lora_residual_threshold``: True writes the edits of that weight into it instead, as the backend raw
    does; False fails."""
