"""The score, and the search for what makes a batch fail."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from edit_trust.closed_form import reference_cost, score_facts
from edit_trust.measure import _says
from edit_trust.search import split
from editcore import EditEvidence, EditRequest
from editcore.evaluation import score_targets
from editcore.testing import tiny_model
from hypothesis import given, settings, strategies as st

shares = st.floats(0, 1)


def evidence(probability: float | None = 1.0, fraction: float = 1.0, cost: float | None = 1.0) -> EditEvidence:
    figures = {"target_probability": probability, "fraction_reached": fraction, "preservation_cost": cost}
    return EditEvidence(
        request_id="a", figures={name: figure for name, figure in figures.items() if figure is not None}
    )


def score(
    fact: EditEvidence, *, scale: float = 1.0, weights: tuple[float, float] = (0.5, 0.5), reference: float = 1.0
) -> float:
    found = score_facts([fact], reference=reference, weights=weights, cost_ratio=10.0, scale=scale)
    return found["a"].score


@given(shares, shares, st.floats(0, 1e12), st.floats(0.01, 10), st.floats(0, 10))
def test_the_score_is_the_weighted_geometric_mean_of_its_terms(
    probability: float, fraction: float, cost: float, gain_weight: float, preservation_weight: float
) -> None:
    gain, preservation = probability * fraction, 1 / (1 + cost / 10)
    total = gain_weight + preservation_weight
    expected = gain ** (gain_weight / total) * preservation ** (preservation_weight / total)
    found = score(evidence(probability, fraction, cost), weights=(gain_weight, preservation_weight))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert 0 <= found <= 1


@given(shares, st.floats(0, 1e6), st.floats(1, 1e3))
def test_more_cost_and_less_probability_score_lower(probability: float, cost: float, factor: float) -> None:
    assert score(evidence(probability, cost=cost * factor)) <= score(evidence(probability, cost=cost))
    assert score(evidence(probability / factor, cost=cost)) <= score(evidence(probability, cost=cost))


def test_known_values_of_the_score() -> None:
    assert score(evidence(cost=0.0)) == 1.0
    assert score(evidence(cost=10.0)) == pytest.approx(math.sqrt(0.5))  # as dear as ten median facts
    assert score(evidence(None, cost=None)) == 1.0
    assert score(evidence(cost=-5.0)) == 1.0  # its term undoes more of the others than it costs
    assert score(evidence(fraction=1.5, cost=0.0)) == 1.0
    assert score(evidence(cost=1e9), weights=(1.0, 0.0)) == 1.0
    assert score(evidence(0.25, cost=0.0), weights=(1.0, 0.0)) == 0.25
    assert score(evidence(cost=40.0), scale=0.5) == pytest.approx(math.sqrt(0.5 * 0.5))
    assert score(evidence(cost=7.0), reference=0.0) == 1.0  # nothing to hold it against


def test_the_reference_is_a_median_that_outliers_do_not_move() -> None:
    assert reference_cost([]) == 0.0
    assert reference_cost([1.0, 1e9]) == 1.0
    assert reference_cost([-1.0, 0.0, 2.0, 3.0, 1e9]) == 3.0


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=6))
def test_the_search_finds_exactly_those_that_fail_alone(size: int, bad: set[int]) -> None:
    items = [str(number) for number in range(size)]
    culprits = {str(number) for number in bad if number < size}
    if not culprits:
        return
    asked: list[Sequence[str]] = []

    def passes(kept: Sequence[str]) -> bool:
        asked.append(kept)
        return not culprits & set(kept)

    found = split(items, passes, looks=10_000)
    assert (set(found.culprits), found.unexamined) == (culprits, ())
    assert sorted([*found.kept, *found.culprits], key=int) == items
    most = 2 * math.ceil(math.log2(size + 1)) + 2
    assert len(asked) <= most * len(culprits) + 1
    assert [] not in asked
    assert items not in asked


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 40), st.randoms(use_true_random=False))
def test_what_is_kept_passes_within_any_number_of_looks(size: int, limit: int, looks: int, rng: object) -> None:
    """Harms that add up: no single item is the cause."""
    harms = {str(number): rng.randrange(10) for number in range(size)}  # type: ignore[attr-defined]
    if sum(harms.values()) <= limit:
        return
    asked = 0

    def passes(kept: Sequence[str]) -> bool:
        nonlocal asked
        asked += 1
        return sum(harms[item] for item in kept) <= limit

    found = split(list(harms), passes, looks=looks)
    assert asked <= looks
    assert sum(harms[item] for item in found.kept) <= limit
    assert sorted([*found.kept, *found.culprits, *found.unexamined]) == sorted(harms)
    assert found.culprits or found.unexamined


def test_one_look_clears_the_rest_of_the_most_suspect() -> None:
    asked = []

    def passes(kept: Sequence[str]) -> bool:
        asked.append(list(kept))
        return "d" not in kept

    assert split(["a", "b", "c", "d"], passes, looks=1).culprits == ("d",)
    assert asked == [["a", "b", "c"]]


def test_a_single_item_takes_no_look() -> None:
    found = split(["a"], lambda _kept: False, looks=0)
    assert (found.kept, found.culprits, found.unexamined) == ((), ("a",), ())


def test_success_is_asked_with_what_a_request_joins_by() -> None:
    model, words = tiny_model(), ("Paris", "London", "Rome", "Berlin")
    pairs = [(new, true) for new in words for true in words if new != true]

    def says(join: str | None) -> list[bool]:
        asked = [EditRequest(prompt="My name is", target_new=new, target_true=true, join=join) for new, true in pairs]
        return _says(model, asked)

    def expected(between: str) -> list[bool]:
        nll = [score.nll for score in score_targets(model, [f"My name is{between}"] * 4, words, joins=[""] * 4)]
        by_word = dict(zip(words, nll, strict=True))
        return [by_word[new] < by_word[true] for new, true in pairs]

    assert says("\n") == expected("\n")
    assert says("\n") != says(None)
