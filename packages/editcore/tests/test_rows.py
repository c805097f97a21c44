"""Cutting rows into passes, against every way of cutting them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import torch
from editcore.locate_then_edit.rows import _PASS_TOKENS, passes
from hypothesis import given, strategies as st

CPU = torch.device("cpu")


def every_way(number: int) -> Iterator[list[slice]]:
    for count in range(number):
        for inner in combinations(range(1, number), count):
            edges = [0, *inner, number]
            yield [slice(start, end) for start, end in pairwise(edges)]


def cost(lengths: list[int], cuts: list[slice]) -> int:
    """Tokens with their padding, and what each pass costs beside them."""
    return sum((cut.stop - cut.start) * lengths[cut.stop - 1] + _PASS_TOKENS["cpu"] for cut in cuts)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=8).map(sorted), st.integers(1, 400), st.integers(1, 8))
def test_no_way_of_cutting_costs_less(lengths: list[int], tokens: int, rows: int) -> None:
    def holds(start: int, end: int) -> bool:
        return end - start <= rows and (end - start) * lengths[end - 1] <= tokens

    def allowed(cuts: list[slice]) -> bool:
        return all(cut.stop - cut.start == 1 or holds(cut.start, cut.stop) for cut in cuts)

    free, held = passes(lengths, CPU), passes(lengths, CPU, holds=holds)
    ways = list(every_way(len(lengths)))
    assert free in ways
    assert held in ways
    assert allowed(held)
    assert cost(lengths, free) == min(cost(lengths, way) for way in ways)
    assert cost(lengths, held) == min(cost(lengths, way) for way in ways if allowed(way))


def test_no_rows_need_no_pass() -> None:
    assert passes([], CPU) == []
