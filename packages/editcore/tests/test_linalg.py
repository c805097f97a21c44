"""The solve against an independent oracle: the optimality conditions, and a dense solution by other means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from editcore import FactoredDelta, NumericalError
from editcore.second_moments.linalg import Metric, hold_at, norm_of_sum, solve_update
from hypothesis import given, settings, strategies as st
from torch import Tensor


def problem(seed: int, n: int, m: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [n, m], residuals [n, d] and a well-posed second moment [m, m]."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(4 * m, m, generator=generator, dtype=torch.float64)
    return (
        torch.randn(n, m, generator=generator, dtype=torch.float64),
        torch.randn(n, d, generator=generator, dtype=torch.float64),
        samples.T @ samples / len(samples),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


sizes = st.tuples(st.integers(0, 10_000), st.integers(1, 8), st.integers(8, 20), st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_without_ridge_every_key_gets_its_residual(size: tuple[int, int, int, int]) -> None:
    keys, residuals, moment = problem(*size)
    update = solve_update(keys, residuals, Metric(moment))
    assert relative(keys @ update.delta.dense().T, residuals) < 1e-8
    assert torch.allclose(update.fractions, torch.ones(len(keys), dtype=torch.float64), atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_without_ridge_no_other_solution_costs_less(size: tuple[int, int, int, int]) -> None:
    """KKT: the gradient ΔC of the cost is a combination of the constraints' normals, so it vanishes on their null
    space."""
    keys, residuals, moment = problem(*size)
    delta = solve_update(keys, residuals, Metric(moment)).delta.dense()
    _, singular, right = np.linalg.svd(keys.numpy())
    free = torch.from_numpy(right[len(singular) :])  # directions that no key sees, [m - n, m]
    gradient = delta @ moment  # [d, m]
    assert (gradient @ free.T).norm() <= 1e-8 * gradient.norm()


@settings(max_examples=60, deadline=None)
@given(sizes, st.floats(1e-3, 1e3))
def test_ridge_equals_weighted_least_squares(size: tuple[int, int, int, int], ridge: float) -> None:
    """The normal equations Δ (K W Kᵀ + λC) = R W Kᵀ, solved densely by numpy."""
    keys, residuals, moment = problem(*size)
    weights = torch.rand(len(keys), generator=torch.Generator().manual_seed(size[0]), dtype=torch.float64) + 0.1
    found = solve_update(keys, residuals, Metric(moment), ridge=ridge, weights=weights).delta.dense()
    weighted = (weights[:, None] * keys).numpy()
    system = keys.numpy().T @ weighted + ridge * moment.numpy()
    expected = np.linalg.solve(system, weighted.T @ residuals.numpy()).T
    assert relative(found, torch.from_numpy(expected)) < 1e-8


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-2, 10.0))
def test_more_edits_than_width_solves_the_same_problem_from_the_other_side(seed: int, ridge: float) -> None:
    keys, residuals, moment = problem(seed, 30, 6, 3)
    weights = torch.linspace(0.5, 2.0, 30, dtype=torch.float64)
    found = solve_update(keys, residuals, Metric(moment), ridge=ridge, weights=weights).delta.dense()
    weighted = weights[:, None] * keys
    expected = torch.linalg.solve(keys.T @ weighted + ridge * moment, weighted.T @ residuals).T
    assert relative(found, expected) < 1e-8


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_more_constraints_than_width_are_met_in_the_least_squares_sense(seed: int) -> None:
    keys, residuals, moment = problem(seed, 30, 6, 3)
    update = solve_update(keys, residuals, Metric(moment))
    assert relative(update.delta.dense(), torch.linalg.lstsq(keys, residuals).solution.T) < 1e-8
    assert update.dependent == 24


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_parts_of_the_cost_are_those_of_the_dense_change(seed: int, rank: int) -> None:
    keys, residuals, moment = problem(seed, rank, 6, 5)
    metric, delta = Metric(moment), FactoredDelta(residuals.T, keys)
    priced = delta.dense() @ moment  # [d, m]
    expected = torch.stack([(priced @ key) @ residual for key, residual in zip(keys, residuals, strict=True)])
    assert relative(metric.cost_parts(delta), expected) < 1e-10
    assert metric.cost(delta) == pytest.approx(float((priced @ delta.dense().T).trace()))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-2, 1e3), st.sampled_from([0.0, 0.3]))
def test_a_scaled_metric_has_the_factor_of_the_scaled_matrix(seed: int, weight: float, ridge: float) -> None:
    moment = problem(seed, 1, 6, 1)[2]
    known = Metric(moment)
    scaled = known.scaled(weight=weight, ridge=ridge)
    factor, jitter = scaled.factor
    assert jitter == 0.0
    assert relative(factor @ factor.T, weight * moment + ridge * torch.eye(6, dtype=torch.float64)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_the_change_lies_in_the_span_of_solved_keys(size: tuple[int, int, int, int]) -> None:
    keys, residuals, moment = problem(*size)
    delta = solve_update(keys, residuals, Metric(moment)).delta.dense()
    span = torch.linalg.solve(moment, keys.T)  # C⁻¹K, [m, n]
    projector = span @ torch.linalg.pinv(span)
    assert relative(delta @ projector, delta) < 1e-8


@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_scale_of_the_second_moment_cancels_without_ridge(seed: int, scale: float) -> None:
    keys, residuals, moment = problem(seed, 4, 9, 3)
    plain = solve_update(keys, residuals, Metric(moment)).delta.dense()
    scaled = solve_update(keys, residuals, Metric(moment).scaled(weight=scale)).delta.dense()
    assert relative(scaled, plain) < 1e-8


def test_weights_have_no_effect_on_constraints_and_move_ridge_fractions() -> None:
    keys, residuals, moment = problem(3, 4, 9, 3)
    heavy = torch.tensor([100.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    plain = solve_update(keys, residuals, Metric(moment))
    weighted = solve_update(keys, residuals, Metric(moment), weights=heavy)
    assert relative(weighted.delta.dense(), plain.delta.dense()) < 1e-10
    light = solve_update(keys, residuals, Metric(moment), ridge=5.0)
    favoured = solve_update(keys, residuals, Metric(moment), ridge=5.0, weights=heavy)
    missed = [(keys[0] @ update.delta.dense().T - residuals[0]).norm() for update in (light, favoured)]
    assert missed[1] < 0.2 * missed[0]


def test_equal_keys_share_the_mean_of_what_they_ask() -> None:
    keys, residuals, moment = problem(5, 3, 9, 4)
    keys[1] = keys[0]
    update = solve_update(keys, residuals, Metric(moment))
    reached = keys @ update.delta.dense().T
    assert update.dependent == 1
    assert relative(reached[0], (residuals[0] + residuals[1]) / 2) < 1e-8
    assert relative(reached[2], residuals[2]) < 1e-8


def test_cost_and_norm_come_from_the_factors() -> None:
    keys, residuals, moment = problem(7, 4, 9, 3)
    delta = solve_update(keys, residuals, Metric(moment)).delta
    dense = delta.dense()
    assert Metric(moment).cost(delta) == pytest.approx(float(torch.trace(dense @ moment @ dense.T)), rel=1e-10)
    assert delta.norm() == pytest.approx(float(dense.norm()), rel=1e-10)


def test_a_singular_second_moment_is_lifted_and_says_so() -> None:
    keys, residuals, _ = problem(9, 3, 8, 2)
    few = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric = Metric(few.T @ few)  # rank 2 of 8
    update = solve_update(keys, residuals, metric)
    assert metric.jitter > 0
    assert relative(keys @ update.delta.dense().T, residuals) < 1e-4
    assert Metric(torch.eye(8, dtype=torch.float64)).jitter == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    keys, residuals, moment = problem(1, 2, 5, 2)
    for number, what in enumerate(["Keys hold NaN or Inf: the model", "Residuals hold NaN or Inf, so the change"]):
        values = [keys.clone(), residuals.clone()]
        values[number][0, 0] = bad
        with pytest.raises(NumericalError, match=f"{what}.* nothing was applied"):
            solve_update(*values, Metric(moment))


def test_factors_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match="do not multiply"):
        FactoredDelta(torch.zeros(3, 2), torch.zeros(3, 4))


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_an_update_held_elsewhere_gives_those_keys_their_residual(size: tuple[int, int, int, int]) -> None:
    """Δ = R (KᵀC⁻¹K')⁻¹KᵀC⁻¹ by numpy's inverses, with K' near K, as the keys of one fact are."""
    keys, residuals, moment = problem(*size)
    held = keys + 0.2 * torch.randn(keys.shape, generator=torch.Generator().manual_seed(size[0]), dtype=torch.float64)
    metric = Metric(moment)
    update = hold_at(solve_update(keys, residuals, metric), keys, held, metric)
    inverse = np.linalg.inv(moment.numpy())
    system = keys.numpy() @ inverse @ held.numpy().T
    expected = residuals.numpy().T @ np.linalg.inv(system) @ keys.numpy() @ inverse
    assert relative(update.delta.dense(), torch.from_numpy(expected)) < 1e-8 * np.linalg.cond(system)
    assert np.allclose(update.energies, np.diagonal(system))
    assert update.alignments is not None
    assert (update.alignments.abs() <= 1 + 1e-12).all()


def test_an_update_held_where_it_was_solved_is_itself() -> None:
    keys, residuals, moment = problem(0, 3, 8, 4)
    metric = Metric(moment)
    update = solve_update(keys, residuals, metric)
    again = hold_at(update, keys, keys, metric)
    assert relative(again.delta.dense(), update.delta.dense()) < 1e-10
    assert again.alignments is not None
    assert torch.allclose(again.alignments, torch.ones(3, dtype=torch.float64))


def test_one_fact_pays_for_being_held_elsewhere() -> None:
    """1/cos² times the cheapest change that holds there."""
    keys, residuals, moment = problem(1, 1, 8, 4)
    held = problem(2, 1, 8, 4)[0]
    metric = Metric(moment)
    update = hold_at(solve_update(keys, residuals, metric), keys, held, metric)
    cheapest = solve_update(held, residuals, metric)
    assert update.alignments is not None
    ratio = metric.cost(update.delta) / metric.cost(cheapest.delta)
    assert ratio == pytest.approx(float(update.alignments[0]) ** -2, rel=1e-8)


def test_orthogonal_keys_cannot_be_held() -> None:
    keys, residuals = torch.eye(1, 4), torch.ones(1, 2)
    metric = Metric(torch.eye(4))
    with pytest.raises(NumericalError, match="orthogonal"):
        hold_at(solve_update(keys, residuals, metric), keys, torch.eye(4)[1:2], metric)


# Keys that are held


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 20), st.sampled_from([1.0, 0.0, 1e-3, 1e3]))
def test_a_metric_plus_keys_is_the_sum(size: tuple[int, int, int, int], held: int, weight: float) -> None:
    """C + Σ wᵢ kᵢkᵢᵀ by a dense inverse, for few keys (Woodbury) and many (a new factor)."""
    keys, residuals, moment = problem(*size)
    generator = torch.Generator().manual_seed(size[0] + 1)
    old = torch.randn(held, keys.shape[1], generator=generator, dtype=torch.float64)
    weights = weight * (torch.rand(held, generator=generator, dtype=torch.float64) + 0.1)
    dense = moment + old.T @ (weights[:, None] * old)
    metric = Metric(moment).plus(old, weights)
    condition = float(np.linalg.cond(dense.numpy()))
    assert relative(metric.inverse_times(keys.T), torch.linalg.solve(dense, keys.T)) < 1e-12 * condition
    assert relative(metric.matrix, dense) < 1e-13
    factor, jitter = metric.factor
    assert jitter == 0.0
    assert relative(factor @ factor.T, dense) < 1e-12
    update = solve_update(keys, residuals, metric)
    expected = solve_update(keys, residuals, Metric(dense))
    assert relative(update.delta.dense(), expected.delta.dense()) < 1e-11 * condition
    assert metric.cost(update.delta) == pytest.approx(Metric(dense).cost(update.delta), rel=1e-9)


def test_a_metric_plus_keys_can_be_scaled_and_added_to() -> None:
    keys, _, moment = problem(4, 3, 12, 1)
    ones = torch.ones(3, dtype=torch.float64)
    dense = 2.0 * (moment + 2 * keys.T @ keys) + 0.5 * torch.eye(12, dtype=torch.float64)
    metric = Metric(moment).plus(keys, ones).plus(keys, ones).scaled(weight=2.0, ridge=0.5)
    assert relative(metric.inverse_times(keys.T), torch.linalg.solve(dense, keys.T)) < 1e-10


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_the_heavier_a_held_key_the_less_it_is_changed(size: tuple[int, int, int, int]) -> None:
    keys, residuals, moment = problem(*size)
    old = torch.randn(1, keys.shape[1], generator=torch.Generator().manual_seed(size[0] + 1), dtype=torch.float64)
    changes = []
    for weight in (0.0, 1.0, 100.0):
        metric = Metric(moment).plus(old, torch.tensor([weight], dtype=torch.float64))
        delta = solve_update(keys, residuals, metric).delta.dense()
        assert relative(keys @ delta.T, residuals) < 1e-7, "what is new holds exactly all the same"
        changes.append(float((old @ delta.T).norm()))
    # Up to rounding of the solve, whose keys may be nearly dependent.
    assert changes[0] >= changes[1] * (1 - 1e-7)
    assert changes[1] >= changes[2] * (1 - 1e-7)


# The Tikhonov term


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 10.0), st.floats(0.1, 10.0), st.floats(1e-3, 1e3))
def test_one_fact_gets_a_share_that_its_scale_does_not_move(
    seed: int, tikhonov: float, weight: float, scale: float
) -> None:
    keys, residuals, moment = problem(seed, 1, 8, 3)
    weights = torch.tensor([weight], dtype=torch.float64)
    update = solve_update(scale * keys, residuals, Metric(moment), tikhonov=tikhonov, weights=weights)
    assert float(update.fractions[0]) == pytest.approx(1 / (1 + tikhonov / weight), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(sizes, st.floats(1e-6, 1.0), st.sampled_from([0.0, 0.5]))
def test_tikhonov_is_a_ridge_of_each_facts_own_size(
    size: tuple[int, int, int, int], tikhonov: float, ridge: float
) -> None:
    keys, residuals, moment = problem(*size)
    weights = torch.rand(len(keys), generator=torch.Generator().manual_seed(size[0]), dtype=torch.float64) + 0.1
    inverse = np.linalg.inv(moment.numpy())
    gram = keys.numpy() @ inverse @ keys.numpy().T
    system = gram + np.diag((ridge + tikhonov * np.diagonal(gram)) / weights.numpy())
    expected = residuals.numpy().T @ np.linalg.inv(system) @ keys.numpy() @ inverse
    update = solve_update(keys, residuals, Metric(moment), ridge=ridge, tikhonov=tikhonov, weights=weights)
    assert relative(update.delta.dense(), torch.from_numpy(expected)) < 1e-12 * np.linalg.cond(system) + 1e-9


@pytest.mark.parametrize("tikhonov", [1e-6, 1e-3])
def test_tikhonov_bounds_the_condition_of_nearly_equal_keys(tikhonov: float) -> None:
    keys, residuals, moment = problem(2, 4, 9, 3)
    keys[1] = keys[0] + 1e-7 * keys[2]
    without = solve_update(keys, residuals, Metric(moment))
    update = solve_update(keys, residuals, Metric(moment), tikhonov=tikhonov)
    assert update.condition <= 1 + 4 / tikhonov
    assert without.dependent or without.condition > 1e10
    assert update.delta.norm() < without.delta.norm() or without.dependent


def test_tikhonov_serves_more_facts_than_width() -> None:
    keys, residuals, moment = problem(1, 30, 6, 3)
    update = solve_update(keys, residuals, Metric(moment), tikhonov=0.1)
    energies = (keys * torch.linalg.solve(moment, keys.T).T).sum(1)
    weighted = keys / (0.1 * energies)[:, None]
    expected = torch.linalg.solve(keys.T @ weighted + moment, weighted.T @ residuals).T
    assert relative(update.delta.dense(), expected) < 1e-8


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 4), max_size=6))
def test_the_norm_of_a_sum_is_that_of_the_dense_sum(seed: int, ranks: list[int]) -> None:
    """Ranks that stay below the widths, and ranks that pass them."""
    generator = torch.Generator().manual_seed(seed)
    deltas = [
        FactoredDelta(torch.randn(7, r, generator=generator), torch.randn(r, 9, generator=generator)) for r in ranks
    ]
    deltas += [FactoredDelta(-0.5 * delta.left, delta.right) for delta in deltas[:1]]
    dense = torch.zeros(7, 9, dtype=torch.float64)
    for delta in deltas:
        dense += delta.left.double() @ delta.right.double()
    assert norm_of_sum(deltas) == pytest.approx(float(dense.norm()), rel=1e-9)


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("n", [3, 30])
def test_the_identity_is_the_identity_without_a_matrix(
    weight: float, ridge: float, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C = I costs no m × m matrix and no factorisation."""
    keys, residuals, _ = problem(0, n, 12, 5)
    dense = Metric(torch.eye(12)).scaled(weight=weight, ridge=ridge)
    thin = Metric.identity(12).scaled(weight=weight, ridge=ridge)
    expected = solve_update(keys, residuals, dense, ridge=0.1)
    if n < 12:  # else the m × m side is solved
        monkeypatch.setattr(torch, "eye", lambda *_args, **_options: pytest.fail("a matrix was made"))
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *_args: pytest.fail("a matrix was factored"))
    found = solve_update(keys, residuals, thin, ridge=0.1)
    assert relative(found.delta.dense(), expected.delta.dense()) < 1e-12
    assert relative(found.energies, expected.energies) < 1e-12
    assert relative(thin.cost_parts(found.delta), dense.cost_parts(expected.delta)) < 1e-10
    assert (thin.width, thin.jitter, thin.condition()) == (12, 0.0, pytest.approx(dense.condition()))
    monkeypatch.undo()
    assert relative(thin.matrix, dense.matrix) < 1e-15
    assert relative(thin.factor[0], dense.factor[0]) < 1e-15
    held = thin.plus(keys[:2], torch.ones(2)).inverse_times(residuals.new_ones(12, 1))
    assert relative(held, dense.plus(keys[:2], torch.ones(2)).inverse_times(residuals.new_ones(12, 1))) < 1e-12
