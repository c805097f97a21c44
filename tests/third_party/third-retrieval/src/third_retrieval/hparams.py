"""Hyperparameters of ``statements``; imports no torch."""

from __future__ import annotations

from typing import Annotated

from editcore import HParams
from pydantic import Field

__all__ = ["RetrievalHParams"]


class RetrievalHParams(HParams):
    """When a statement is like a prompt."""

    least_overlap: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of a prompt's words that a statement must have to be put in front of it."""
