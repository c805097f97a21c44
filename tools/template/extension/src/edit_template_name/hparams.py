"""Hyperparameters of ``template-name``; imports no torch."""

from __future__ import annotations

from typing import Annotated

from editcore import HParams
from pydantic import Field

__all__ = ["TemplateNameHParams"]


class TemplateNameHParams(HParams):
    """TEMPLATE SUMMARY"""

    every: Annotated[int, Field(ge=1)] = 1
    """Batches from one line of the log to the next."""
