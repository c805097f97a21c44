"""Hyperparameters; imports no torch."""

from __future__ import annotations

from typing import Annotated

from editcore import HParams
from pydantic import Field

__all__ = ["AskingHParams", "CompanionHParams", "FactsHParams"]


class AskingHParams(HParams):
    """Of the evaluators."""

    paraphrases: Annotated[int, Field(ge=0)] = 1
    """Paraphrases that are asked of a fact."""


class FactsHParams(HParams):
    """Of the data sets."""

    count: Annotated[int, Field(ge=0)]
    """How many facts."""


class CompanionHParams(HParams):
    """Of the extensions."""

    weight: Annotated[float, Field(gt=0)] = 0.5
    """Of what is added to a batch."""
