"""The method's mathematics: one layer.

Shapes: ``n`` edits, ``d_in`` and ``d_out`` the widths of the edited projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from editcore.second_moments import Metric, Update, solve_update

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["solve"]


def solve(keys: Tensor, residuals: Tensor, metric: Metric, weights: Tensor, *, ridge: float) -> Update:
    """The change Δ of least Σ wᵢ ‖Δ kᵢ − rᵢ‖² + λ tr(Δ C' Δᵀ), or of least cost with Δ kᵢ = rᵢ where λ = 0.

    Args:
        keys: ``[n, d_in]``
        residuals: ``[n, d_out]``
        metric: C' ``[d_in, d_in]``
        weights: ``[n]``
    """
    return solve_update(keys, residuals, metric, ridge=ridge, weights=weights)
