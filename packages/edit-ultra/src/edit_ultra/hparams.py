"""Hyperparameters of ``ultra``; imports no torch."""

from __future__ import annotations

from typing import Annotated

from editcore import HParams
from editcore.settings import Layer
from pydantic import Field

__all__ = ["UltraHParams"]


class UltraHParams(HParams):
    """UltraEdit (arXiv 2505.14679)."""

    weights: Annotated[tuple[tuple[str, Annotated[tuple[Layer, ...], Field(min_length=1)]], ...], Field(min_length=1)]
    """The linear modules that are edited: pairs of a path inside a block, and the blocks, such as
    ``[["mlp.up_proj", [18, 19]]]``. The paper edits gate and up projections of most models, in the upper half; which
    ones is found by trying."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """η: the size of an update, in units of an entry of the normalised gradient. UltraEdit: 1e-6."""
    ridge: Annotated[float, Field(gt=0)] = 1.0
    """The ridge term of the solve. UltraEdit: 1."""
    passes: Annotated[int, Field(ge=1, le=10)] = 1
    """Passes over a batch, each a forward with its backward on the model as the passes before left it. UltraEdit: 1."""
    warmup_facts: Annotated[int, Field(ge=0, le=1000)] = 0
    """Facts of ``worldfacts`` whose tokens begin the running statistics, from the unedited model. UltraEdit: none: its
    first turn of 100 edits is enough. Smaller batches need some, and a batch of one token does nothing without."""
    minibatch: Annotated[int, Field(ge=1)] = 10
    """Facts of one forward pass. UltraEdit: 10."""
