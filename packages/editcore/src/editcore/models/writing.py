"""Changes of weights, put into a model and held against its shapes."""

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
    weight.copy_(rounded(model.as_out_in(address, total), weight.dtype))


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in float64, each as the nearest one of ``dtype``.

    torch goes from float64 to bfloat16 and float16 by way of float32, and so rounds twice: what lies a little beyond
    the middle between two numbers becomes the middle, and then the wrong one of them.
    """
    if torch.promote_types(dtype, torch.float32) == dtype:
        return total.to(dtype)
    single = total.to(torch.float32)
    found = single.to(dtype)
    beyond = torch.nextafter(single, torch.where(total > single, torch.inf, -torch.inf).to(single)).to(dtype)
    nearer = (beyond.double() - total).abs() < (found.double() - total).abs()
    return torch.where(nearer, beyond, found)


def in_float64(change: WeightChange, like: Tensor) -> Tensor:
    """The change itself, multiplied out where ``like`` is, which is in float64.

    Factors are multiplied as they lie in rows, which is how the ledger keeps them: products over other strides may
    round differently, and a proposal on trial has the bits of what is written.
    """
    if isinstance(change, FactoredDelta):
        return change.left.to(like).contiguous() @ change.right.to(like).contiguous()
    return change.value.to(like)
