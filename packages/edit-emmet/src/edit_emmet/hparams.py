"""Hyperparameters of EMMET; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from editcore.locate_then_edit import LocateThenEditHParams
from pydantic import Field

__all__ = ["EmmetHParams"]


class EmmetHParams(LocateThenEditHParams):
    """EMMET (arXiv 2403.14236). The fields it shares with other methods keep their meaning."""

    left_to_code: ClassVar[Mapping[str, tuple[object, str]]] = {
        **LocateThenEditHParams.left_to_code,
        "clamp_norm": ("stream", "the code that such files are for measures ‖δ‖ against the output of the block"),
    }

    emmet_lambda: Annotated[float, Field(ge=0)] = 0.0
    """λ on the diagonal of the edit system. 0 is the paper's equality constraint (eq. 13): every fact gets all of its
    residual, and request weights have no effect. Above 0 the solve is the weighted ridge form D + λ·diag(1/w), MEMIT
    with weight λ·w. The reference code uses 0.1 for batches and 0 for single edits; here λ means the same for every
    size."""
