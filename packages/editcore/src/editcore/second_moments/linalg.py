"""The algebra of locate-then-edit methods: one constrained or ridge-regularised least-squares update.

Shapes: ``n`` edits, ``m = d_in`` the width of the edited projection's input, ``d = d_out`` of its output. Keys are
columns in the papers and rows here: ``keys [n, m]``, ``residuals [n, d]``. Every solve runs in float64 on the keys'
device.

The update is the one of EMMET (arXiv 2403.14236, eq. 13) and, by the identity

    (KᵀC⁻¹K + Λ)⁻¹KᵀC⁻¹ = Λ⁻¹Kᵀ(K Λ⁻¹ Kᵀ + C)⁻¹ ,        Λ = λ·diag(1/w)

also MEMIT's (arXiv 2210.07229, eq. 14): λ = 0 makes every edit an equality constraint, λ > 0 a weighted ridge term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from editcore.interfaces.changes import FactoredDelta, WeightChange
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import NumericalError

__all__ = ["Metric", "Update", "hold_at", "norm_of_sum", "solve_update"]

_RANK_TOLERANCE = 1e-10
"""Eigenvalues of the constraint system below this share of the largest one count as zero; their directions are
dependent."""


@documented
class Metric:
    """A symmetric positive definite ``C' [m, m]`` that prices a change, with its Cholesky factor computed once.

    The cost of a change Δ is tr(Δ C' Δᵀ), which for C' = E[k kᵀ] is the mean squared change of the projection's output
    over the text behind C.
    """

    matrix: Tensor
    """C', ``[m, m]`` float64."""
    subspace: tuple[Tensor, Metric] | None = None
    """Where a change may act: orthonormal columns U ``[m, rank]``, and the price in the coordinates Uᵀk; ``None`` for
    all directions."""

    def __init__(self, matrix: Tensor, *, factor: tuple[Tensor, float] | None = None) -> None:
        """``factor``: ``(L, jitter)`` with ``L Lᵀ = C' + jitter · I``, if it is known already."""
        self.matrix = matrix.double()
        if factor is not None:
            self.factor = factor

    @classmethod
    def identity(cls, width: int, *, device: torch.device | str = "cpu") -> Metric:
        """C' = I of width ``m``, for prices that depend on no text. No matrix is made or factored before it is
        needed."""
        return _Identity(width, 1.0, torch.device(device))

    @property
    def width(self) -> int:
        """``m``"""
        return len(self.matrix)

    def scaled(self, *, weight: float = 1.0, ridge: float = 0.0) -> Metric:
        """``weight · C' + ridge · I`` (``mom2_update_weight`` and ``update_norm_lambda``).

        Without a ridge the Cholesky factor is scaled too instead of being computed anew.
        """
        if ridge:
            identity = torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device)
            return Metric(weight * self.matrix + ridge * identity)
        if weight == 1.0:
            return self
        factor, jitter = self.factor
        return Metric(weight * self.matrix, factor=(weight**0.5 * factor, weight * jitter))

    def plus(self, keys: Tensor, weights: Tensor) -> Metric:
        """``C' + Σ wᵢ kᵢkᵢᵀ``, which also prices what a change does to these keys.

        For h ≤ m/2 keys the Cholesky factor of C' is reused by Woodbury's identity, with m²h + mh² + h³/3 operations.
        For more keys a new factor is computed, with m²h + m³/3 operations. If keys were added to C' before, h counts
        those since its last factor, and only the new ones cost m² operations each.

        Args:
            keys: ``[h, m]``
            weights: ``[h]``, not negative.
        """
        if not len(keys):
            return self
        rows = self._weighted(keys, weights)
        if 2 * len(rows) > self.width:
            return Metric(self.matrix + rows.T @ rows)
        return _Raised(self, rows)

    def minus(self, keys: Tensor, weights: Tensor) -> Metric:
        """``C' − Σ wᵢ kᵢkᵢᵀ``, for keys that are in C'. A new factor is computed.

        Args:
            keys: ``[h, m]``
            weights: ``[h]``, not negative.

        Raises:
            NumericalError: the difference is not positive definite, so these keys are not in C'.
        """
        if not len(keys):
            return self
        rows = self._weighted(keys, weights)
        left = torch.eye(len(rows), dtype=rows.dtype, device=rows.device) - rows @ self.inverse_times(rows.T)
        if int(torch.linalg.cholesky_ex((left + left.T) / 2).info):
            raise NumericalError("The keys to be forgotten are not part of this sum; nothing was changed.")
        return Metric(self.matrix - rows.T @ rows)

    def _weighted(self, keys: Tensor, weights: Tensor) -> Tensor:
        """√W Kᵀ, ``[h, m]``."""
        return weights.to(self.matrix).clamp_min(0.0).sqrt()[:, None] * keys.to(self.matrix)

    def to(self, device: torch.device) -> Metric:
        """The same on ``device``."""
        if device == self.matrix.device:
            return self
        factor, jitter = self.factor
        return Metric(self.matrix.to(device), factor=(factor.to(device), jitter))

    @cached_property
    def factor(self) -> tuple[Tensor, float]:
        """``(L, jitter)`` with ``L Lᵀ = C' + jitter · I``.

        Jitter is zero unless C' is numerically singular. C' is singular if it comes from fewer tokens than ``m`` or if
        a unit never fires. Jitter then starts at 1e-10 of the mean diagonal and grows tenfold until the factorisation
        exists.
        """
        scale = float(self.matrix.diagonal().mean())
        if not scale > 0:
            raise NumericalError("The second moment is zero or not finite; compute it anew from more text.")
        identity = torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device)
        jitter = 0.0
        for exponent in range(-10, 1):
            factor, info = torch.linalg.cholesky_ex(self.matrix + jitter * identity)
            if int(info) == 0:
                # Row-major, as in a file, because a triangular solve rounds differently over a column-major matrix.
                return factor.contiguous(), jitter
            jitter = scale * 10.0**exponent
        raise NumericalError("The second moment has no Cholesky factor; compute it anew from more text.")

    @property
    def jitter(self) -> float:
        """The number added to the diagonal to make the factorisation exist; 0 for a well-posed C'."""
        return self.factor[1]

    def inverse_times(self, columns: Tensor) -> Tensor:
        """``C'⁻¹ X`` for ``X [m, n]``, by two triangular solves."""
        return torch.cholesky_solve(columns.double(), self.factor[0])

    def cost(self, delta: FactoredDelta) -> float:
        """tr(Δ C' Δᵀ) from the factors alone."""
        return float(self.cost_parts(delta).sum().clamp_min(0.0))

    def cost_parts(self, delta: FactoredDelta) -> Tensor:
        """The share of each term of Δ = Σ rᵢuᵢᵀ in tr(Δ C' Δᵀ), ``[rank]`` float64.

        The rᵢ are the columns of the left factor, the uᵢ the rows of the right one. A share is Σⱼ (rᵢᵀrⱼ)(uᵢᵀC' uⱼ):
        the term's own cost and half of its cross terms. It is negative if the term cancels more of the others than it
        costs itself."""
        left, right = delta.left.double(), delta.right.double()
        if delta.rank > right.shape[1]:  # rᵢᵀ(Δ C' uᵢ), without a rank × rank product
            return (left * ((left @ right) @ self.matrix @ right.T)).sum(0)
        gram_left = left.T @ left  # [rank, rank]
        return (gram_left * (right @ self.matrix @ right.T)).sum(1)

    def condition(self) -> float:
        """Ratio of the largest to the smallest squared diagonal entry of the Cholesky factor: a lower bound of
        cond(C')."""
        diagonal = self.factor[0].diagonal()
        return float((diagonal.max() / diagonal.min()) ** 2)


class _Raised(Metric):
    """``C' + UᵀU`` for few rows ``U [h, m]``, without a factorisation of its own.

    With C' = LLᵀ and B = L⁻¹Uᵀ, Woodbury's identity is (C' + UᵀU)⁻¹ = L⁻ᵀ (I − B (I + BᵀB)⁻¹ Bᵀ) L⁻¹. It includes the
    jitter of C'. ``matrix`` and ``factor`` are computed on first use.
    """

    def __init__(self, base: Metric, rows: Tensor, *, before: _Raised | None = None) -> None:
        """``before``: ``base`` with the rows that come before these, of which everything is known."""
        self._base, self._rows = base, rows
        self._whitened = torch.linalg.solve_triangular(base.factor[0], rows.T, upper=False)  # B, [m, h]
        self._gram = self._whitened.T @ self._whitened
        if before is not None:
            cross = before._whitened.T @ self._whitened
            self._gram = torch.cat([torch.cat([before._gram, cross], dim=1), torch.cat([cross.T, self._gram], dim=1)])
            self._rows = torch.cat([before._rows, rows])
            self._whitened = torch.cat([before._whitened, self._whitened], dim=1)
        identity = torch.eye(len(self._gram), dtype=rows.dtype, device=rows.device)
        self._inner = torch.linalg.cholesky(self._gram + identity)

    def plus(self, keys: Tensor, weights: Tensor) -> Metric:
        if not len(keys):
            return self
        new = self._weighted(keys, weights)
        if 2 * (len(self._rows) + len(new)) > self.width:
            return Metric(self.matrix + new.T @ new)
        return _Raised(self._base, new, before=self)

    def _weighted(self, keys: Tensor, weights: Tensor) -> Tensor:
        return self._base._weighted(keys, weights)  # needs no matrix of its own

    @cached_property
    def matrix(self) -> Tensor:  # type: ignore[override]  # made when asked for
        return self._base.matrix + self._rows.T @ self._rows

    @property
    def jitter(self) -> float:
        return self._base.jitter

    def inverse_times(self, columns: Tensor) -> Tensor:
        factor = self._base.factor[0]
        white = torch.linalg.solve_triangular(factor, columns.double(), upper=False)  # L⁻¹X, [m, n]
        white = white - self._whitened @ torch.cholesky_solve(self._whitened.T @ white, self._inner)
        solved: Tensor = torch.linalg.solve_triangular(factor.T, white, upper=True)
        return solved

    def cost(self, delta: FactoredDelta) -> float:
        moved = delta.left.double() @ (delta.right.double() @ self._rows.T)  # Δ Uᵀ, [d, h]
        return self._base.cost(delta) + float(moved.square().sum())


class _Identity(Metric):
    """``c · I``. Only c is kept; the matrix is made on first use."""

    def __init__(self, width: int, scale: float, device: torch.device) -> None:
        self._width, self._scale, self._device = width, scale, device

    @property
    def width(self) -> int:
        return self._width

    @cached_property
    def matrix(self) -> Tensor:  # type: ignore[override]  # made when asked for
        return self._scale * torch.eye(self._width, dtype=torch.float64, device=self._device)

    @cached_property
    def factor(self) -> tuple[Tensor, float]:
        return self._scale**0.5 * torch.eye(self._width, dtype=torch.float64, device=self._device), 0.0

    @property
    def jitter(self) -> float:
        return 0.0

    def scaled(self, *, weight: float = 1.0, ridge: float = 0.0) -> Metric:
        return _Identity(self._width, weight * self._scale + ridge, self._device)

    def to(self, device: torch.device) -> Metric:
        return _Identity(self._width, self._scale, device)

    def inverse_times(self, columns: Tensor) -> Tensor:
        return columns.double() / self._scale

    def cost_parts(self, delta: FactoredDelta) -> Tensor:
        left, right = delta.left.double(), delta.right.double()
        if delta.rank > right.shape[1]:
            return self._scale * (left * ((left @ right) @ right.T)).sum(0)
        return self._scale * ((left.T @ left) * (right @ right.T)).sum(1)

    def condition(self) -> float:
        return 1.0


@documented
@dataclass(frozen=True, slots=True)
class Update:
    """One solved layer."""

    delta: FactoredDelta
    """``left [d, n]`` = Rᵀ-side, ``right [n, m]`` = (KᵀC'⁻¹K + Λ)⁻¹KᵀC'⁻¹."""
    energies: Tensor
    """q = kᵀC'⁻¹k of each edit, ``[n]``. After :func:`hold_at` it is k_heldᵀC'⁻¹k, with both keys."""
    fractions: Tensor
    """Share of its residual that each edit gets, ``⟨Δk, r⟩ / ⟨r, r⟩``, ``[n]``; 1 if the residual is zero."""
    condition: float
    """Condition number of the n × n system without dependent directions."""
    dependent: int
    """Directions that the keys do not span: 0 unless two edits have (nearly) the same key."""
    alignments: Tensor | None = None
    """Cosine, in the metric C'⁻¹, between the key along which a change is written and the key at which it is held,
    ``[n]``; ``None`` if they are the same."""


def solve_update(
    keys: Tensor,
    residuals: Tensor,
    metric: Metric,
    *,
    ridge: float = 0.0,
    tikhonov: float = 0.0,
    weights: Tensor | None = None,
) -> Update:
    """The cheapest change that gives every key its residual.

    With ``ridge`` = 0: minimise tr(Δ C' Δᵀ) subject to Δ kᵢ = rᵢ. Weights then have no effect. Constraints that
    contradict each other (equal keys, different residuals) are met in the least-squares sense.

    With ``ridge`` = λ > 0: minimise Σ wᵢ ‖Δ kᵢ − rᵢ‖² + λ tr(Δ C' Δᵀ).

    ``tikhonov`` = τ adds τqᵢ to each fact's λ, where q = kᵀC'⁻¹k is the fact's own entry of the system. A fact alone
    then gets 1/(1 + τ/w) of its residual, whatever the scale of its key. The system is scaled to unit diagonal when it
    is solved; its condition number is then at most 1 + n/τ for weights of 1.

    The n × n form is solved if n ≤ m, otherwise the m × m form. There, without ridge and tikhonov, ``dependent`` is n −
    m. On a subspace (:class:`SubspaceMetric`) the solve is the same in its coordinates.

    Args:
        keys: ``[n, m]``
        residuals: ``[n, d]``
        weights: ``[n]``, positive; left out, 1.

    Raises:
        NumericalError: keys or residuals are not finite.
    """
    keys, residuals = keys.double(), residuals.double()
    if metric.subspace is not None:
        basis, inner = metric.subspace
        update = solve_update(keys @ basis, residuals, inner, ridge=ridge, tikhonov=tikhonov, weights=weights)
        return replace(update, delta=FactoredDelta(update.delta.left, update.delta.right @ basis.T))
    if not torch.isfinite(keys).all():
        raise NumericalError(
            "Keys hold NaN or Inf: the model itself gives them for these facts; nothing was applied. Compute in "
            "float32, or look for NaN in the model's weights."
        )
    if not torch.isfinite(residuals).all():
        raise NumericalError(
            "Residuals hold NaN or Inf, so the change that the facts ask for is not a number; nothing was applied. "
            "Compute in float32."
        )
    solved_keys = metric.inverse_times(keys.T)  # C'⁻¹K, [m, n]
    inverse_weights = torch.ones_like(keys[:, 0]) if weights is None else 1.0 / weights.to(keys)
    energies = (keys * solved_keys.T).sum(1)
    diagonal = (ridge + tikhonov * energies) * inverse_weights  # Λ, [n]
    if (ridge > 0 or tikhonov > 0) and len(keys) > keys.shape[1]:
        right, condition = _wide_ridge(keys, metric, diagonal)
        dependent = 0
    elif len(keys) > keys.shape[1]:
        right, condition = _wide(keys, metric)
        dependent = len(keys) - keys.shape[1]
    else:
        right, condition, dependent = _square(keys, solved_keys, diagonal)
    delta = FactoredDelta(residuals.T.contiguous(), right)
    # Δ kᵢ, [n, d], through the smaller intermediate product: n × n or m × d.
    reached = keys @ (right.T @ residuals) if len(keys) > keys.shape[1] else (keys @ right.T) @ residuals
    asked = (residuals * residuals).sum(1)
    fractions = torch.where(asked > 0, (reached * residuals).sum(1) / asked.clamp_min(1e-300), torch.ones_like(asked))
    return Update(delta, energies, fractions, condition, dependent)


def hold_at(update: Update, keys: Tensor, held: Tensor, metric: Metric) -> Update:
    """Rescale an exact update (λ = 0) for ``keys`` within its row space, so that the keys ``held`` get the residuals.

    The result is Δ = R (KᵀC'⁻¹K_held)⁻¹KᵀC'⁻¹. For one fact this is ROME's reference code: written along C'⁻¹k, and
    divided by k_heldᵀC'⁻¹k. The cheapest change with the same values is written along C'⁻¹k_held. This one costs 1/cos²
    times as much, where the cosine is that of ``alignments``.

    Args:
        keys: ``[n, m]``, for which ``update`` was solved.
        held: ``[n, m]``

    Raises:
        NumericalError: the held keys are orthogonal to those along which the update is written.
    """
    keys, held = keys.double(), held.double()
    right = update.delta.right
    reached = right @ held.T  # [n, n], the identity if held is keys
    scaled, info = torch.linalg.solve_ex(reached, right)
    if int(info) != 0 or not torch.isfinite(scaled).all():
        raise NumericalError(
            "The key at which a fact is held is orthogonal to the key along which it is written; nothing was applied. "
            "Use the same key for both."
        )
    solved = metric.inverse_times(held.T)  # C'⁻¹K_held, [m, n]
    energies = (solved.T * keys).sum(1)
    own = ((solved.T * held).sum(1) * update.energies).clamp_min(1e-300).sqrt()
    return replace(
        update,
        delta=FactoredDelta(update.delta.left, scaled),
        energies=energies,
        fractions=torch.ones_like(update.fractions),
        alignments=energies / own,
    )


def norm_of_sum(changes: Sequence[WeightChange]) -> float:
    """‖Σ Δ‖, the Frobenius norm of the sum of several changes of one weight, in float64.

    For factored changes it is computed from the Gram matrices of the joined factors, as long as the sum of their ranks
    is below the weight's widths. Above that, the sum itself is the smaller matrix.
    """
    if not changes:
        return 0.0
    thin = [change for change in changes if isinstance(change, FactoredDelta)]
    if len(thin) == len(changes) and sum(change.rank for change in thin) < min(thin[0].shape):
        lefts, rights = [change.left.double() for change in thin], [change.right.double() for change in thin]
        return FactoredDelta(torch.cat(lefts, dim=1), torch.cat(rights)).norm()
    device = next(iter(changes[0].tensors().values())).device
    total = torch.zeros(changes[0].shape, dtype=torch.float64, device=device)
    for change in changes:
        if isinstance(change, FactoredDelta):
            total.addmm_(change.left.double(), change.right.double())
        else:
            total += change.value.double()
    return float(total.norm())


def _square(keys: Tensor, solved_keys: Tensor, diagonal: Tensor) -> tuple[Tensor, float, int]:
    """``(KᵀC'⁻¹K + Λ)⁻¹KᵀC'⁻¹`` by the symmetric eigendecomposition of the n × n system.

    The system is scaled to unit diagonal first, so that facts with small keys do not look dependent. If it is singular
    (equal keys), the pseudo-inverse gives equal keys the mean of their residuals.
    """
    gram = keys @ solved_keys  # KᵀC'⁻¹K, [n, n]
    system = (gram + gram.T) / 2 + torch.diag(diagonal)
    scale = system.diagonal().clamp_min(1e-300).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * system * scale[None, :])
    kept = values > _RANK_TOLERANCE * values[-1]
    inverse = torch.where(kept, 1.0 / torch.where(kept, values, torch.ones_like(values)), torch.zeros_like(values))
    right = scale[:, None] * (vectors @ (inverse[:, None] * (vectors.T @ (scale[:, None] * solved_keys.T))))
    return right, float(values[-1] / values[kept][0]), int((~kept).sum())


def _wide(keys: Tensor, metric: Metric) -> tuple[Tensor, float]:
    """The right factor by an m × m system, for more constraints than ``m``. With C' = LLᵀ and K̃ = L⁻¹K, it is
    (KᵀC'⁻¹K)⁺KᵀC'⁻¹ = K̃ᵀ(K̃K̃ᵀ)⁺L⁻¹, which meets the constraints in the least-squares sense."""
    factor = metric.factor[0]
    whitened = torch.linalg.solve_triangular(factor, keys.T, upper=False)  # K̃, [m, n]
    values, vectors = torch.linalg.eigh(whitened @ whitened.T)
    kept = values > _RANK_TOLERANCE * values[-1]
    inverse = torch.where(kept, 1.0 / torch.where(kept, values, torch.ones_like(values)), torch.zeros_like(values))
    spread = vectors @ (inverse[:, None] * (vectors.T @ whitened))  # (K̃K̃ᵀ)⁺K̃, [m, n]
    right = torch.linalg.solve_triangular(factor.T, spread, upper=True).T
    return right, float(values[-1] / values[kept][0])


def _wide_ridge(keys: Tensor, metric: Metric, diagonal: Tensor) -> tuple[Tensor, float]:
    """The right factor by an m × m system, ``Λ⁻¹Kᵀ(KΛ⁻¹Kᵀ + C')⁻¹``, for more edits than ``m``."""
    weighted = keys / diagonal[:, None]  # Λ⁻¹Kᵀ, [n, m]
    system = keys.T @ weighted + metric.matrix  # [m, m]
    system = (system + system.T) / 2
    factor = torch.linalg.cholesky(system)
    pivots = factor.diagonal()
    return torch.cholesky_solve(weighted.T, factor).T, float((pivots.max() / pivots.min()) ** 2)
