"""Hyperparameters of ``ft``; imports no torch."""

from __future__ import annotations

from typing import Annotated

from editcore import HParams
from editcore.settings import Layer
from pydantic import Field, model_validator

__all__ = ["FineTuneHParams"]


class FineTuneHParams(HParams):
    """LocFT-BF (arXiv 2509.22072) by default; FT-M (FT-L of arXiv 2012.00363, with the loss on the target alone) with
    ``append_end`` off and a ``max_change``."""

    layer: Layer
    """Block whose MLP output projection is trained."""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 25
    """Passes over the facts of a batch, each in a new order, at most. LocFT-BF: 25. FT-M: 25 steps."""
    minibatch: Annotated[int, Field(ge=1)] = 100
    """Facts of a step. LocFT-BF: 100."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Of Adam. LocFT-BF: 5e-4 with one matrix of 7B and 8B models."""
    append_end: bool = True
    """Whether the token that ends a text is a part of each target. LocFT-BF: yes; FT-M: no."""
    skip_loss: Annotated[float, Field(ge=0)] = 1e-2
    """Mean loss of a minibatch in nats, below which its step is skipped. LocFT-BF: 1e-2."""
    stop_loss: Annotated[float, Field(ge=0)] = 1e-2
    """Mean loss of an epoch in nats, below which training ends. LocFT-BF and FT-M: 1e-2."""
    max_change: Annotated[float, Field(gt=0)] | None = None
    """ε: the most by which a batch moves an entry of the matrix (FT-L, FT-M); left out, there is no limit."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of the change. With a rank, Adam trains two factors (LoRA, arXiv 2106.09685) instead of all entries, so that
    the ledger and an adapter stay small. Left out, the change is dense. Not in LocFT-BF and FT-M."""

    @model_validator(mode="after")
    def _limit_is_for_entries(self) -> FineTuneHParams:
        if self.max_change is not None and self.rank is not None:
            raise ValueError("max_change limits the entries of a dense change; leave out either max_change or rank")
        return self
