"""The two factors of a change: joined, balanced, and cut to a rank.

A change Δ is a product ``left @ right``, float64. A dense one is decomposed once, in :func:`factored`; every other
decomposition here is of factors and small cores.

Shapes: ``left [d_out, rank]``, ``right [rank, d_in]``; a metric is given by L with L Lᵀ = C, ``[d_in, d_in]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from editcore import Changes, FactoredDelta, ModelError, VectorDelta, WeightChange
from torch import Tensor

__all__ = [
    "balanced",
    "check_factors",
    "dual_keys",
    "energy",
    "factored",
    "join",
    "padded",
    "project",
    "refine",
    "residual",
    "rounding",
    "strongest_terms",
]


def join(deltas: Sequence[FactoredDelta]) -> FactoredDelta:
    """The sum of changes: their factors side by side, in the given order.

    No change of a weight has a higher rank than its narrower side is wide. Where the factors side by side have one, an
    orthonormal basis of that side takes their place.
    """
    left = torch.cat([delta.left.double() for delta in deltas], dim=1)
    right = torch.cat([delta.right.double() for delta in deltas], dim=0)
    if left.shape[1] <= min(left.shape[0], right.shape[1]):
        return FactoredDelta(left, right)
    if left.shape[0] <= right.shape[1]:
        basis, rest = torch.linalg.qr(left)  # [d_out, d_out], [d_out, rank]
        return FactoredDelta(basis, rest @ right)
    basis, rest = torch.linalg.qr(right.T)  # [d_in, d_in], [d_in, rank]
    return FactoredDelta(left @ rest.T, basis.T)


def check_factors(changes: Changes, *, whose: str) -> None:
    """Refuse changes that are not a product of two factors.

    Args:
        whose: the start of the message, such as "The edits of RUN".

    Raises:
        ModelError: one of them changes a vector, or a parameter of three or more axes.
    """
    for address, change in changes.items():
        if len(change.shape) != 2:
            raise ModelError(
                f"{whose} cannot be kept as an adapter: they change '{address}', {_in_words(change)}, and an adapter "
                "holds only products of two matrices. The backend raw writes such changes into the weights."
            )


def _in_words(change: WeightChange) -> str:
    if isinstance(change, VectorDelta):
        return "a vector such as a bias or the scale of a norm"
    return f"a parameter with {len(change.shape)} axes"


def factored(change: WeightChange) -> FactoredDelta:
    """A factored or dense change of a matrix as factors.

    A factored one is returned as it is. A dense one is decomposed into singular values and vectors, in float64. The
    trailing ones are left out if together they are rounding only: less of ‖Δ‖ than √min(d_out, d_in) rounding errors
    of the change's type (of float32, if that is finer). At least one term is kept; for a change of zeros it is zero.

    Raises:
        ModelError: the change is not of a matrix.
    """
    if isinstance(change, FactoredDelta):
        return change if change.rank else _zeros(change)
    if len(change.shape) != 2:
        raise ModelError(f"A change of {_in_words(change)} is not a product of two matrices.")
    left, values, right = torch.linalg.svd(change.value.double(), full_matrices=False)
    epsilon = min(torch.finfo(change.value.dtype).eps, torch.finfo(torch.float32).eps)
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # what leaving out a value and all smaller ones costs
    kept = max(int((tails > epsilon * min(change.shape) ** 0.5 * tails[0]).sum()), 1)
    return FactoredDelta(left[:, :kept] * values[:kept], right[:kept])


def _zeros(change: FactoredDelta) -> FactoredDelta:
    """A change of rank 0 as one of rank 1, the least that an adapter has."""
    d_out, d_in = change.shape
    return FactoredDelta(change.left.new_zeros(d_out, 1), change.right.new_zeros(1, d_in))


def balanced(delta: FactoredDelta) -> FactoredDelta:
    """The same change with ‖column of left‖ = ‖row of right‖ in every rank-one term, so that neither factor leaves the
    range of a narrow type."""
    tall, wide = delta.left.norm(dim=0), delta.right.norm(dim=1)  # [rank]
    zero = (tall == 0) | (wide == 0)  # a term without effect becomes zeros
    ratio = (wide / tall.masked_fill(zero, 1.0)).sqrt().masked_fill(zero, 1.0)
    left, right = delta.left * ratio, delta.right / ratio[:, None]
    return FactoredDelta(left.masked_fill(zero, 0.0), right.masked_fill(zero[:, None], 0.0))


def padded(delta: FactoredDelta, rank: int) -> FactoredDelta:
    """The same change with zeros up to ``rank``."""
    more = rank - delta.rank
    if more < 0:
        raise ValueError(f"a change of rank {delta.rank} does not fit rank {rank}")
    return FactoredDelta(
        torch.nn.functional.pad(delta.left, (0, more)), torch.nn.functional.pad(delta.right, (0, 0, 0, more))
    )


def project(delta: FactoredDelta, rank: int, metric: Tensor | None = None) -> FactoredDelta:
    """The change BA of a rank that leaves ‖(Δ − BA) L‖ least; without a metric, ‖Δ − BA‖ (Eckart and Young 1936).

    The minimiser is U Uᵀ Δ with U the leading left singular vectors of Δ L: an orthogonal projection of the outputs, so
    that B = U, A = UᵀΔ and no system with L is solved. With left = Q T and right L = S Pᵀ, U = Q · (left singular
    vectors of T S), a core of the factors' rank.
    """
    basis, core, weighted = _core(delta, metric)
    directions, _, _ = torch.linalg.svd(core @ weighted, full_matrices=False)
    kept = directions[:, :rank]  # [rank of left, rank]
    return FactoredDelta(basis @ kept, (kept.T @ core) @ delta.right)


def _core(delta: FactoredDelta, metric: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``(Q, T, S)`` with left = Q T and right L = S Pᵀ, P with orthonormal columns: ‖Δ L‖ = ‖T S‖."""
    basis, core = torch.linalg.qr(delta.left.double())
    right = delta.right.double()
    seen = right if metric is None else right @ metric
    return basis, core, torch.linalg.qr(seen.T, mode="r").R.T


def strongest_terms(delta: FactoredDelta, rank: int, metric: Tensor | None = None) -> FactoredDelta:
    """The largest rank-one terms of a change by ‖column‖ · ‖row L‖, as they are and in their order."""
    right = delta.right if metric is None else delta.right @ metric
    lengths = delta.left.norm(dim=0) * right.norm(dim=1)
    kept = lengths.argsort(descending=True, stable=True)[:rank].sort().values
    return FactoredDelta(delta.left[:, kept], delta.right[kept])


def residual(exact: FactoredDelta, found: FactoredDelta) -> FactoredDelta:
    """Δ − BA, as factors."""
    return FactoredDelta(torch.cat([exact.left, -found.left], dim=1), torch.cat([exact.right, found.right], dim=0))


def energy(delta: FactoredDelta, metric: Tensor | None = None) -> float:
    """‖Δ L‖², without a metric ‖Δ‖²; from orthonormal bases, so that terms that cancel cost no digits."""
    _, core, weighted = _core(delta, metric)
    return float((core @ weighted).square().sum())


def rounding(exact: FactoredDelta, written: FactoredDelta) -> float:
    """‖written − Δ‖ / ‖Δ‖: what the type of a file loses, in units of the edit."""
    whole = energy(exact)
    return sqrt(energy(residual(exact, written)) / whole) if whole > 0 else 0.0


def dual_keys(right: Tensor, moment: Tensor) -> Tensor:
    """For each row of one batch's ``right``, the input that excites it alone: ``K (right C rightᵀ)⁻¹ right C``,
    ``[rank, d_in]``, the shortest such input in C⁻¹.

    A closed-form edit writes ``right = (KᵀC⁻¹K)⁻¹KᵀC⁻¹``; then these are its keys K, to the letter. A ridge or a scale
    mixes them within their span.
    """
    seen = right @ moment  # [rank, d_in]
    gram = seen @ right.T
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()  # to unit diagonal: keys may be of very different lengths
    inverse = torch.linalg.pinv(scale[:, None] * (gram + gram.T) / 2 * scale, hermitian=True, rtol=1e-12)
    keys: Tensor = scale[:, None] * (inverse @ (scale[:, None] * seen))
    return keys


def refine(
    exact: FactoredDelta, found: FactoredDelta, keys: Tensor, steps: int, metric: Tensor | None = None
) -> FactoredDelta:
    """Lower ‖(Δ − BA)Kᵀ‖² / ‖ΔKᵀ‖² + ‖(Δ − BA)L‖² / ‖ΔL‖² from where ``found`` stands, by L-BFGS.

    The second term preserves what the cut keeps on inputs other than the keys ``K [n, d_in]``. B stays within the span
    of the exact change's outputs, where its gradient lies. ``found`` is returned if the steps did not lower the sum.
    """
    basis, core = torch.linalg.qr(exact.left.double())
    start = balanced(found)
    outputs = (basis.T @ start.left).detach().requires_grad_(True)  # [rank of left, rank]
    inputs = start.right.detach().clone().requires_grad_(True)  # [rank, d_in]
    change = core @ exact.right  # [rank of left, d_in]

    def seen(part: Tensor) -> tuple[Tensor, Tensor]:
        return part @ keys.T, part if metric is None else part @ metric

    wholes = [max(float(whole.square().sum()), 1e-300) for whole in seen(change)]

    def loss() -> Tensor:
        on_keys, elsewhere = (missed.square().sum() for missed in seen(change - outputs @ inputs))
        return on_keys / wholes[0] + elsewhere / wholes[1]

    optimiser = torch.optim.LBFGS(
        [outputs, inputs], max_iter=steps, max_eval=25 * steps, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        before = float(loss().detach())
        optimiser.step(closure)  # type: ignore[no-untyped-call]
        after = float(loss().detach())
    better = after < before  # NaN is not
    return FactoredDelta(basis @ outputs.detach(), inputs.detach()) if better else found
