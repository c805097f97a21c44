"""The algebra of thin factors, by property, against dense float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from edit_lora.factors import (
    balanced,
    dual_keys,
    energy,
    join,
    padded,
    project,
    refine,
    residual,
    strongest_terms,
)
from editcore import FactoredDelta
from editcore.second_moments.linalg import Metric, solve_update
from hypothesis import given, settings, strategies as st
from torch import Tensor

sizes = st.integers(1, 12)
seeds = st.integers(0, 10_000)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def delta(seed: int, d_out: int, d_in: int, rank: int) -> FactoredDelta:
    return FactoredDelta(draw(seed, d_out, rank), draw(seed + 1, rank, d_in))


def moment(seed: int, d_in: int) -> Metric:
    """A second moment whose directions differ in size by orders, as those of real keys do."""
    keys = draw(seed, 4 * d_in, d_in) * torch.logspace(0, -3, d_in, dtype=torch.float64)
    return Metric(keys.T @ keys / len(keys))


@settings(deadline=None)
@given(seeds, sizes, sizes, st.lists(sizes, min_size=1, max_size=4))
def test_joined_factors_are_the_sum_and_no_wider_than_the_weight(
    seed: int, d_out: int, d_in: int, ranks: list[int]
) -> None:
    deltas = [delta(seed + n, d_out, d_in, rank) for n, rank in enumerate(ranks)]
    joined = join(deltas)
    torch.testing.assert_close(joined.dense(), sum(one.dense() for one in deltas))
    assert joined.rank == min(sum(ranks), d_out, d_in)


@settings(deadline=None)
@given(seeds, sizes, sizes, sizes, st.integers(-120, 120))
def test_balancing_shares_the_length_and_keeps_the_change(
    seed: int, d_out: int, d_in: int, rank: int, power: int
) -> None:
    one = delta(seed, d_out, d_in, rank)
    skewed = FactoredDelta(one.left * 10.0**power, one.right / 10.0**power)
    even = balanced(skewed)
    torch.testing.assert_close(even.dense(), one.dense())
    torch.testing.assert_close(even.left.norm(dim=0), even.right.norm(dim=1))


def test_a_term_without_effect_becomes_zero_on_both_sides() -> None:
    left, right = draw(0, 4, 3), draw(1, 3, 5)
    left[:, 0], right[2] = 0.0, 0.0
    even = balanced(FactoredDelta(left, right))
    assert not even.right[0].any()
    assert not even.left[:, 2].any()
    torch.testing.assert_close(even.dense(), left @ right)


def test_padding_adds_zeros_and_refuses_to_cut() -> None:
    one = delta(0, 4, 5, 3)
    torch.testing.assert_close(padded(one, 8).dense(), one.dense())
    assert padded(one, 8).rank == 8
    with pytest.raises(ValueError, match="rank 3 does not fit rank 2"):
        padded(one, 2)


@settings(deadline=None)
@given(seeds, st.integers(2, 10), st.integers(2, 10), st.integers(2, 12), st.booleans())
def test_the_cut_is_the_best_there_is(seed: int, d_out: int, d_in: int, rank: int, weighted: bool) -> None:
    """‖(Δ − BA) L‖² is the tail of the dense spectrum of Δ L, which no change of that rank undercuts."""
    one = join([delta(seed, d_out, d_in, rank)])
    metric = moment(seed, d_in).factor[0] if weighted else None
    kept = max(1, one.rank // 2)
    cut = project(one, kept, metric)
    assert cut.rank == kept
    seen = one.dense() if metric is None else one.dense() @ metric
    spectrum = torch.linalg.svdvals(seen)
    missed = (one.dense() - cut.dense()) if metric is None else (one.dense() - cut.dense()) @ metric
    expected = float(spectrum[kept:].square().sum())
    # Rounding of the largest direction is all that may be added.
    assert float(missed.square().sum()) == pytest.approx(expected, rel=1e-6, abs=1e-18 * float(spectrum[0] ** 2))


@settings(deadline=None)
@given(seeds, sizes, sizes, sizes)
def test_a_cut_at_full_rank_is_the_change_itself(seed: int, d_out: int, d_in: int, rank: int) -> None:
    one = join([delta(seed, d_out, d_in, rank)])
    torch.testing.assert_close(project(one, one.rank).dense(), one.dense())
    torch.testing.assert_close(strongest_terms(one, one.rank).dense(), one.dense())


@settings(deadline=None)
@given(seeds, st.integers(2, 10), st.integers(2, 10))
def test_energy_is_the_dense_norm_and_survives_cancellation(seed: int, d_out: int, d_in: int) -> None:
    one, metric = delta(seed, d_out, d_in, 3), moment(seed, d_in).factor[0]
    assert energy(one) == pytest.approx(float(one.dense().square().sum()))
    assert energy(one, metric) == pytest.approx(float((one.dense() @ metric).square().sum()))
    huge = delta(seed + 7, d_out, d_in, 2)
    cancelling = join([one, huge, FactoredDelta(-huge.left, huge.right)])
    assert energy(cancelling) == pytest.approx(energy(one), rel=1e-9)
    assert energy(residual(one, one)) <= 1e-28 * energy(one)


def test_the_largest_terms_are_kept_in_their_order() -> None:
    left = torch.eye(4, dtype=torch.float64)[:, :3]
    right = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    kept = strongest_terms(FactoredDelta(left, right), 2)
    torch.testing.assert_close(kept.right, right[1:])
    cheap = torch.diag(torch.tensor([1.0, 1e-3, 1.0], dtype=torch.float64))  # the second direction never occurs
    torch.testing.assert_close(strongest_terms(FactoredDelta(left, right), 2, cheap).right, right[[0, 2]])


@settings(deadline=None)
@given(seeds, st.integers(1, 5))
def test_the_keys_of_a_closed_form_edit_are_found_from_its_right_factor(seed: int, num_edits: int) -> None:
    metric = moment(seed, 8)
    keys, residuals = draw(seed + 1, num_edits, 8), draw(seed + 2, num_edits, 6)
    update = solve_update(keys, residuals, metric)
    found = dual_keys(update.delta.right, metric.matrix)
    torch.testing.assert_close(found, keys, rtol=1e-5, atol=1e-6)


def test_keys_that_depend_on_each_other_stay_finite() -> None:
    metric = moment(0, 8)
    keys = draw(1, 2, 8)[[0, 1, 0]]
    update = solve_update(keys, draw(2, 3, 6), metric)
    found = dual_keys(update.delta.right, metric.matrix)
    assert torch.isfinite(found).all()
    zeros = torch.zeros(2, 8, dtype=torch.float64)
    torch.testing.assert_close(dual_keys(zeros, metric.matrix), zeros)


@pytest.mark.parametrize("weighted", [True, False])
def test_refining_lowers_the_error_on_the_keys_and_never_raises_the_sum(weighted: bool) -> None:
    metric = moment(3, 16)
    keys = draw(4, 8, 16) * torch.logspace(0, -3, 16, dtype=torch.float64)
    exact = solve_update(keys, draw(5, 8, 12), metric).delta
    price = metric.factor[0] if weighted else None
    start = project(exact, 3, price)

    def errors(found: FactoredDelta) -> tuple[float, float]:
        missed = residual(exact, found)
        return energy(missed, keys.T) / energy(exact, keys.T), energy(missed, price) / energy(exact, price)

    before, after = errors(start), errors(refine(exact, start, keys, 100, price))
    assert after[0] < 0.98 * before[0]
    assert sum(after) <= sum(before)
