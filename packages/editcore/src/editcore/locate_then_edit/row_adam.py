"""Adam for rows that take their steps at different times."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowAdam"]


class RowAdam:
    """Adam (arXiv 1412.6980, algorithm 1) on the rows of ``values [n, d]``, in place.

    ``torch.optim.Adam`` counts the steps of a tensor as a whole; here each row has its own count, ``steps [n]``.
    """

    def __init__(self, values: Tensor, *, lr: float, betas: tuple[float, float]) -> None:
        self.values, self.lr, self.betas, self.epsilon = values, lr, betas, 1e-8
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)
        self.steps = torch.zeros(len(values), dtype=torch.long, device=values.device)

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """Move ``rows`` of the values by their ``gradient [rows, d]``."""
        beta1, beta2 = self.betas
        self.steps[rows] += 1
        steps = self.steps[rows, None].to(gradient)
        first = self.first[rows] = beta1 * self.first[rows] + (1 - beta1) * gradient
        second = self.second[rows] = beta2 * self.second[rows] + (1 - beta2) * gradient.square()
        corrected = (second / (1 - beta2**steps)).sqrt() + self.epsilon
        self.values[rows] -= self.lr * first / (1 - beta1**steps) / corrected
