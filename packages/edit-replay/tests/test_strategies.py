"""Strategies pick different records, and the same ones under the same seed."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from edit_replay import strategies
from edit_replay.buffer import EditRecord
from edit_replay.extension import _successes
from edit_replay.strategies import Strategy
from editcore import EditRequest, KnownTarget
from editcore.models import target_losses
from editcore.testing import tiny_model

ALL = [strategies.random, strategies.priority, strategies.recent]


def record(
    order: int,
    *,
    strength: float | None = None,
    importance: float = 1.0,
    accesses: int = 0,
    success: float | None = None,
) -> EditRecord:
    return EditRecord(
        request=EditRequest(subject=f"S{order}", prompt="{} is", target_new="x"),
        known=KnownTarget(keys={}, values={}),
        batch=order,
        order=order,
        strength=strength,
        success=success,
        importance=importance,
        access_count=accesses,
    )


TEN = [record(order) for order in range(10)]


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("count", [1, 4, 10])
def test_as_many_different_ones_as_asked_for(strategy: Strategy, count: int) -> None:
    chosen = strategy(TEN, count, random.Random(0))
    assert len({id(record) for record in chosen}) == count
    assert all(record in TEN for record in chosen)


@pytest.mark.parametrize("strategy", ALL)
def test_the_seed_decides(strategy: Strategy) -> None:
    assert strategy(TEN, 4, random.Random(3)) == strategy(TEN, 4, random.Random(3))


def test_random_is_uniform() -> None:
    rng = random.Random(0)
    counts = Counter(record.order for _ in range(2000) for record in strategies.random(TEN, 3, rng))
    # 600 expected each; five standard deviations of a binomial(2000, 0.3) are 102.
    assert all(abs(counts[order] - 600) < 103 for order in range(10))


def test_priority_takes_the_neediest_then_the_least_replayed_then_the_oldest() -> None:
    records = [record(0, accesses=1), record(1), record(2), record(3, importance=2.0), record(4, importance=0.5)]
    assert [record.order for record in strategies.priority(records, 5, random.Random(0))] == [3, 1, 2, 0, 4]


def test_priority_takes_facts_that_failed_their_last_check_before_important_ones_that_hold() -> None:
    held, failed, measured = record(0, strength=0.9, importance=50.0), record(1, strength=0.4), record(2, strength=1.0)
    assert [record.order for record in strategies.priority([held, failed, measured], 3, random.Random(0))] == [1, 0, 2]


def test_what_was_measured_on_the_model_counts_before_the_closed_form() -> None:
    records = [record(0, strength=0.2, success=0.9), record(1, strength=1.0, success=0.1)]
    assert [record.failed for record in records] == [False, True]
    assert [record.order for record in strategies.priority(records, 1, random.Random(0))] == [1]


def test_recent_takes_the_last_edited() -> None:
    assert [record.order for record in strategies.recent(TEN, 3, random.Random(0))] == [9, 8, 7]


def test_success_is_asked_with_what_a_request_joins_by() -> None:
    model, plain = tiny_model(), record(0)
    glued = dataclasses.replace(plain, request=plain.request.model_copy(update={"join": ""}))
    expected = (-target_losses(model, [plain.request, glued.request])).exp().tolist()
    assert _successes(model, [plain, glued]) == pytest.approx(expected, rel=1e-4)
    assert expected[0] != pytest.approx(expected[1], rel=1e-2)
