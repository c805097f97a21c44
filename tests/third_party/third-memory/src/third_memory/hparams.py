"""Hyperparameters of ``gated-memory``; imports no torch."""

from __future__ import annotations

from typing import Annotated

from editcore import HParams
from pydantic import Field

__all__ = ["GatedMemoryHParams"]


class GatedMemoryHParams(HParams):
    """Where the memory is, when it answers, and how its values are learnt."""

    layer: Annotated[int, Field(ge=0)]
    """Block whose input is looked up, and to whose output a value is added."""
    gate: Annotated[float, Field(gt=0, lt=1)] = 0.98
    """Cosine between a hidden state and the nearest key, above which the key's value is added."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Adam steps on the loss of each target."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Size of a step."""
    clamp_norm_factor: Annotated[float, Field(gt=0)] = 2.0
    """Largest norm of a value, in mean norms of the block's output where facts were written so far."""
