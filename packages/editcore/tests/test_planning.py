"""Cutting rows into passes, against every way of cutting them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from editcore.models.planning import PassBudget, plan_passes
from editcore.testing import tiny_model
from hypothesis import given, strategies as st

FREE = PassBudget(tokens=10**9, logits=10**12, overhead=70, vocab=10)


def every_way(number: int) -> Iterator[list[range]]:
    for count in range(number):
        for inner in combinations(range(1, number), count):
            yield [range(start, end) for start, end in pairwise([0, *inner, number])]


rows = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=9)


@given(rows, st.integers(1, 60), st.integers(1, 8), st.integers(0, 80), st.sampled_from([0.0, 2.5]))
def test_no_way_of_cutting_costs_less(
    rows: list[tuple[int, int]], tokens: int, positions: int, overhead: int, past: float
) -> None:
    lengths, scored = [length for length, _ in rows], [count for _, count in rows]
    budget = PassBudget(tokens=tokens, logits=10 * positions, overhead=overhead, vocab=10)

    def allowed(members: list[int]) -> bool:
        longest = max(lengths[row] for row in members)
        within = len(members) * (longest + past) <= tokens and sum(scored[row] for row in members) <= positions
        return len(members) == 1 or within

    def cost(passes: list[list[int]]) -> int:
        return sum(len(members) * max(lengths[row] for row in members) + overhead for members in passes)

    found = plan_passes(lengths, budget, scored=scored, past=past)
    order = [row for members in found for row in members]
    assert sorted(order) == list(range(len(rows)))
    assert [lengths[row] for row in order] == sorted(lengths)
    assert all(allowed(members) for members in found)
    ways = [[[order[place] for place in part] for part in way] for way in every_way(len(rows))]
    assert cost(found) == min(cost(way) for way in ways if all(map(allowed, way)))


def test_equal_rows_keep_their_order_and_no_rows_need_no_pass() -> None:
    assert plan_passes([3, 2, 3, 2], FREE) == [[1, 3, 0, 2]]
    assert plan_passes([], FREE) == []


def test_short_rows_do_not_share_a_pass_with_long_ones() -> None:
    assert plan_passes([5] * 40 + [90] * 40, FREE) == [list(range(40)), list(range(40, 80))]


def test_a_budget_says_how_many_equal_rows_fit() -> None:
    budget = PassBudget(tokens=100, logits=500, overhead=0, vocab=10)
    assert budget.rows(30) == 3
    assert budget.rows(1000) == 1
    assert budget.rows(2, scored=5) == 10
    assert budget.positions() == 50


def test_a_pass_that_goes_backward_holds_less_the_more_blocks_it_holds() -> None:
    model = tiny_model("llama")
    forward, low, high = PassBudget.forward(model), PassBudget.backward(model, 0), PassBudget.backward(model, 2)
    assert low.tokens <= high.tokens < forward.tokens
    assert forward.vocab == model.layout.vocab_size


@pytest.mark.parametrize("tokens", [512, 8192])
def test_of_a_thousand_facts_few_cuts_are_looked_at(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning takes milliseconds: cuts grow with passes and different lengths, not with the rows squared."""
    looked_at = 0

    def counting(cuts: list[int]) -> int:
        nonlocal looked_at
        looked_at += 1
        return heapq.heappop(cuts)

    monkeypatch.setattr("editcore.models.planning.heappop", counting)
    lengths = [8 + row * 7919 % 31 for row in range(7000)]
    found = plan_passes(lengths, FREE.with_tokens(tokens))
    assert sum(map(len, found)) == 7000
    assert looked_at <= 31 * len(found)
