"""Changes of weights, put into a model and held against its shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore.interfaces.changes import Changes, FactoredDelta, WeightChange

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["add_changes", "in_float64", "misfits"]


def misfits(model: LanguageModel, changes: Changes) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """``(address, found, expected)`` of each change whose shape, matrices as (out, in), is not that of its weight.

    Raises:
        ModelError: the model has no such weight.
    """
    for address, change in changes.items():
        expected = tuple(model.as_out_in(address, model.weight(address)).shape)
        if change.shape != expected:
            yield address, change.shape, expected


@torch.no_grad()
def add_changes(model: LanguageModel, address: str, changes: Sequence[WeightChange]) -> None:
    """Add changes to a weight, summed in float64 in the given order and rounded once."""
    weight = model.weight(address)
    total = model.as_out_in(address, weight).double()
    for change in changes:
        total = total + in_float64(change, total)
    weight.copy_(model.as_out_in(address, total).to(weight))


def in_float64(change: WeightChange, like: Tensor) -> Tensor:
    """The change itself, multiplied out where ``like`` is, which is in float64.

    Factors are multiplied as they lie in rows, which is how the ledger keeps them: products over other strides may
    round differently, and a proposal on trial has the bits of what is written.
    """
    if isinstance(change, FactoredDelta):
        return change.left.to(like).contiguous() @ change.right.to(like).contiguous()
    return change.value.to(like)
