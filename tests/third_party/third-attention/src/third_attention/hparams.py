"""Hyperparameters of ``attention``; imports no torch."""

from __future__ import annotations

from typing import Annotated

from editcore import HParams
from pydantic import Field

__all__ = ["AttentionHParams"]


class AttentionHParams(HParams):
    """Which attention is trained, and how."""

    layer: Annotated[int, Field(ge=0)]
    """Block whose attention is changed."""
    module: Annotated[str, Field(min_length=1)] = "self_attn.o_proj"
    """The attention's output projection, as it is called inside a block; GPT-2 has ``attn.c_proj``."""
    rank: Annotated[int, Field(ge=1)] = 4
    """Largest rank of the matrix's change: the best approximation of what the steps add up to."""
    steps: Annotated[int, Field(ge=1)] = 5
    """Adam steps on the mean loss of a batch's targets."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Size of a step."""
