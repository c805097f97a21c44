"""Changes of weights, put into a model and held against its shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore.interfaces.values import FactoredDelta

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["add_delta", "applied", "misfits"]


@contextmanager
def applied(model: LanguageModel, deltas: Mapping[str, FactoredDelta]) -> Iterator[None]:
    """The model with ``deltas`` added to its weights, inside the block only; the bits come back on every way out."""
    saved: dict[str, Tensor] = {}
    try:
        for name, delta in deltas.items():
            weight = model.weight(name)
            saved[name] = weight.detach().clone()
            add_delta(model, name, [delta])
        yield
    finally:
        with torch.no_grad():
            for name, bits in saved.items():
                model.weight(name).copy_(bits)


def misfits(
    model: LanguageModel, deltas: Mapping[str, FactoredDelta]
) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """``(weight name, found, expected)`` of each delta whose size, (out, in), is not that of its weight.

    Raises:
        ModelError: the model has no such weight.
    """
    for name, delta in deltas.items():
        d_out, d_in = model.as_out_in(name, model.weight(name)).shape
        found = (delta.left.shape[0], delta.right.shape[1])
        if found != (d_out, d_in):
            yield name, found, (d_out, d_in)


@torch.no_grad()
def add_delta(model: LanguageModel, name: str, deltas: Sequence[FactoredDelta], *, base: Tensor | None = None) -> None:
    """Write ``base + Σ left @ right``, summed in float64 in the given order and rounded once.

    ``base`` is a stored-orientation tensor, the present weight if left out.
    """
    weight = model.weight(name)
    total = model.as_out_in(name, weight if base is None else base).double()
    for delta in deltas:
        total = total + delta.left.to(total) @ delta.right.to(total)
    weight.copy_(model.as_out_in(name, total).to(weight))
