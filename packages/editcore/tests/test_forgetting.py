"""Retention, half-life and area against plain oracles."""

from __future__ import annotations

import itertools
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.optimize  # noqa: F401  not within the deadline of an example
from editcore.runs.forgetting import Curve, Forgetting, Sighting, ages, forgetting, monotone, sample_by_age
from hypothesis import given, strategies as st

observed = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40), st.booleans()), min_size=1, max_size=40)


def means(sightings: list[Sighting]) -> dict[int, Fraction]:
    kept: dict[int, list[bool]] = {}
    for _, age, retained in sightings:
        kept.setdefault(age, []).append(retained)
    return {age: Fraction(sum(kept[age]), len(kept[age])) for age in sorted(kept)}


def smooth(values: list[Fraction], weights: list[int]) -> list[Fraction]:
    """The minimax formula of isotonic regression: max over ends of min over beginnings of the mean between them."""

    def mean(i: int, j: int) -> Fraction:
        return Fraction(
            sum(v * w for v, w in zip(values[i : j + 1], weights[i : j + 1], strict=True)), sum(weights[i : j + 1])
        )

    n = len(values)
    return [max(min(mean(i, j) for i in range(k + 1)) for j in range(k, n)) for k in range(n)]


@given(observed)
def test_the_monotone_curve_is_the_isotonic_regression(sightings: list[Sighting]) -> None:
    curve = Curve.of(sightings)
    plain = means(sightings)
    assert curve.ages == tuple(plain)
    assert curve.retention == pytest.approx([float(value) for value in plain.values()])
    found = monotone(curve.retention, curve.facts)
    assert found == pytest.approx([float(v) for v in smooth(list(plain.values()), list(curve.facts))], abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(found))


@given(observed)
def test_half_life_is_the_first_age_at_half_of_the_beginning(sightings: list[Sighting]) -> None:
    plain = means(sightings)
    counts = [sum(age == seen_age for _, seen_age, _ in sightings) for age in plain]
    curve = dict(zip(plain, smooth(list(plain.values()), counts), strict=True))
    expected = None
    if 0 in curve and curve[0] > 0:
        expected = min((age for age, value in curve.items() if 2 * value <= curve[0]), default=None)
    assert Curve.of(sightings).half_life == expected


@given(observed)
def test_area_is_the_mean_over_all_ages_between(sightings: list[Sighting]) -> None:
    """Trapezoids of width one over every whole age, with straight lines between those that were observed."""
    plain = means(sightings)
    known = list(plain)

    def at(age: int) -> Fraction:
        below, above = max(a for a in known if a <= age), min(a for a in known if a >= age)
        if below == above:
            return plain[below]
        return plain[below] + (plain[above] - plain[below]) * Fraction(age - below, above - below)

    whole = [at(age) for age in range(known[0], known[-1] + 1)]
    pieces = [(a + b) / 2 for a, b in itertools.pairwise(whole)]
    expected = sum(pieces) / len(pieces) if pieces else whole[0]
    assert Curve.of(sightings).area == pytest.approx(float(expected))


@given(observed, st.integers(1, 6))
def test_bins_hold_every_sighting_once_with_wilsons_interval(sightings: list[Sighting], step: int) -> None:
    found = forgetting(sightings, step=step)
    bins = found.retention_by_age
    assert len(bins) <= 11
    assert all(a.last < b.first for a, b in itertools.pairwise(bins))
    for _, age, _ in sightings:
        assert sum(bin_.first <= age <= bin_.last for bin_ in bins) == 1
    for bin_ in bins:
        inside = [(name, kept) for name, age, kept in sightings if bin_.first <= age <= bin_.last]
        names = {name for name, _ in inside}
        inner = [age for _, age, _ in sightings if bin_.first <= age <= bin_.last]
        assert bin_.age == pytest.approx(sum(inner) / len(inner))
        shares = [Fraction(sum(k for n, k in inside if n == name), sum(n == name for n, _ in inside)) for name in names]
        assert bin_.facts == len(names)
        p = float(sum(shares) / len(shares))
        assert bin_.retention == pytest.approx(100 * p)
        if set(shares) <= {0, 1}:  # a plain binomial
            n, z = len(names), 1.959964
            centre = (p + z * z / 2 / n) / (1 + z * z / n)
            half = z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5 / (1 + z * z / n)
            assert bin_.interval == pytest.approx((100 * max(0, centre - half), 100 * min(1, centre + half)), abs=1e-6)
    assert Forgetting.model_validate_json(found.model_dump_json()) == found


def test_nothing_observed_is_nothing_known() -> None:
    found = forgetting([], step=5)
    assert (found.half_life, found.auc, found.retention_by_age) == (None, None, ())


def test_a_curve_that_falls() -> None:
    sightings = [(str(n), age, n < kept) for age, kept in ((0, 10), (10, 8), (20, 9), (30, 5)) for n in range(10)]
    found = forgetting(sightings, step=10)
    assert found.half_life == 30
    assert found.auc == pytest.approx((9 + 8.5 + 7) / 3 * 10)
    assert [(point.first, point.last, point.retention) for point in found.retention_by_age] == [
        (0, 0, 100), (1, 10, 80), (11, 20, 90), (21, 30, 50),
    ]  # fmt: skip


def entry(batch: int, *names: str) -> Any:
    return SimpleNamespace(batch=batch, new_requests=tuple(SimpleNamespace(id=name) for name in names))


def test_age_counts_the_facts_written_since() -> None:
    history = [entry(0, "a", "b"), entry(2, "c"), entry(3, "a", "d")]
    assert ages(history) == {"b": (0, 3), "c": (2, 2), "a": (3, 0), "d": (3, 0)}
    assert ages([]) == {}


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 3))
def test_a_sample_has_every_stretch_of_ages(total: int, count: int, seed: int) -> None:
    facts = list(range(total))
    found = sample_by_age(facts, count, seed=f"{seed}")
    assert found == sample_by_age(facts, count, seed=f"{seed}")
    assert len(found) == min(total, count)
    assert found == sorted(set(found))
    if count < total:
        for number, fact in enumerate(found):
            assert number * total // count <= fact < (number + 1) * total // count
    assert sample_by_age(facts, None, seed="") == facts
