"""The algebra of thin factors, by property, against dense float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from edit_lora.factors import (
    balanced,
    dual_keys,
    energy,
    factored,
    join,
    padded,
    project,
    refine,
    residual,
    strongest_terms,
)
from edit_lora.hparams import LoraHParams
from edit_lora.reduction import reduce, without_moment
from editcore import DenseDelta, FactoredDelta, ModelError, NumericalError, VectorDelta
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
    torch.testing.assert_close(joined.dense(), sum(delta.dense() for delta in deltas))
    assert joined.rank == min(sum(ranks), d_out, d_in)


@settings(deadline=None)
@given(seeds, sizes, sizes, sizes, st.integers(-120, 120))
def test_balancing_shares_the_length_and_keeps_the_change(
    seed: int, d_out: int, d_in: int, rank: int, power: int
) -> None:
    change = delta(seed, d_out, d_in, rank)
    skewed = FactoredDelta(change.left * 10.0**power, change.right / 10.0**power)
    even = balanced(skewed)
    torch.testing.assert_close(even.dense(), change.dense())
    torch.testing.assert_close(even.left.norm(dim=0), even.right.norm(dim=1))


def test_a_term_without_effect_becomes_zero_on_both_sides() -> None:
    left, right = draw(0, 4, 3), draw(1, 3, 5)
    left[:, 0], right[2] = 0.0, 0.0
    even = balanced(FactoredDelta(left, right))
    assert not even.right[0].any()
    assert not even.left[:, 2].any()
    torch.testing.assert_close(even.dense(), left @ right)


def test_padding_adds_zeros_and_refuses_to_cut() -> None:
    change = delta(0, 4, 5, 3)
    torch.testing.assert_close(padded(change, 8).dense(), change.dense())
    assert padded(change, 8).rank == 8
    with pytest.raises(ValueError, match="rank 3 does not fit rank 2"):
        padded(change, 2)


@settings(deadline=None)
@given(seeds, st.integers(2, 10), st.integers(2, 10), st.integers(2, 12), st.booleans())
def test_the_cut_is_the_best_there_is(seed: int, d_out: int, d_in: int, rank: int, weighted: bool) -> None:
    """‖(Δ − BA) L‖² is the tail of the dense spectrum of Δ L, which no change of that rank undercuts."""
    change = join([delta(seed, d_out, d_in, rank)])
    metric = moment(seed, d_in).factor[0] if weighted else None
    kept = max(1, change.rank // 2)
    cut = project(change, kept, metric)
    assert cut.rank == kept
    seen = change.dense() if metric is None else change.dense() @ metric
    spectrum = torch.linalg.svdvals(seen)
    missed = (change.dense() - cut.dense()) if metric is None else (change.dense() - cut.dense()) @ metric
    expected = float(spectrum[kept:].square().sum())
    # Rounding of the largest direction is all that may be added.
    assert float(missed.square().sum()) == pytest.approx(expected, rel=1e-6, abs=1e-18 * float(spectrum[0] ** 2))


@settings(deadline=None)
@given(seeds, sizes, sizes, sizes)
def test_a_cut_at_full_rank_is_the_change_itself(seed: int, d_out: int, d_in: int, rank: int) -> None:
    change = join([delta(seed, d_out, d_in, rank)])
    torch.testing.assert_close(project(change, change.rank).dense(), change.dense())
    torch.testing.assert_close(strongest_terms(change, change.rank).dense(), change.dense())


@settings(deadline=None)
@given(seeds, st.integers(2, 10), st.integers(2, 10))
def test_energy_is_the_dense_norm_and_survives_cancellation(seed: int, d_out: int, d_in: int) -> None:
    change, metric = delta(seed, d_out, d_in, 3), moment(seed, d_in).factor[0]
    assert energy(change) == pytest.approx(float(change.dense().square().sum()))
    assert energy(change, metric) == pytest.approx(float((change.dense() @ metric).square().sum()))
    huge = delta(seed + 7, d_out, d_in, 2)
    cancelling = join([change, huge, FactoredDelta(-huge.left, huge.right)])
    assert energy(cancelling) == pytest.approx(energy(change), rel=1e-9)
    assert energy(residual(change, change)) <= 1e-28 * energy(change)


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


# Dense changes


@settings(deadline=None)
@given(seeds, sizes, sizes, st.sampled_from([torch.float32, torch.float64]))
def test_a_dense_change_is_its_factors_to_rounding(seed: int, d_out: int, d_in: int, dtype: torch.dtype) -> None:
    value = draw(seed, d_out, d_in).to(dtype)
    found = factored(DenseDelta(value))
    assert found.left.dtype == found.right.dtype == torch.float64
    assert found.rank <= min(d_out, d_in)
    missed = float((found.dense() - value.double()).norm())
    assert missed <= 32 * torch.finfo(dtype).eps * float(value.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_singular_values_are_kept_and_rounding_is_not(dtype: torch.dtype) -> None:
    """A spectrum over five orders is all there, of a thin product only its terms."""
    basis, other_basis = (torch.linalg.qr(draw(seed, 64, 64)).Q for seed in (0, 1))
    steep = (basis * torch.logspace(0, -5, 64, dtype=torch.float64)) @ other_basis.T
    found = factored(DenseDelta(steep.to(dtype)))
    assert found.rank == 64
    torch.testing.assert_close(
        found.dense(), steep.to(dtype).double(), rtol=0, atol=1e-6 if dtype.itemsize < 8 else 1e-14
    )
    thin = delta(2, 64, 48, 3).dense().to(dtype)
    assert factored(DenseDelta(thin)).rank == 3


def test_no_change_is_a_term_of_zeros() -> None:
    nothing = factored(DenseDelta(torch.zeros(4, 6)))
    assert (nothing.rank, nothing.shape) == (1, (4, 6))
    assert not nothing.dense().any()
    empty = factored(FactoredDelta(torch.zeros(4, 0), torch.zeros(0, 6)))
    assert (empty.rank, empty.shape) == (1, (4, 6))
    assert balanced(join([nothing])).is_finite()
    found = reduce([nothing, nothing], LoraHParams(lora_rank=1), None, name="w")
    assert (found.kept_frobenius, found.delta.is_finite(), found.delta.norm()) == (1.0, True, 0.0)


def test_thin_changes_are_taken_as_they_are_and_vectors_not_at_all() -> None:
    change = delta(0, 4, 6, 2)
    assert factored(change) is change
    with pytest.raises(ModelError, match="a vector such as a bias or the scale of a norm is not a product"):
        factored(VectorDelta(torch.zeros(4)))
    with pytest.raises(ModelError, match="a parameter with 3 axes is not a product of two matrices"):
        factored(DenseDelta(torch.zeros(2, 3, 4)))


@settings(deadline=None)
@given(seeds, st.integers(3, 10), st.integers(3, 10), st.booleans())
def test_a_cut_without_a_second_moment_is_the_best_of_its_rank_and_says_what_is_lost(
    seed: int, d_out: int, d_in: int, fit: bool
) -> None:
    """Eckart and Young: the tail of the spectrum is lost, and no measure that is not known is reported."""
    first, second = (draw(seed + part, d_out, d_in) for part in (0, 1))
    changes = [factored(DenseDelta(first)), factored(DenseDelta(second))]
    found = reduce(changes, LoraHParams(lora_rank=2, lora_fit_steps=5 if fit else 0), None, name="w")
    left, values, right = torch.linalg.svd(first + second)
    best = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(found.delta.dense(), best)
    lost = float(values[2:].square().sum() / values.square().sum())
    assert found.kept_frobenius == pytest.approx(1 - lost, abs=1e-12)
    assert (found.kept_weighted, found.kept_keys, found.delta.rank, found.whole) == (None, None, 2, False)


def test_a_threshold_without_a_second_moment_is_one_of_the_whole_change() -> None:
    exact = factored(DenseDelta(torch.diag(torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64))))
    tight = LoraHParams(lora_rank=1, lora_residual_threshold=0.5)
    with pytest.raises(NumericalError, match=r"rank 1 leaves out 0\.6 of the edits at w, .*\(frobenius\).*have rank 2"):
        reduce([exact], tight, None, name="w")
    kept = reduce([exact], tight.model_copy(update={"lora_residual_threshold": 0.7}), None, name="w")
    assert kept.kept_frobenius == pytest.approx(16 / 25)
    raw = reduce([exact], tight.model_copy(update={"allow_fallback": True}), None, name="w")
    assert (raw.fell_back, raw.delta.rank, raw.kept_weighted) == (True, 2, 1.0)


def test_what_was_not_done_as_asked_is_told() -> None:
    assert without_moment(LoraHParams(lora_criterion="frobenius"), "w") is None
    assert "w is not an MLP output projection" in str(without_moment(LoraHParams(), "w"))
    assert "is not fitted" in str(without_moment(LoraHParams(lora_criterion="frobenius", lora_fit_steps=3), "w"))
