"""Hyperparameters of ``template-name``; imports no torch."""

from __future__ import annotations

from typing import Annotated

from editcore.locate_then_edit import LocateThenEditHParams
from pydantic import Field

__all__ = ["TemplateNameHParams"]


class TemplateNameHParams(LocateThenEditHParams):
    """What the method adds to the fields that all locate-then-edit methods share. Name its paper here."""

    ridge: Annotated[float, Field(ge=0)] = 0.0
    """Weight λ of tr(Δ C' Δᵀ) against the squared errors of the edits; 0 makes every edit an equality constraint."""
