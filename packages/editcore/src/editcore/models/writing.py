"""Changes of weights: checked against the shapes of a model, and added to its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore.interfaces.changes import Changes, FactoredDelta, WeightChange

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["add_changes", "in_float64", "misfits", "rounded"]


def misfits(model: LanguageModel, changes: Changes) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """``(address, found, expected)`` of each change whose shape is not that of its weight, matrices as (out, in).

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
    weight.copy_(rounded(model.as_out_in(address, total), model.weights.type_of(address)))


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in float64, each rounded once to the nearest number of ``dtype``.

    torch converts float64 to bfloat16 and float16 through float32, and so rounds twice. A number just beyond the middle
    of two neighbours becomes the middle, and then possibly the farther neighbour.
    """
    if torch.promote_types(dtype, torch.float32) == dtype:
        return total.to(dtype)
    single = total.to(torch.float32)
    found = single.to(dtype)
    beyond = torch.nextafter(single, torch.where(total > single, torch.inf, -torch.inf).to(single)).to(dtype)
    nearer = (beyond.double() - total).abs() < (found.double() - total).abs()
    return torch.where(nearer, beyond, found)


def in_float64(change: WeightChange, like: Tensor, out: Tensor | None = None) -> Tensor:
    """The change as one tensor in float64, on the device of ``like``, which is in float64 too.

    Args:
        out: where a product of factors may be written; it has the shape of the change.

    Factors are made contiguous first, as the ledger keeps them, because products over other strides may round
    differently. So a proposal on trial has the same bits as what is written later.
    """
    if isinstance(change, FactoredDelta):
        return torch.mm(change.left.to(like).contiguous(), change.right.to(like).contiguous(), out=out)
    return change.value.to(like)
