"""Hyperparameters of ``finetune``; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from editcore import HParams
from pydantic import Field

__all__ = ["FinetuneHParams"]


class FinetuneHParams(HParams):
    """Which matrix is trained, and how."""

    weight: Annotated[str, Field(min_length=1)]
    """Address of the matrix, such as ``model.layers.3.mlp.down_proj.weight``."""
    steps: Annotated[int, Field(ge=1)] = 5
    """Steps on the mean loss of a batch's targets."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Size of a step."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """What makes a step of a gradient."""
