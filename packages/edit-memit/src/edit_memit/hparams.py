"""Hyperparameters of MEMIT; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from editcore.locate_then_edit import LocateThenEditHParams
from pydantic import Field

__all__ = ["MemitHParams"]


class MemitHParams(LocateThenEditHParams):
    """MEMIT (arXiv 2210.07229). Shared fields keep their meaning."""

    mom2_update_weight: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Weight w of the second moment beside the batch, w·C + KKᵀ: how many pseudo-observations of ordinary text there
    are for each fact. A fact alone reaches q/(q + w) of its residual, q = kᵀC⁻¹k, so a number fits one model's keys
    (published: 15,000 and 20,000). ``auto`` takes the w at which the batch's median key reaches
    ``mom2_auto_fraction``."""
