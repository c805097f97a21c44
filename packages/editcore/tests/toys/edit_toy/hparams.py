"""Hyperparameters of the toys; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from editcore import HParams
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from pydantic import Field

__all__ = ["FactsHParams", "GateHParams", "HalfHParams", "ToyHParams"]


class ToyHParams(LocateThenEditHParams):
    """As every locate-then-edit method, but quick, and it goes wrong where it is told to."""

    context_templates: tuple[str, ...] | None = ("{}",)
    """The bare prompt alone."""
    v_num_grad_steps: Annotated[int, Field(ge=1)] = 3
    """Enough to move."""
    fails_at: int | None = None
    """Batch that cannot be solved."""
    spoils: Literal["name", "shape", "nan", "memory", "dense", "nothing", "kept", "beside", "fields"] | None = None
    """What is wrong with the proposal."""


class HalfHParams(HParams):
    """Of the backend ``half``."""

    strength: Annotated[float, Field(gt=0)] = 0.5
    """Factor on every delta."""


class FactsHParams(HParams):
    """Of the data set ``toy-facts``."""

    file: str
    """Where the facts are."""
    most: Annotated[int, Field(ge=0)] | None = None
    """How many of them."""
    label: str = "plain"
    """What stands in the extra of each."""


class GateHParams(HParams):
    """Of the extension ``gate``."""

    batch: int = 1
    """The batch it objects to."""
    action: str = "reject"
    """What it says."""
    scale: float = 1.0
    """How much it would let through."""
    rejects: tuple[str, ...] = ()
    """Ids of requests it rejects, one each time it is asked, in any batch; it then objects to no batch."""
    withdraws: tuple[str, ...] = ()
    """Ids of requests it withdraws before anything is computed."""
