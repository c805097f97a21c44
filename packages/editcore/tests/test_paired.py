"""Differences of two measurements, against means by hand and what is known of bootstrap intervals."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from editcore import EvaluatorSpec, MetricSpec
from editcore.evaluation import measures_of
from editcore.evaluation.paired import Values, paired_differences

SPEC = EvaluatorSpec(
    "toy",
    target="toy:Toy",
    summary="A toy.",
    metrics=(
        MetricSpec(name="hit", label="Hit"),
        MetricSpec(name="kept", label="Kept"),
        MetricSpec(
            name="both", label="Both", of=("hit", "kept"), combine="editcore.evaluation.counterfact:harmonic_mean"
        ),
        MetricSpec(name="loss", label="Loss", unit="nats", better="lower"),
    ),
)
MEASURES = measures_of([SPEC])


def values(**facts: Any) -> Values:
    """By fact, one value, or the values of its questions."""
    asked = {name: value if isinstance(value, dict) else {"?": value} for name, value in facts.items()}
    return {(name,): {(question,): found for question, found in own.items()} for name, own in asked.items()}


def test_means_are_over_what_both_asked() -> None:
    first = {"hit": values(a=1.0, b={"x": 1.0, "y": 0.0}, only=1.0), "kept": values(a=1.0)}
    second = {"hit": values(a=0.0, b={"x": 1.0, "z": 0.0}, other=0.0)}
    (found,) = paired_differences(MEASURES, first, second)
    assert found.measure.key == "hit"
    assert (found.first, found.second, found.difference) == (100.0, 50.0, -50.0)
    assert (found.units, found.differing) == (2, 1)
    assert found.interval == (-100.0, 0.0)
    assert found.better == ""


def test_nothing_is_said_of_facts_that_do_not_differ_or_are_alone() -> None:
    same = {"hit": values(a=1.0, b=0.0, c=1.0)}
    (found,) = paired_differences(MEASURES, same, same)
    assert (found.difference, found.differing, found.interval, found.better) == (0.0, 0, None, "")
    (alone,) = paired_differences(MEASURES, {"hit": values(a=1.0)}, {"hit": values(a=0.0)})
    assert (alone.difference, alone.interval) == (-100.0, None)
    assert paired_differences(MEASURES, same, {"hit": values(d=1.0)}) == ()
    assert paired_differences(MEASURES, same, {"kept": values(a=1.0)}) == ()


def test_the_interval_is_that_of_the_differences_and_not_of_the_values() -> None:
    chance = random.Random(0)
    hard = {f"f{number}": chance.uniform(0, 9) for number in range(200)}  # facts differ far more than the two models
    first = {"loss": values(**hard)}
    second = {"loss": values(**{name: loss - 0.1 + chance.gauss(0, 0.2) for name, loss in hard.items()})}
    (found,) = paired_differences(MEASURES, first, second)
    assert found.interval is not None
    differences = [second["loss"][fact][("?",)] - first["loss"][fact][("?",)] for fact in first["loss"]]
    mean = math.fsum(differences) / 200
    error = math.sqrt(math.fsum((difference - mean) ** 2 for difference in differences)) / 200
    assert found.difference == pytest.approx(mean)
    for end, normal in zip(found.interval, (mean - 1.96 * error, mean + 1.96 * error), strict=True):
        assert end == pytest.approx(normal, abs=0.25 * error)  # Monte Carlo error of the percentiles of 2,000 samples
    assert found.better == "second"  # a lower loss is better
    (swapped,) = paired_differences(MEASURES, second, first)
    assert swapped.better == "first"
    assert paired_differences(MEASURES, first, second) == (found,)  # the seed decides


def test_a_composite_is_made_of_the_means_of_each_sample() -> None:
    facts = [f"f{number}" for number in range(40)]
    first = {"hit": values(**dict.fromkeys(facts, 0.5)), "kept": values(**dict.fromkeys(facts, 1.0))}
    second = {
        "hit": values(**{name: float(number % 4 > 0) for number, name in enumerate(facts)}),
        "kept": values(**dict.fromkeys(facts[:30], 1.0)),  # the others were not asked
    }
    both = {found.measure.key: found for found in paired_differences(MEASURES, first, second)}["both"]
    assert both.first == pytest.approx(100 * 2 / (2 + 1))
    assert both.second == pytest.approx(100 * 2 / (1 / 0.75 + 1))
    assert (both.units, both.differing) == (40, 40)
    assert both.interval is not None
    shares = (0.75 - 1.96 * math.sqrt(0.75 * 0.25 / 40), 0.75 + 1.96 * math.sqrt(0.75 * 0.25 / 40))
    for end, share in zip(both.interval, shares, strict=True):  # the only thing that varies is the share of hits
        assert end == pytest.approx(100 * 2 / (1 / share + 1) - both.first, abs=2.0)
    assert both.better == "second"
    assert [found.measure.key for found in paired_differences(MEASURES, {"hit": first["hit"]}, second)] == ["hit"]
