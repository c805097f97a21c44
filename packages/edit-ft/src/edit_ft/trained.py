"""The change of a matrix while Adam trains it: all of its entries, or two factors.

Shapes: ``d_out``, ``d_in`` of the matrix, ``rank`` of the factors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from editcore import DenseDelta, FactoredDelta
from torch import Tensor

__all__ = ["DenseChange", "FactoredChange", "TrainedChange"]


class TrainedChange(ABC):
    """A change Δ of a matrix, at first 0, with the parameters that Adam moves."""

    def __init__(self, parameters: list[Tensor], learning_rate: float) -> None:
        self._parameters = parameters
        self._adam = torch.optim.Adam(parameters, lr=learning_rate)

    @abstractmethod
    def delta(self) -> DenseDelta | FactoredDelta:
        """Δ as it is now."""

    @abstractmethod
    def gradients(self, gradient: Tensor) -> list[Tensor]:
        """The gradients of the parameters, from that of Δ, ``[d_out, d_in]``."""

    def step(self, gradient: Tensor) -> None:
        """One step of Adam, from the gradient of Δ, ``[d_out, d_in]``."""
        for parameter, found in zip(self._parameters, self.gradients(gradient.to(self._parameters[0])), strict=True):
            parameter.grad = found
        self._adam.step()


class DenseChange(TrainedChange):
    """All entries of Δ.

    Args:
        like: has the shape of the matrix, and the type and device of Δ.
        limit: the largest entry of Δ after a step.
    """

    def __init__(self, like: Tensor, *, learning_rate: float, limit: float | None) -> None:
        self._value, self._limit = torch.zeros_like(like), limit  # [d_out, d_in]
        super().__init__([self._value], learning_rate)

    def delta(self) -> DenseDelta:
        """See :class:`TrainedChange`."""
        return DenseDelta(self._value)

    def gradients(self, gradient: Tensor) -> list[Tensor]:
        """See :class:`TrainedChange`."""
        return [gradient]

    def step(self, gradient: Tensor) -> None:
        """See :class:`TrainedChange`. Entries are cut at the limit."""
        super().step(gradient)
        if self._limit is not None:
            self._value.clamp_(-self._limit, self._limit)


class FactoredChange(TrainedChange):
    """Δ = B A. At first B = 0, and A is normal with the variance 1/d_in, so that ‖A x‖² is rank/d_in · ‖x‖² on average.

    As in LoRA (arXiv 2106.09685), without its factor α/r.
    """

    def __init__(self, like: Tensor, *, learning_rate: float, rank: int, generator: torch.Generator) -> None:
        d_out, d_in = like.shape
        drawn = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)  # on the CPU
        self._left = like.new_zeros(d_out, rank)
        self._right = (drawn / math.sqrt(d_in)).to(like)
        super().__init__([self._left, self._right], learning_rate)

    def delta(self) -> FactoredDelta:
        """See :class:`TrainedChange`."""
        return FactoredDelta(self._left, self._right)

    def gradients(self, gradient: Tensor) -> list[Tensor]:
        """See :class:`TrainedChange`: dL/dB = G Aᵀ and dL/dA = Bᵀ G."""
        return [gradient @ self._right.T, self._left.T @ gradient]
