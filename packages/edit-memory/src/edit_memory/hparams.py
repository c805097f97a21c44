"""Hyperparameters of ``memory``; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from editcore.locate_then_edit import LocateThenEditHParams
from pydantic import Field, model_validator

__all__ = ["MemoryHParams"]


class MemoryHParams(LocateThenEditHParams):
    """NeuralDB (arXiv 2507.18028) and GRACE (arXiv 2211.11031). Keys and values are found as in other locate-then-edit
    methods, and the shared fields keep their meaning."""

    rule: Literal["neuraldb", "grace"] = "neuraldb"
    """``neuraldb``: the residual of the nearest key, by cosine, is added to the projection's output if the cosine is
    above ``gate``. ``grace``: the value of the nearest key, by distance, replaces the output inside the key's radius.
    GRACE itself also has ``fact_token = "last"``, ``key_weighting = "prompt"`` and the bare prompt as its only context,
    as in the preset ``smollm2-135m-grace``."""
    gate: Annotated[float, Field(gt=0, lt=1)] = 0.65
    """Cosine between an input of the projection and a key, above which the memory answers. NeuralDB, section 4; the
    number is measured here."""
    radius: Annotated[float, Field(gt=0)] = 1.0
    """ε of a new key: the distance within which its value is used, in units of the projection's input. GRACE: 1.0."""
    mom2_adjustment: bool = False
    """False needs no text. The second moment only matters for ``shared_key_cosine``, which compares keys by it."""

    @model_validator(mode="after")
    def _one_layer(self) -> MemoryHParams:
        if len(self.layers) > 1:
            raise ValueError(f"a memory is beside one layer, found layers {list(self.layers)}")
        if self.target_window is not None:
            raise ValueError("a memory has one key for a fact, so its target cannot be cut: leave target_window out")
        return self
