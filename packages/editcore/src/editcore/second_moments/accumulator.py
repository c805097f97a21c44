"""Solves in sequence: one least-squares problem to which every batch adds its facts.

With the prior S₀ and the facts of all batches so far, W minimises

    Σ wᵢ ‖W kᵢ − vᵢ‖² + tr((W − W₀) S₀ (W − W₀)ᵀ) ,

and the next batch (K, V, Λ⁻¹ = diag(w)) changes it by

    Δ = R (KᵀS⁻¹K + Λ)⁻¹ KᵀS⁻¹ ,    R = V − W K ,    then S ← S + K Λ⁻¹ Kᵀ .

Solving batch by batch is thus the same as solving all facts at once. Methods differ in the prior:

* S₀ = w·C: MEMIT with all earlier facts kept ("MEMIT_seq", arXiv 2605.26670);
* S₀ = w·C + λI: the norm term of ENCORE (arXiv 2502.01636), RLSEdit (arXiv 2601.15686);
* S₀ = L₂·I inside the null space of C, infinite outside: AlphaEdit (arXiv 2410.02355);

and in the memory: no key, all keys (Λ = I), or the keys of some facts with a weight of their own.

Shapes: ``n`` facts, ``m = d_in``, ``d = d_out``. All tensors are float64, on the device of the prior.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from editcore.interfaces.changes import FactoredDelta
from editcore.interfaces.documented import documented
from editcore.second_moments.linalg import Metric, Update, solve_update

__all__ = ["Accumulator", "SubspaceMetric"]


@documented
class SubspaceMetric(Metric):
    """A price for changes that act inside a subspace alone, Δ = ΔUUᵀ; any other change costs infinitely much.

    Args:
        basis: U, orthonormal columns, ``[m, rank]``.
        inner: the price in the coordinates Uᵀk, of width ``rank``; left out, the identity.
    """

    def __init__(self, basis: Tensor, inner: Metric | None = None) -> None:
        basis = basis.double()
        inner = Metric.identity(basis.shape[1], device=basis.device) if inner is None else inner
        self.subspace = (basis, inner)
        self._basis, self._inner = basis, inner

    @property
    def width(self) -> int:
        return len(self._basis)

    @cached_property
    def matrix(self) -> Tensor:  # type: ignore[override]  # the price of the part in the span, made when asked for
        return self._basis @ self._inner.matrix @ self._basis.T

    @property
    def factor(self) -> tuple[Tensor, float]:
        """There is none; solves run in the coordinates of the subspace."""
        raise NotImplementedError("a price on a subspace has no Cholesky factor")

    @property
    def jitter(self) -> float:
        return self._inner.jitter

    def scaled(self, *, weight: float = 1.0, ridge: float = 0.0) -> Metric:
        return SubspaceMetric(self._basis, self._inner.scaled(weight=weight, ridge=ridge))

    def plus(self, keys: Tensor, weights: Tensor) -> Metric:
        return SubspaceMetric(self._basis, self._inner.plus(keys.to(self._basis) @ self._basis, weights))

    def minus(self, keys: Tensor, weights: Tensor) -> Metric:
        return SubspaceMetric(self._basis, self._inner.minus(keys.to(self._basis) @ self._basis, weights))

    def to(self, device: torch.device) -> Metric:
        return SubspaceMetric(self._basis.to(device), self._inner.to(device))

    def inverse_times(self, columns: Tensor) -> Tensor:
        """``U C'_r⁻¹ Uᵀ X``: the change along each column that the price allows."""
        return self._basis @ self._inner.inverse_times(self._basis.T @ columns.double())

    def cost_parts(self, delta: FactoredDelta) -> Tensor:
        return self._inner.cost_parts(FactoredDelta(delta.left, delta.right.double() @ self._basis))

    def condition(self) -> float:
        return self._inner.condition()


@documented
class Accumulator:
    """S = S₀ + Σ wᵢ kᵢkᵢᵀ: the normal matrix of all facts so far, with what solves need of it.

    Keys that are added update the inverse (Woodbury) as long as they are few; otherwise S is factored anew
    (:meth:`Metric.plus`), whichever is less work.
    """

    prior: Metric
    """S₀."""
    metric: Metric
    """S, the price of the next change."""

    def __init__(self, prior: Metric) -> None:
        self.prior = self.metric = prior

    def solve(self, keys: Tensor, residuals: Tensor, *, tikhonov: float = 0.0, weights: Tensor | None = None) -> Update:
        """Δ of the next batch; see :func:`solve_update` with a ridge of 1. Its keys are not added.

        Args:
            keys: K, ``[n, m]``
            residuals: R = V − W K, ``[n, d]``
            weights: w, ``[n]``; left out, 1.
        """
        return solve_update(keys, residuals, self.metric, ridge=1.0, tikhonov=tikhonov, weights=weights)

    def update(self, keys: Tensor, weights: Tensor | None = None) -> None:
        """S ← S + Σ wᵢ kᵢkᵢᵀ, for facts that were written."""
        self.metric = self.metric.plus(keys, _ones(keys) if weights is None else weights)

    def downdate(self, keys: Tensor, weights: Tensor | None = None) -> None:
        """S ← S − Σ wᵢ kᵢkᵢᵀ, for facts that count no more.

        Raises:
            NumericalError: these keys are not in the sum.
        """
        self.metric = self.metric.minus(keys, _ones(keys) if weights is None else weights)

    def forget(self, keys: Tensor, misses: Tensor, weights: Tensor | None = None) -> FactoredDelta:
        """Leave facts out: S is downdated, and the result takes them out of W, wherever in the sequence they came.

        S' = S − K diag(w) Kᵀ and W' = W + (W K − V) diag(w) Kᵀ S'⁻¹ are what the same sequence without these facts
        gives, for the same values of the others.

        Args:
            keys: ``[n, m]``
            misses: W K − V with W as it is now, ``[n, d]``.

        Raises:
            NumericalError: these keys are not in the sum; nothing was changed.
        """
        weights = _ones(keys) if weights is None else weights
        self.downdate(keys, weights)
        right = self.metric.inverse_times(keys.T).T  # KᵀS'⁻¹, [n, m]
        return FactoredDelta((weights[:, None] * misses.to(weights)).T.contiguous().to(right), right)


def _ones(keys: Tensor) -> Tensor:
    return torch.ones(len(keys), dtype=torch.float64, device=keys.device)
