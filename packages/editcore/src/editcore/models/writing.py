"""Changes of weights, put into a model and held against its shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore.interfaces.changes import Changes, FactoredDelta, WeightChange

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["add_changes", "applied", "in_float64", "misfits"]


@contextmanager
def applied(model: LanguageModel, changes: Changes) -> Iterator[None]:
    """The model with ``changes`` added to its weights as they are, inside the block only; the bits come back on every
    way out.

    This is what the backend ``raw`` does on trial. Whoever measures a proposal asks the backend in charge
    (:meth:`editcore.Backend.trial`), since it may keep its changes elsewhere.
    """
    saved: dict[str, Tensor] = {}
    try:
        for address, change in changes.items():
            saved[address] = model.weight(address).detach().clone()
            add_changes(model, address, [change])
        yield
    finally:
        with torch.no_grad():
            for address, bits in reversed(saved.items()):  # a whole and a part of it may both be there
                model.weight(address).copy_(bits)


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
    """The change itself, multiplied out where ``like`` is, which is in float64."""
    if isinstance(change, FactoredDelta):
        return change.left.to(like) @ change.right.to(like)
    return change.value.to(like)
