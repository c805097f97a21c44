"""Hyperparameters of replay; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from editcore import HParams
from pydantic import Field

__all__ = ["ReplayHParams"]


class ReplayHParams(HParams):
    """How many earlier facts join a batch, which, and how much they count."""

    replay_rate: Annotated[float, Field(ge=0)] = 0.5
    """Replayed facts per new fact of a batch, rounded up: 0.3 adds 3 to a batch of 10, 2 adds 20, 0 adds none. As many
    as the buffer holds at most."""
    replay_buffer_size: Annotated[int, Field(ge=1)] = 1000
    """Most facts kept for replay. Each costs two float64 vectors per edited layer (a key and a value)."""
    replay_strategy: Annotated[str, Field(min_length=1)] = "random"
    """Which facts are replayed: ``random``, ``priority`` (those the model holds least), ``recent``, or the name of a
    ``replay.strategy`` that another package offers."""
    replay_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight w of a replayed fact's squared error, where a new fact has 1. It enters ridge solves only (EMMET with
    λ > 0: D + λ·diag(1/w)); at λ = 0 every fact is a constraint that holds exactly, and weights have no effect."""
    replay_eviction: Literal["fifo", "lru"] = "fifo"
    """Which fact leaves a full buffer: the one edited longest ago, or the one edited or replayed longest ago."""
