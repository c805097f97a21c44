"""Hyperparameters of AlphaEdit; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from editcore.locate_then_edit import LocateThenEditHParams
from pydantic import Field, model_validator

__all__ = ["AlphaEditHParams"]


class AlphaEditHParams(LocateThenEditHParams):
    """AlphaEdit (arXiv 2410.02355). The fields it shares with other methods keep their meaning; ``mom2_update_weight``
    has none here, because the null space takes the place of w·C."""

    left_to_code: ClassVar[Mapping[str, tuple[object, str]]] = {
        **LocateThenEditHParams.left_to_code,
        "clamp_norm": ("stream", "the code that such files are for measures ‖δ‖ against the output of the block"),
    }

    nullspace_ratio: Annotated[float, Field(gt=0)] = 2.0
    """Where the null space of C ends: eigenvectors with an eigenvalue below this multiple of the median eigenvalue,
    which means the same at every scale of the keys, and does not depend on the few largest eigenvalues. Not in the
    paper."""
    nullspace_threshold: Annotated[float, Field(gt=0)] | None = None
    """Where it ends instead: eigenvectors with an eigenvalue below this number, in the square of the keys' unit. The
    paper's code: 0.02. Such a number fits the scale of one model's keys."""
    L2: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Weight of ‖Δ‖². The paper's code: 10, EasyEdit for Qwen2.5: 1. ``auto`` takes the number at which the median key
    of the first batch, alone, reaches ``mom2_auto_fraction`` of its residual: q/(q + L2), q = kᵀPk."""
    memory: Literal["none", "keys"] = "keys"
    """``keys``: the keys K_p of all facts that are written and not undone enter the solve (the paper's eq. 14)."""

    @model_validator(mode="after")
    def _needs_moments(self) -> AlphaEditHParams:
        if not self.mom2_adjustment:
            raise ValueError("mom2_adjustment is false, but the null space is that of the second moment C")
        return self
