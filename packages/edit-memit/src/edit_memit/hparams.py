"""Hyperparameters of MEMIT; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from editcore.locate_then_edit import LocateThenEditHParams
from pydantic import Field

__all__ = ["MemitHParams", "MemitSeqHParams"]


class MemitHParams(LocateThenEditHParams):
    """MEMIT (arXiv 2210.07229). The fields it shares with other methods keep their meaning."""

    left_to_code: ClassVar[Mapping[str, tuple[object, str]]] = {
        **LocateThenEditHParams.left_to_code,
        "clamp_norm": ("stream", "the code that such files are for measures ‖δ‖ against the output of the block"),
    }

    mom2_update_weight: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Weight w of the second moment in w·C + KKᵀ: each fact is weighed against w tokens of ordinary text. A fact alone
    gets the share q/(q + w) of its residual, q = kᵀC⁻¹k, so a good number depends on the model (published: 15,000 and
    20,000). ``auto`` takes the w at which the batch's median key reaches ``mom2_auto_fraction``."""


class MemitSeqHParams(MemitHParams):
    """MEMIT_seq (arXiv 2605.26670): MEMIT with a memory. With ``update_norm_lambda`` above 0, the solve is that of
    ENCORE (arXiv 2502.01636) and RLSEdit (arXiv 2601.15686)."""

    memory: Literal["none", "keys"] = "keys"
    """``keys``: the keys of all facts that are written and not undone enter the solve, R Kᵀ (w·C + Σ KKᵀ)⁻¹."""
