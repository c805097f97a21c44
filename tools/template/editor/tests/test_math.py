"""The solve against what defines it, in float64."""

from __future__ import annotations

import pytest
import torch
from edit_template_name.solve import solve
from editcore.second_moments import Metric
from torch import Tensor

N, D_IN, D_OUT = 5, 12, 7


@pytest.fixture(params=[0, 1, 2])
def problem(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, residuals, a second moment and weights."""
    generator = torch.Generator().manual_seed(request.param)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    text = draw(4 * D_IN, D_IN)
    return draw(N, D_IN), draw(N, D_OUT), text.T @ text / len(text), draw(N).abs() + 0.1


def test_without_a_ridge_every_key_gets_its_residual(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    keys, residuals, moment, weights = problem
    delta = solve(keys, residuals, Metric(moment), weights, ridge=0.0).delta.dense()
    torch.testing.assert_close(keys @ delta.T, residuals, rtol=1e-8, atol=1e-8)


def test_with_a_ridge_the_gradient_vanishes(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    keys, residuals, moment, weights = problem
    delta = solve(keys, residuals, Metric(moment), weights, ridge=0.3).delta.dense()
    missed = keys @ delta.T - residuals
    gradient = (weights[:, None] * missed).T @ keys + 0.3 * delta @ moment
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)
