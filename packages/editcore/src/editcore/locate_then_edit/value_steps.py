"""How values move: rows of a matrix that take their steps at different times.

Both kinds of steps change the rows of ``values [n, d]`` in place, and count the steps of each row, ``steps [n]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LEAST_GAIN", "AdamSteps", "LogOddsSteps", "log_odds_aim"]

LEAST_GAIN = 0.5
"""What a step asks for at least, in log-odds. Facts that share a value may reach the aim on average before each
of them is likely enough."""


class AdamSteps:
    """Adam (arXiv 1412.6980, algorithm 1).

    ``torch.optim.Adam`` counts the steps of a tensor as a whole; here each row has its own count.
    """

    def __init__(self, values: Tensor, *, lr: float, betas: tuple[float, float]) -> None:
        self.values, self.lr, self.betas, self.epsilon = values, lr, betas, 1e-8
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)
        self.steps = torch.zeros(len(values), dtype=torch.long, device=values.device)

    @torch.no_grad()
    def step(self, rows: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """Move ``rows`` of the values by the ``gradient [rows, d]`` of their loss. ``losses`` are not needed."""
        beta1, beta2 = self.betas
        self.steps[rows] += 1
        steps = self.steps[rows, None].to(gradient)
        first = self.first[rows] = beta1 * self.first[rows] + (1 - beta1) * gradient
        second = self.second[rows] = beta2 * self.second[rows] + (1 - beta2) * gradient.square()
        corrected = (second / (1 - beta2**steps)).sqrt() + self.epsilon
        self.values[rows] -= self.lr * first / (1 - beta1**steps) / corrected


class LogOddsSteps:
    """Steps along the gradient of the log-odds m = log(p / (1 − p)), with p = exp(−L) for the loss L.

    A step has the length that m needs to reach ``aim``, if m is linear in δ: (aim − m) ∇m / ‖∇m‖². Its length is at
    most the row's entry of ``longest [n]``. DeepFool (arXiv 1511.04599) finds small changes of a classifier's input so.

    With a metric M the step goes along M⁻¹∇m: of all steps that bring a linear m to the aim, it has the least δᵀMδ.

    Args:
        inverse: M⁻¹, ``[d, d]``, positive definite; left out, the identity.
    """

    def __init__(self, values: Tensor, *, aim: float, longest: Tensor, inverse: Tensor | None = None) -> None:
        self.values, self.aim, self.longest = values, aim, longest
        self.inverse = None if inverse is None else inverse.to(values)
        self.steps = torch.zeros(len(values), dtype=torch.long, device=values.device)

    @torch.no_grad()
    def step(self, rows: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """Move ``rows`` of the values, which have ``losses [rows]`` with the ``gradient [rows, d]``."""
        self.steps[rows] += 1
        losses = losses.clamp_min(torch.finfo(losses.dtype).eps)
        missed = -torch.expm1(-losses)  # 1 − p
        slope = -gradient / missed[:, None]  # ∇m
        gain = (self.aim + losses + missed.log()).clamp_min(LEAST_GAIN)
        direction = slope if self.inverse is None else slope @ self.inverse
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
        per_length = (slope * direction).sum(1).clamp_min(1e-30)  # what m gains on a step of length 1
        self.values[rows] += torch.minimum(gain / per_length, self.longest[rows])[:, None] * direction


def log_odds_aim(stop_probability: float) -> float:
    """The log-odds that these steps aim at: those half-way between the probability at which a fact is done and 1."""
    probability = (1 + stop_probability) / 2
    return math.log(probability / (1 - probability))
