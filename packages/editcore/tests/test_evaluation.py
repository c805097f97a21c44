"""Metrics as data, what observations add up to, and that the evaluators ask the right questions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from editcore import (
    EditRequest,
    EvaluationContext,
    EvaluatorSpec,
    FactRecord,
    LanguageModel,
    MetricSpec,
    Observation,
    PluginError,
    Probe,
)
from editcore.evaluation import (
    COUNTERFACT,
    GENERATION,
    Average,
    CounterFactEvaluator,
    GenerationEvaluator,
    GenerationHParams,
    Measure,
    Measurement,
    Summary,
    average_of,
    legend,
    measure,
    measures_of,
    objectives_of,
    retention_of,
    score_targets,
    shown,
)
from editcore.evaluation.counterfact import harmonic_mean
from editcore.evaluation.generation import answer_of, distinct_bigrams, is_said, normalized
from editcore.interfaces.metrics import check_metrics
from editcore.testing import tiny_model, tiny_requests
from hypothesis import given, settings, strategies as st

COUNTERFACT_MEASURES = measures_of([COUNTERFACT])
NAMES = {
    "rewrite": ("ES", "EM", "rewrite_acc", "rewrite_nll_new", "rewrite_nll_true"),
    "paraphrase": ("PS", "PM", "paraphrase_acc", "paraphrase_nll_new", "paraphrase_nll_true"),
    "neighborhood": ("NS", "NM", "neighborhood_acc", "neighborhood_nll_new", "neighborhood_nll_true"),
}
"""The metrics of a prompt of each kind: success, magnitude, accuracy, and both negative log-likelihoods."""


def scored(case: str, kind: str, new: float, true: float | None, *, correct: bool = False) -> list[Observation]:
    """What is observed of one prompt with these negative log-likelihoods."""
    success, magnitude, accuracy, nll_new, nll_true = NAMES[kind]
    sign = -1 if kind == "neighborhood" else 1
    values = {accuracy: float(correct), nll_new: new}
    if true is not None:
        values[success] = float(sign * (true - new) > 0)
        values[magnitude] = sign * (math.exp(-new) - math.exp(-true))
        values[nll_true] = true
    return [
        Observation(request_id=case, metric=name, value=value, kind=kind, prompt="p") for name, value in values.items()
    ]


def counterfact(*prompts: list[Observation]) -> Measurement:
    """A measurement of these prompts, each as :func:`scored` gives it."""
    found = tuple(observation for prompt in prompts for observation in prompt)
    return Measurement(measures=COUNTERFACT_MEASURES, observations={"counterfact": found})


def probes(kind: str, *prompts: str) -> tuple[Probe, ...]:
    return tuple(Probe(kind=kind, prompt=prompt) for prompt in prompts)


def records() -> list[FactRecord]:
    curie = EditRequest(subject="Marie Curie", prompt="{} was born in", target_new="Rome", target_true="Paris", id="a")
    newton = EditRequest(subject="Isaac Newton", prompt="{} works as a", target_new="painter", id="b")
    return [
        FactRecord(
            request=curie,
            relation="birthplace",
            probes=(
                *probes("paraphrase", "The birthplace of Marie Curie is", "Marie Curie comes from"),
                *probes("neighborhood", "Alan Turing was born in", "Victor Hugo was born in"),
                *probes("locality", "Alan Turing liked"),
            ),
        ),
        FactRecord(
            request=newton,
            probes=(*probes("paraphrase", "The job of Isaac Newton is"), *probes("neighborhood", "Bob is a")),
        ),
    ]


# Metrics as data


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": "said first"}, "the metric's name 'said first' is not made of letters, digits and underscores"),
        ({"name": "2nd"}, "the metric's name '2nd' is not made of letters"),
        ({"name": ""}, "the metric's name '' is not made of letters"),
        ({"name": "a.b"}, r"the metric's name 'a\.b' is not made of letters"),
        ({"label": " "}, "the metric m has no label"),
        ({"of": ("x",)}, "the metric m needs both 'of' and 'combine', or neither"),
        ({"combine": "module:function"}, "the metric m needs both 'of' and 'combine', or neither"),
        ({"about": "model"}, "the metric m is about the model, so its average must be over prompts"),
        (
            {"of": ("x",), "combine": "module:function", "retention": True},
            "the metric m is a composite, which says nothing of single facts",
        ),
        (
            {"of": ("x",), "combine": "module:function", "tally": "are x"},
            "the metric m is a composite, which says nothing of single facts",
        ),
    ],
)
def test_a_metric_that_does_not_go_together_is_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        MetricSpec(**{"name": "m", "label": "M", **fields})


def test_what_a_metrics_unit_says() -> None:
    share = MetricSpec(name="a", label="A")
    gap = MetricSpec(name="b", label="B", signed=True)
    nats = MetricSpec(name="c", label="C", unit="nats")
    assert [(metric.percent, metric.share) for metric in (share, gap, nats)] == [
        (True, True),
        (True, False),
        (False, False),
    ]


def plain(name: str, **fields: Any) -> MetricSpec:
    return MetricSpec(name=name, label=name.title(), **fields)


def composite(name: str, *of: str, combine: str = "editcore.evaluation.counterfact:mean") -> MetricSpec:
    return plain(name, of=of, combine=combine)


@pytest.mark.parametrize(
    ("metrics", "complaint"),
    [
        ([plain("a"), plain("b"), plain("a")], "the metric a is announced twice"),
        (
            [plain("a"), composite("c", "a", "b")],
            "the composite c is made of b, which is not a metric with observations",
        ),
        (
            [plain("a"), composite("c", "a"), composite("d", "c")],
            "the composite d is made of c, which is not a metric with observations",
        ),
        ([plain("a", retention=True), plain("b", retention=True)], "more than one metric stands for retention"),
        ([plain("a"), plain("b", instead_of=("c",))], "the metric b stands in for c, which is not another metric"),
        ([plain("b", instead_of=("b",))], "the metric b stands in for b, which is not another metric"),
    ],
)
def test_metrics_of_one_evaluator_go_together(metrics: list[MetricSpec], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_metrics(metrics)
    with pytest.raises(ValueError, match=complaint):
        EvaluatorSpec("bad", "m:Bad", summary="Bad.", metrics=tuple(metrics))
    check_metrics([composite("c", "a"), plain("a", retention=True, objective=True), plain("b", objective=True)])
    check_metrics([])


def spec(name: str, *metrics: MetricSpec, compares: bool = False) -> EvaluatorSpec:
    return EvaluatorSpec(name, "m:None", summary="None.", metrics=metrics, compares=compares)


def test_a_metrics_key_is_its_name_unless_two_evaluators_have_one() -> None:
    both = [spec("one", plain("said"), plain("length")), spec("two", plain("said", unit="words"), plain("width"))]
    found = measures_of(both)
    assert [(metric.evaluator, metric.name, metric.key) for metric in found] == [
        ("one", "said", "one.said"),
        ("one", "length", "length"),
        ("two", "said", "two.said"),
        ("two", "width", "width"),
    ]
    assert found[2].unit == "words"
    assert [metric.key for metric in measures_of(both[:1])] == ["said", "length"]
    assert measures_of([]) == ()


def test_measures_have_everything_that_was_announced() -> None:
    found = measures_of([COUNTERFACT, GENERATION])
    announced = [*COUNTERFACT.metrics, *GENERATION.metrics]
    assert [
        MetricSpec(**{n: getattr(metric, n) for n in MetricSpec.__dataclass_fields__}) for metric in found
    ] == announced
    assert [metric.key for metric in found] == [metric.name for metric in announced], "no name is both's"


def test_what_is_shown_tells_and_decides() -> None:
    found = measures_of([COUNTERFACT, GENERATION])
    assert [metric.key for metric in shown(found) if metric.evaluator == "counterfact"] == ["ES", "PS", "NS", "score"]
    assert [metric.key for metric in objectives_of(found)] == ["score", "margin"], (
        "of the first evaluator that has some"
    )
    [said] = [metric for metric in GENERATION.metrics if metric.retention]
    first = retention_of(found, ["ES", said.name])
    assert first is not None
    assert first.key == "ES"
    second = retention_of(found, [said.name])
    assert second is not None
    assert second.key == said.name, "the first of those that observed something"
    nothing = retention_of(found, [])
    assert nothing is not None
    assert nothing.key == "ES"
    assert retention_of(measures_of([spec("none", plain("a"))]), ["a"]) is None


def test_a_metric_that_cannot_be_told_gives_its_place_to_what_can() -> None:
    found = measures_of([COUNTERFACT, GENERATION])
    only = [metric for metric in found if metric.evaluator == "counterfact"]

    def keys(measures: Sequence[Measure]) -> list[str]:
        return [metric.key for metric in measures]

    # Records without a true object and without neighbours: the accuracies are all that is known.
    accuracies = ["rewrite_acc", "paraphrase_acc"]
    assert keys(shown(only, [*accuracies, "rewrite_nll_new"])) == accuracies
    # Where nothing stands in, all keep their places: a table has the same columns as before.
    assert keys(shown(only, ["ES", "rewrite_acc", "PS", "paraphrase_acc"])) == ["ES", "PS", "NS", "score"]
    assert keys(shown(only, ["ES", "rewrite_acc", "paraphrase_acc"])) == ["ES", "paraphrase_acc"]
    assert keys(shown(only, ["ES", "PS", "NS", "score", *accuracies])) == ["ES", "PS", "NS", "score"]
    both = keys(shown(found, [*accuracies, "facts_said"]))
    assert both[:3] == [*accuracies, "facts_said"]
    assert keys(objectives_of(only, accuracies)) == accuracies
    assert keys(objectives_of(found, [*accuracies, "facts_said"])) == ["facts_said"]
    assert keys(objectives_of(only, [])) == ["score", "margin"]
    for observed, telling in ((accuracies, "rewrite_acc"), ([*accuracies, "facts_said"], "facts_said"), ([], "ES")):
        metric = retention_of(found, observed)
        assert metric is not None
        assert metric.key == telling


def test_numbers_are_shown_in_their_unit() -> None:
    share, nats, number = measures_of(
        [spec("e", plain("said"), plain("nll", unit="nats", better="lower"), plain("count", unit=""))]
    )
    assert [share.text(12.345), share.text(12.345, 2), share.text(None), share.text(math.nan)] == [
        "12.3", "12.35", "-", "-",
    ]  # fmt: skip
    assert [nats.text(1234.5678), nats.text(0.000123456)] == ["1235", "0.0001235"]
    assert [share.heading, nats.heading, number.heading] == ["Said (%)", "Nll (nats)", "Count"]
    assert legend([share]) == "percent, higher is better"
    assert legend([share, nats, number]) == ("percent (nll in nats, count a number), higher is better (lower for nll)")


# CounterFact's measurement


def test_evaluator_follows_the_definitions() -> None:
    model = tiny_model("llama")
    found = CounterFactEvaluator().evaluate(model, records())
    assert {observation.metric for observation in found} <= {
        metric.name for metric in COUNTERFACT.metrics if not metric.of
    }
    prompts = list(
        dict.fromkeys((observation.request_id, observation.kind, observation.prompt) for observation in found)
    )
    assert prompts == [
        ("a", "rewrite", "Marie Curie was born in"),
        ("a", "paraphrase", "The birthplace of Marie Curie is"),
        ("a", "paraphrase", "Marie Curie comes from"),
        ("a", "neighborhood", "Alan Turing was born in"),
        ("a", "neighborhood", "Victor Hugo was born in"),
        ("b", "rewrite", "Isaac Newton works as a"),
        ("b", "paraphrase", "The job of Isaac Newton is"),
    ]
    of_prompt = {
        key: {
            observation.metric: observation
            for observation in found
            if (observation.request_id, observation.kind, observation.prompt) == key
        }
        for key in prompts
    }
    assert sum(map(len, of_prompt.values())) == len(found), "nothing is said twice"
    for (_, kind, prompt), seen in list(of_prompt.items())[:5]:
        success, magnitude, accuracy, nll_new, nll_true = NAMES[kind]
        new, true = score_targets(model, [prompt] * 2, ["Rome", "Paris"])
        assert list(seen) == list(NAMES[kind]), "the success first"
        assert [seen[nll_new].value, seen[nll_true].value] == pytest.approx([new.nll, true.nll], abs=1e-5)
        wanted, unwanted = (true, new) if kind == "neighborhood" else (new, true)
        assert seen[success].value == (wanted.nll < unwanted.nll)
        assert seen[magnitude].value == pytest.approx(math.exp(-wanted.nll) - math.exp(-unwanted.nll), abs=1e-5)
        assert seen[accuracy].value == wanted.correct
    for (_, kind, prompt), seen in list(of_prompt.items())[5:]:
        [new] = score_targets(model, [prompt], ["painter"])
        accuracy, nll_new = NAMES[kind][2:4]
        assert list(seen) == [accuracy, nll_new], "nothing to compare with"
        assert seen[nll_new].value == pytest.approx(new.nll, abs=1e-5)
        assert seen[accuracy].value == new.correct
    assert all(observation.text is None for observation in found)


def test_a_tie_is_a_failure() -> None:
    same = EditRequest(subject="Marie Curie", prompt="{} was born in", target_new="Rome", target_true="Rome")
    record = FactRecord(request=same, probes=probes("neighborhood", "Bob was born in"))
    found = CounterFactEvaluator().evaluate(tiny_model("gpt2"), [record])
    assert [(observation.metric, observation.value) for observation in found if observation.metric in ("ES", "NS")] == [
        ("ES", 0.0),
        ("NS", 0.0),
    ]


# What observations add up to


def test_averages_are_per_fact_first() -> None:
    summary = counterfact(
        scored("1", "rewrite", 1, 2, correct=True),
        scored("2", "rewrite", 2, 1),
        scored("1", "paraphrase", 1, 2),
        scored("1", "paraphrase", 2, 1),
        scored("2", "paraphrase", 1, 2),
        scored("1", "neighborhood", 2, 1),  # fact 2 has none and does not count
        scored("1", "neighborhood", 2, 1),
        scored("1", "neighborhood", 1, 2),
    ).summary
    assert (summary.value("ES"), summary.value("PS")) == (50.0, 75.0)  # PS by prompts would be 66.7
    assert summary.value("NS") == pytest.approx(200 / 3)
    assert summary.value("score") == pytest.approx(3 / (1 / 50 + 1 / 75 + 3 / 200))
    assert summary.averages["NS"].facts == 1
    assert summary.averages["PS"].prompts == 3
    assert summary.averages["PS"].std == pytest.approx(np.std([50, 100]))
    assert summary.value("rewrite_acc") == 50.0
    assert summary.value("EM") == pytest.approx(0.0)
    assert summary.value("NM") == pytest.approx(100 * (math.exp(-1) - math.exp(-2)) / 3)
    em, pm, nm = (summary.value(key) for key in ("EM", "PM", "NM"))
    assert summary.value("margin") == pytest.approx((em + pm + nm) / 3)
    assert summary.value("paraphrase_nll_new") == pytest.approx(1.25), "in nats, not in percent"
    assert not summary.averages["EM"].share
    assert summary.averages["ES"].share
    assert summary.facts == {"counterfact": 2}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), min_size=1))
def test_an_average_over_prompts_takes_all_alike(found: list[tuple[str, float]]) -> None:
    ids, values = [name for name, _ in found], [value for _, value in found]
    by_prompts = average_of(ids, values, within="prompts")
    by_facts = average_of(ids, values)
    assert by_prompts is not None
    assert by_facts is not None
    assert by_prompts.mean == pytest.approx(100 * np.mean(values))
    assert by_prompts.std == pytest.approx(100 * np.std(values), abs=1e-6)
    means = [np.mean([value for name, value in found if name == fact]) for fact in dict.fromkeys(ids)]
    assert by_facts.mean == pytest.approx(100 * np.mean(means))
    assert by_facts.std == pytest.approx(100 * np.std(means), abs=1e-6)
    for average in (by_prompts, by_facts):
        assert (average.facts, average.prompts) == (len(means), len(values))
    unscaled = average_of(ids, values, within="prompts", percent=False, share=False)
    assert unscaled is not None
    assert (unscaled.mean, unscaled.share) == (pytest.approx(np.mean(values)), False)
    assert average_of([], []) is None


def test_the_way_of_averaging_is_the_metrics_own() -> None:
    announced = spec("e", plain("facts"), plain("prompts", average="prompts"), plain("words", unit="words"))
    found = [("1", 1.0), ("1", 1.0), ("1", 0.0), ("2", 0.0)]
    observations = tuple(
        Observation(request_id=name, metric=metric, value=value)
        for metric in ("facts", "prompts", "words")
        for name, value in found
    )
    summary = Measurement(measures=measures_of([announced]), observations={"e": observations}).summary
    assert summary.value("facts") == pytest.approx(100 / 3)
    assert summary.value("prompts") == 50.0
    assert summary.value("words") == pytest.approx(1 / 3)
    assert summary.averages["prompts"].std == 50.0


def test_score_is_zero_if_any_part_is() -> None:
    found = counterfact(
        scored("1", "rewrite", 2, 1), scored("1", "paraphrase", 1, 2), scored("1", "neighborhood", 2, 1)
    )
    assert found.summary.value("score") == 0.0
    assert harmonic_mean(0.0, 50.0, 100.0) == harmonic_mean(50.0, 0.0) == 0.0
    assert harmonic_mean(40.0, 60.0) == pytest.approx(48.0)


def test_what_cannot_be_computed_is_absent() -> None:
    summary = counterfact(scored("1", "rewrite", 1, None, correct=True), scored("1", "paraphrase", 1, None)).summary
    for key in ("ES", "NS", "score"):
        assert math.isnan(summary.value(key))
        assert summary.interval(key) is None
    assert summary.values() == {
        "rewrite_acc": 100.0, "paraphrase_acc": 0.0, "rewrite_nll_new": 1.0, "paraphrase_nll_new": 1.0,
    }  # fmt: skip
    written = json.loads(json.dumps(summary.as_json(), allow_nan=False))
    assert list(written) == [metric.key for metric in COUNTERFACT_MEASURES]
    assert written["ES"] is None
    assert written["rewrite_acc"] == 100.0
    assert counterfact().summary.values() == {}


def test_a_composite_is_absent_while_a_part_is() -> None:
    whole = counterfact(
        scored("1", "rewrite", 1, 2), scored("1", "paraphrase", 1, 2), scored("1", "neighborhood", 2, 1)
    ).summary
    assert {"score", "margin"} <= whole.values().keys()
    assert whole.interval("score") is None, "a composite is no mean over facts"
    assert whole.interval("ES") is None, "nor is one fact any measure of how facts vary"
    part = counterfact(scored("1", "rewrite", 1, 2), scored("1", "paraphrase", 1, 2)).summary
    assert not {"score", "margin"} & part.values().keys()
    assert part.as_json()["score"] is None


def test_a_composite_is_made_of_its_own_evaluators_metrics() -> None:
    """Though another evaluator has a metric of that name, and its parts stand behind it."""
    one = spec("one", composite("mid", "a", "b"), plain("a"), plain("b"))
    two = spec("two", plain("a"), plain("mid"))
    observations = {
        "one": [Observation(request_id="1", metric=name, value=value) for name, value in (("a", 0.2), ("b", 0.4))],
        "two": [Observation(request_id="1", metric="a", value=1.0)],
    }
    values = Measurement(measures=measures_of([one, two]), observations=observations).summary.values()
    assert list(values) == ["one.mid", "one.a", "b", "two.a"], "in the order of the measures"
    assert values == pytest.approx({"one.mid": 30.0, "one.a": 20.0, "b": 40.0, "two.a": 100.0})


def halves(combine: str) -> tuple[EvaluatorSpec, list[Observation]]:
    """An evaluator with a composite of two metrics, and an observation of each."""
    announced = spec("e", plain("a"), plain("b"), composite("mid", "a", "b", combine=combine))
    return announced, [Observation(request_id="1", metric=name, value=0.5) for name in ("a", "b")]


def test_a_composite_that_fails_is_named() -> None:
    announced, observations = halves("math:floor")
    summary = Measurement(measures=measures_of([announced]), observations={"e": observations}).summary
    with pytest.raises(PluginError, match=r"The metric 'mid' of the evaluator 'e' failed: TypeError: .*"):
        summary.values()


def test_a_composite_that_cannot_be_loaded_stops_the_measurement_and_no_report() -> None:
    """Whoever measures must have it; whoever reads what was measured need not."""
    announced, observations = halves("nowhere:mean")
    model: Any = None
    with pytest.raises(
        PluginError, match=r"Cannot load 'nowhere:mean': ModuleNotFoundError: No module named 'nowhere'"
    ):
        measure([(announced, Observes([]))], model, [])
    summary = Measurement(measures=measures_of([announced]), observations={"e": observations}).summary
    assert summary.values() == {"a": 50.0, "b": 50.0}


def test_facts_are_counted_by_evaluator() -> None:
    found = Measurement(
        measures=measures_of([spec("one", plain("a")), spec("two", plain("b")), spec("idle", plain("c"))]),
        observations={
            "one": [Observation(request_id=name, metric="a", value=1.0) for name in "xyx"],
            "two": [Observation(request_id="x", metric="b", value=1.0)],
            "idle": [],
        },
    )
    assert found.summary.facts == {"one": 2, "two": 1}
    part = found.of_facts(["y"])
    assert part.summary.facts == {"one": 1}
    assert (part.measures, part.observations.keys()) == (found.measures, found.observations.keys())
    assert found.of(found.measures[0]) == found.observations["one"]
    assert found.of(found.measures[2]) == []


TWO = [
    spec("one", plain("said"), plain("gap", signed=True), composite("mid", "said", "gap"), plain("rare")),
    spec("two", plain("said", average="prompts"), plain("length", unit="words", better="lower")),
]
"""Evaluators with a name in common, with every kind of metric."""


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    measures = measures_of(TWO)
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    observations: dict[str, tuple[Observation, ...]] = {}
    for evaluator in TWO:
        observations[evaluator.name] = tuple(
            draw(
                st.lists(
                    st.builds(
                        Observation,
                        request_id=st.sampled_from(["a", "b", "c d"]),
                        metric=st.sampled_from([metric.name for metric in evaluator.metrics if not metric.of]),
                        value=st.floats(-1e6, 1e6),
                        kind=st.sampled_from(["rewrite", "paraphrase"]),
                        prompt=text,
                        text=st.none() | text,
                    ),
                    max_size=12,
                )
            )
        )
    return Measurement(measures=measures, observations=observations)


def assert_equal_summaries(found: Measurement, frame: pd.DataFrame) -> None:
    """Of the table they are those of the measurement, to the bit."""
    again = Measurement.from_frame(frame, found.measures).summary
    assert again == found.summary
    assert again.values() == found.summary.values()


@settings(deadline=None)
@given(measurements())
def test_a_table_is_the_measurement(found: Measurement) -> None:
    """Also where a text is empty, no text at all, or one that means nothing in a table."""
    frame = found.frame({"a": "born in"})
    again = Measurement.from_frame(frame, found.measures)
    assert {name: tuple(ones) for name, ones in again.observations.items()} == found.observations
    assert again.summary == found.summary
    assert_equal_summaries(found, frame)


def test_a_table_on_disk_is_the_measurement(tmp_path: Path) -> None:
    found = counterfact(
        scored("1", "rewrite", 1, 2, correct=True),
        scored("1", "paraphrase", 1, 2),
        scored("1", "paraphrase", 2, 1),
        scored("2", "rewrite", 3, None),
    )
    frame = found.frame({"1": "born in", "2": None})
    columns = ["request_id", "relation", "evaluator", "metric", "kind", "prompt", "value", "text"]
    assert list(frame.columns) == columns
    assert list(frame["request_id"] + "/" + frame["kind"] + "/" + frame["metric"]) == [
        f"{observation.request_id}/{observation.kind}/{observation.metric}"
        for observation in found.observations["counterfact"]
    ]
    assert set(frame["evaluator"]) == {"counterfact"}
    assert frame["relation"].tolist() == ["born in"] * 15 + [pd.NA] * 2
    assert frame["text"].isna().all()
    assert frame["value"].tolist() == [observation.value for observation in found.observations["counterfact"]]
    assert [str(kind) for kind in frame.dtypes] == ["string"] * 6 + ["float64", "string"]
    frame.to_parquet(tmp_path / "results.parquet")
    read = pd.read_parquet(tmp_path / "results.parquet")
    pd.testing.assert_frame_equal(read, frame)
    assert_equal_summaries(found, read)
    assert list(counterfact().frame({}).columns) == columns
    assert_equal_summaries(counterfact(), counterfact().frame({}))


def test_a_table_has_keys_where_a_name_is_twos() -> None:
    observations = {
        name: [Observation(request_id="a", metric="said", value=value)] for name, value in (("one", 1.0), ("two", 0.0))
    }
    found = Measurement(measures=measures_of(TWO), observations=observations)
    frame = found.frame({})
    assert frame["metric"].tolist() == ["one.said", "two.said"]
    known = tuple(metric for metric in found.measures if metric.evaluator == "two")
    again = Measurement.from_frame(frame, known)
    assert again.observations == {"two": observations["two"]}, "rows of metrics that are not asked for are left out"


def test_by_relation() -> None:
    found = counterfact(scored("1", "rewrite", 1, 2), scored("2", "rewrite", 2, 1))
    frame = found.frame({"1": "x", "2": "w"})
    groups = {name: Measurement.from_frame(rows, found.measures).summary for name, rows in frame.groupby("relation")}
    assert list(groups) == ["w", "x"]
    assert (groups["w"].value("ES"), groups["x"].value("ES")) == (0.0, 100.0)
    assert [groups[name].facts for name in "wx"] == [{"counterfact": 1}] * 2


def test_intervals_hold_the_mean_and_stay_open_at_the_ends() -> None:
    sure = Average(mean=100.0, std=0.0, facts=40, prompts=40)
    low, high = sure.interval
    assert high == pytest.approx(100.0)
    assert 90 < low < 92.5  # Wilson's interval for 40 of 40: 91.2
    binary = Average(mean=50.0, std=50.0, facts=100, prompts=100)
    assert binary.interval == pytest.approx((40.4, 59.6), abs=0.05)
    steady = Average(mean=50.0, std=5.0, facts=100, prompts=1000)
    assert steady.interval == pytest.approx((50 - 1.96 * 0.5, 50 + 1.96 * 0.5), abs=0.02)
    alone = Average(mean=90.0, std=0.0, facts=1, prompts=1)
    assert Summary(measures=(), averages={"one": alone, "many": binary}).interval("one") is None
    assert Summary(measures=(), averages={"many": binary}).interval("many") == binary.interval
    tasks = average_of(["one"] * 100, [0, 1] * 50, within="prompts")
    assert tasks is not None
    assert tasks.interval == binary.interval, "observations that are averaged alike count one by one"
    assert Summary(measures=(), averages={"tasks": tasks}).interval("tasks") == tasks.interval
    gap = Average(mean=-3.0, std=10.0, facts=25, prompts=25, share=False)
    assert gap.interval == pytest.approx((-3 - 3.92, -3 + 3.92), abs=0.01)


def test_summaries_need_no_torch() -> None:
    code = (
        "import sys; from editcore.evaluation import COUNTERFACT, GENERATION, CounterFactEvaluator; "
        "from editcore.evaluation import GenerationEvaluator, Measurement, measure, measures_of; "
        "CounterFactEvaluator(), GenerationEvaluator(); "
        "Measurement(measures=measures_of([COUNTERFACT, GENERATION]), observations={}).summary.values(); "
        "print([name for name in ('torch', 'pandas', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Several evaluators on one model


class Observes:
    """An evaluator that returns what it was given, and remembers what it was told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.contexts: list[EvaluationContext] = []

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        self.contexts.append(context)
        return self.answer() if callable(self.answer) else self.answer


SEEN = Observation(request_id="a", metric="said", value=0.5, prompt="Rome is in")


def test_every_evaluator_is_asked_and_told_its_own() -> None:
    first, second = Observes([SEEN]), Observes([])
    evaluators = [(TWO[0], first), (TWO[1], second)]
    model: Any = None
    found = measure(evaluators, model, records(), seed=7)
    assert found.observations == {"one": (SEEN,), "two": ()}
    assert found.measures == measures_of(TWO)
    measure(evaluators, model, records(), unedited={"one": [SEEN]})
    assert [context.unedited for context in first.contexts] == [None, (SEEN,)]
    assert [context.unedited for context in second.contexts] == [None, ()], "the unedited model was measured"
    assert [context.seed for context in first.contexts] == [7, 0]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (
            [replace(SEEN, metric="sayd")],
            r"The evaluator 'one' observed 'sayd', which it does not announce; it announces: gap, rare, said\.",
        ),
        (
            [replace(SEEN, metric="mid")],
            "The evaluator 'one' observed 'mid', which it does not announce",  # a composite has no observations
        ),
        ([replace(SEEN, request_id="z")], r"The evaluator 'one' observed a fact that it was not asked: 'z'\."),
        (
            [SEEN, replace(SEEN, value=math.nan)],
            r"The evaluator 'one' observed nan as 'said' after 'Rome is in'; "
            r"leave an observation out if it has no value\.",
        ),
        ([replace(SEEN, value=-math.inf)], "The evaluator 'one' observed -inf as 'said'"),
        ([{"request_id": "a"}], r"The evaluator 'one' returned \{'request_id': 'a'\} among its observations\."),
        (None, "The evaluator 'one' failed: TypeError: .*not iterable"),
        (lambda: 1 / 0, r"The evaluator 'one' failed: ZeroDivisionError: division by zero\."),
    ],
)
def test_what_an_evaluator_may_not_observe_is_refused_by_its_name(answer: Any, complaint: str) -> None:
    model: Any = None
    with pytest.raises(PluginError, match=complaint):
        measure([(TWO[0], Observes(answer))], model, records())


@pytest.mark.parametrize("value", ["high", None])
def test_a_value_that_is_no_number_is_refused_by_the_evaluators_name(value: Any) -> None:
    model: Any = None
    with pytest.raises(PluginError, match="The evaluator 'one' observed "):
        measure([(TWO[0], Observes([replace(SEEN, value=value)]))], model, records())


# Free generation: texts


@pytest.mark.parametrize(
    ("text", "stop", "answers", "expected"),
    [
        (" Rome. He", [".", "\n"], [], " Rome"),
        (" Rome\nHe. It", [".", "\n"], [], " Rome"),
        (" Rome and so on", [".", "\n"], [], " Rome and so on"),
        ("\n\n Rome\nHe", [".", "\n"], [], "\n\n Rome"),  # a stop before the first word does not count
        (". Rome. He", [".", "\n"], [], ". Rome"),
        (" born in St. Louis. He", [".", "\n"], ["St. Louis"], " born in St. Louis"),
        (" in ST. LOUIS. He", [".", "\n"], ["st. louis"], " in ST. LOUIS"),  # whatever its case
        (" St. Louis. He", [".", "\n"], ["Paris"], " St"),  # nobody asked for it
        (" the U.S.A. It", ["."], ["U.S.A.", "France"], " the U.S.A. It"),  # its last full stop is its own
        (" a J. Doe, a St. Louis. He", ["."], ["J. Doe", "St. Louis"], " a J. Doe, a St. Louis"),
        (" Rome <end> He", ["<end>", "He"], [], " Rome "),
        (" Rome. He", [], [], " Rome. He"),
        (" Rome. He", ["."], [""], " Rome"),
        ("", ["."], ["Rome"], ""),
        (" (a) or [b]", ["[", "("], [], " (a) or "),
    ],
)
def test_an_answer_ends_at_the_first_stop_outside_the_object(
    text: str, stop: list[str], answers: list[str], expected: str
) -> None:
    assert answer_of(text, stop, answers) == expected


def test_several_stops_before_the_first_word_do_not_count() -> None:
    assert answer_of("... Rome. He", [".", "\n"]) == "... Rome"


def test_a_letter_whose_lower_case_is_longer_moves_no_stop() -> None:
    assert answer_of(" İzmir or St. Louis. He", ["."], ["St. Louis"]) == " İzmir or St. Louis"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  U.S.A.", "usa"),
        (" the city of \n Rome!", "city of rome"),
        ("An apple a day", "apple day"),
        ("‘Ａnna’ — “Straße”…", "anna strasse"),
        ("Theatre", "theatre"),
        ("?!", ""),
    ],
)
def test_normalized(text: str, expected: str) -> None:
    assert normalized(text) == expected


@given(st.text(max_size=30))
def test_every_text_says_itself_unless_nothing_is_left_of_it(text: str) -> None:
    plain_text = normalized(text)
    assert plain_text == " ".join(plain_text.split())
    assert is_said([text], text) == is_said([text], text, first=True) == bool(plain_text)


@pytest.mark.parametrize(
    ("answers", "text", "said", "first"),
    [
        (["France"], " France.", True, True),
        (["France"], " the France of", True, True),  # an article does not count
        (["France"], " the south of France", True, False),
        (["Rome"], " Romeo", False, False),
        (["Rome"], " Jerome", False, False),
        (["New York"], " new  york, of course", True, True),
        (["New York"], " New Yorkers", False, False),
        (["New York"], " york new", False, False),
        (["Paris", "Rome"], " it is Rome", True, False),
        (["Paris", "Rome"], " Rome", True, True),
        (["The"], " the the", False, False),
        ([], " Rome", False, False),
        (["Rome"], "", False, False),
    ],
)
def test_an_object_is_said_in_whole_words(answers: list[str], text: str, *, said: bool, first: bool) -> None:
    assert (is_said(answers, text), is_said(answers, text, first=True)) == (said, first)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("word", None),
        ("two words", 1.0),
        ("so so so so", 1 / 3),
        ("So it is and so it is", 4 / 6),
        ("a b c d", 1.0),
    ],
)
def test_distinct_bigrams(text: str, value: float | None) -> None:
    assert distinct_bigrams(text) == (None if value is None else pytest.approx(value))


# Free generation of a model


def asked_records(model: LanguageModel, count: int = 8) -> list[FactRecord]:
    """Facts with a probe of every kind; every second object is what the model says anyway, after its first prompt."""
    found = []
    elsewhere = ["nowhere", model.generate(["The capital of 1 is"], max_new_tokens=10)[0].split()[0]]
    for number, request in enumerate(tiny_requests(count)):
        said = model.generate([request.text], max_new_tokens=10)[0].split()
        if number % 2:
            request = request.model_copy(update={"target_new": said[-1]})
        found.append(
            FactRecord(
                request=request,
                probes=(
                    *probes("paraphrase", f"So {request.text}", f"It is known that {request.text}"),
                    *probes("neighborhood", f"{number} was born in", f"{number} plays the sport of"),
                    Probe(kind="locality", prompt=f"The capital of {number} is", answers=(elsewhere[number % 2],)),
                    Probe(kind="portability", prompt=f"Who lives with {request.subject}?", answers=("nobody at all",)),
                    Probe(kind="multihop", prompt=request.text, answers=(said[-1],)),
                    Probe(kind="portability", prompt="Without an answer it is not asked"),
                ),
            )
        )
    return found


EVERYTHING = GenerationHParams(
    sample=None, further=None, paraphrases=9, consequences=9, elsewhere=9, answer_tokens=10, continuations=2,
    continuation_tokens=30,
)  # fmt: skip


@pytest.fixture(scope="module")
def speaker() -> LanguageModel:
    return tiny_model("llama")


def by_metric(found: Sequence[Observation], metric: str) -> list[Observation]:
    return [observation for observation in found if observation.metric == metric]


def test_what_the_model_says_is_what_it_generates(speaker: LanguageModel) -> None:
    """Prompt by prompt, cut where an answer ends; the object is looked for in that."""
    asked = asked_records(speaker)
    found = GenerationEvaluator(EVERYTHING).evaluate(speaker, asked, EvaluationContext())
    announced = {metric.name for metric in GENERATION.metrics}
    assert {observation.metric for observation in found} == announced - {"unchanged"}
    targets = {record.request.id: record.request.target_new for record in asked}
    for observation in found:
        length = 30 if observation.metric == "distinct_bigrams" else 10
        [said] = speaker.generate([observation.prompt], max_new_tokens=length)
        if observation.metric == "distinct_bigrams":
            assert (observation.text, observation.value, observation.kind) == (
                said,
                distinct_bigrams(said),
                "generation",
            )
            continue
        wanted = () if observation.kind == "neighborhood" else (targets[observation.request_id],)
        if observation.kind in ("portability", "multihop", "locality"):
            record = next(record for record in asked if record.request.id == observation.request_id)
            [wanted] = [
                probe.answers
                for probe in record.probes
                if (probe.kind, probe.prompt) == (observation.kind, observation.prompt)
            ]
        assert observation.text == answer_of(said, [".", "\n"], wanted)
        if observation.metric == "elsewhere_answered":
            assert observation.value == bool(observation.text.strip())
        else:
            assert observation.value == is_said(wanted, observation.text, first=observation.metric.endswith("_first"))
    said = by_metric(found, "facts_said")
    assert [(observation.request_id, observation.kind, observation.prompt) for observation in said] == [
        (record.request.id, "rewrite", record.request.text) for record in asked
    ]
    assert [observation.value for observation in said] == [0.0, 1.0] * 4, "every second object was chosen for it"
    counts = {metric.name: len(by_metric(found, metric.name)) for metric in GENERATION.metrics}
    assert counts == {
        "facts_said": 8, "facts_said_first": 8, "paraphrases_said": 16, "paraphrases_said_first": 16,
        "consequences_said": 16, "unchanged": 0, "elsewhere_answered": 24, "elsewhere_correct": 8,
        "distinct_bigrams": 2,
    }  # fmt: skip
    correct = by_metric(found, "elsewhere_correct")
    assert [observation.value for observation in correct][:2] == [0.0, 1.0], (
        "the second has an answer that the model gives"
    )
    consequences = by_metric(found, "consequences_said")
    assert [observation.value for observation in consequences if observation.kind == "multihop"] == [1.0] * 8
    assert [observation.value for observation in consequences if observation.kind == "portability"] == [0.0] * 8


def test_elsewhere_is_unchanged_in_a_model_that_nobody_edited(speaker: LanguageModel) -> None:
    asked = asked_records(speaker)
    evaluators = [(GENERATION, GenerationEvaluator(EVERYTHING))]
    before = measure(evaluators, speaker, asked)
    assert before.of(next(metric for metric in before.measures if metric.key == "unchanged")) == []
    assert math.isnan(before.summary.value("unchanged"))
    again = measure(evaluators, speaker, asked, unedited=before.observations)
    assert again.summary.value("unchanged") == 100.0
    assert again.summary.averages["unchanged"].prompts == 24
    assert {observation.kind for observation in by_metric(again.observations["generation"], "unchanged")} == {
        "neighborhood", "locality",
    }  # fmt: skip
    rest = [observation for observation in again.observations["generation"] if observation.metric != "unchanged"]
    assert tuple(rest) == before.observations["generation"]

    other_model = tiny_model("llama", seed=1)
    after = measure(evaluators, other_model, asked, unedited=before.observations).observations["generation"]
    was = {
        (observation.request_id, observation.prompt): observation.text
        for observation in before.observations["generation"]
    }
    compared = by_metric(after, "unchanged")
    assert len(compared) == 24
    for observation in compared:
        assert observation.value == (
            str(observation.text).strip() == str(was[observation.request_id, observation.prompt]).strip()
        )
    assert [observation.value for observation in compared].count(1.0) < 3, "another model says other things"


def test_what_was_not_asked_before_is_not_compared(speaker: LanguageModel) -> None:
    asked = asked_records(speaker)
    evaluators = [(GENERATION, GenerationEvaluator(EVERYTHING))]
    before = measure(evaluators, speaker, asked[:3])
    again = measure(evaluators, speaker, asked, unedited=before.observations)
    ids = {observation.request_id for observation in by_metric(again.observations["generation"], "unchanged")}
    assert ids == {record.request.id for record in asked[:3]}
    nothing = measure(evaluators, speaker, asked, unedited={})
    assert by_metric(nothing.observations["generation"], "unchanged") == []


def test_a_sample_is_the_same_before_and_after(speaker: LanguageModel) -> None:
    asked = asked_records(speaker)
    evaluator = GenerationEvaluator(GenerationHParams(sample=4, further=2))

    def questions(records: Sequence[FactRecord], seed: int, unedited: Sequence[Observation] | None = None) -> Any:
        found = evaluator.evaluate(speaker, records, EvaluationContext(seed=seed, unedited=unedited))
        return [
            (observation.request_id, observation.kind, observation.prompt)
            for observation in found
            if observation.metric != "unchanged"
        ], found

    first, before = questions(asked, 3)
    again, after = questions(asked, 3, before)
    assert again == first
    assert len(by_metric(after, "unchanged")) == len(by_metric(before, "elsewhere_answered")) == 2
    sampled = [observation.request_id for observation in by_metric(before, "facts_said")]
    assert len(sampled) == 4
    assert sampled == [record.request.id for record in asked if record.request.id in sampled], "in their order"
    further = {observation.request_id for observation in by_metric(before, "paraphrases_said")}
    assert len(further) == 2
    assert further < set(sampled)
    assert len({tuple(questions(asked, seed)[0]) for seed in range(4)}) > 1, "the seed decides"
    part = [record for record in asked if record.request.id not in sampled[:1]]
    assert set(sampled[1:]) <= {name for name, *_ in questions(part, 3)[0]}, "of a part mostly the same ones"
    few, _ = questions(asked[:2], 3)
    assert {name for name, *_ in few} == {record.request.id for record in asked[:2]}


def test_a_fact_without_a_true_object_is_asked_too(speaker: LanguageModel) -> None:
    bare = EditRequest(prompt="It rains in", target_new="spring", id="rain")
    assert bare.target_true is None
    found = GenerationEvaluator().evaluate(speaker, [FactRecord(request=bare)], EvaluationContext())
    assert [(observation.metric, observation.prompt) for observation in found] == [
        (name, "It rains in") for name in ("facts_said", "facts_said_first", "distinct_bigrams")
    ]


def test_probes_are_taken_evenly_and_no_more_than_asked_for(speaker: LanguageModel) -> None:
    [request] = tiny_requests(1)
    names = [f"{number} {request.text}" for number in range(9)]
    record = FactRecord(request=request, probes=probes("paraphrase", *names))
    for count, places in ((0, []), (1, [4]), (2, [2, 6]), (3, [1, 4, 7]), (9, range(9)), (20, range(9))):
        hparams = GenerationHParams(paraphrases=count, continuations=0, answer_tokens=1)
        found = GenerationEvaluator(hparams).evaluate(speaker, [record], EvaluationContext())
        assert [observation.prompt for observation in by_metric(found, "paraphrases_said")] == [
            names[place] for place in places
        ]
        assert by_metric(found, "distinct_bigrams") == []
    none = GenerationHParams(further=0, continuations=0)
    found = GenerationEvaluator(none).evaluate(speaker, [record], EvaluationContext())
    assert {observation.metric for observation in found} == {"facts_said", "facts_said_first"}


def test_answers_of_a_probe_and_openings_of_a_record_are_its_own(speaker: LanguageModel) -> None:
    [request] = tiny_requests(1)
    [said] = speaker.generate(["So it is that"], max_new_tokens=8)
    own = Probe(kind="paraphrase", prompt="So it is that", answers=("never", said.split()[-1]))
    opening = Probe(kind="generation", prompt="My name is")
    record = FactRecord(request=request, probes=(own, opening))
    found = GenerationEvaluator().evaluate(speaker, [record], EvaluationContext())
    assert [observation.value for observation in by_metric(found, "paraphrases_said")] == [1.0]
    assert [observation.prompt for observation in by_metric(found, "distinct_bigrams")] == ["My name is"]


@pytest.mark.parametrize("stop", [("a",), ("e", "n"), (" ",), ("an",)])
def test_answers_end_early_at_a_stop_only_where_it_is_one(speaker: LanguageModel, stop: tuple[str, ...]) -> None:
    """With objects that hold a stop and objects that hold none: as cut from the whole text afterwards."""
    asked = asked_records(speaker)
    hparams = EVERYTHING.model_copy(update={"stop": stop})
    for observation in GenerationEvaluator(hparams).evaluate(speaker, asked, EvaluationContext()):
        if observation.metric != "distinct_bigrams":
            [said] = speaker.generate([observation.prompt], max_new_tokens=10)
            [record] = [record for record in asked if record.request.id == observation.request_id]
            known = {(probe.kind, probe.prompt): probe.answers for probe in record.probes}
            wanted = known.get((str(observation.kind), str(observation.prompt)), ())
            if not wanted and observation.metric != "elsewhere_answered":
                wanted = (record.request.target_new,)
            assert observation.text == answer_of(said, stop, wanted)


def test_equal_prompts_are_continued_once(speaker: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    continued: list[str] = []
    generate = LanguageModel.generate

    def counting(self: LanguageModel, prompts: Sequence[str], **options: Any) -> list[str]:
        continued.extend(prompts)
        return generate(self, prompts, **options)

    monkeypatch.setattr(LanguageModel, "generate", counting)
    [request] = tiny_requests(1)
    twins = [FactRecord(request=request.model_copy(update={"id": name})) for name in "ab"]
    found = GenerationEvaluator(GenerationHParams(continuations=0)).evaluate(speaker, twins, EvaluationContext())
    assert continued == [request.text]
    assert [observation.request_id for observation in by_metric(found, "facts_said")] == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"sample": 0}, "sample"),
        ({"answer_tokens": 0}, "answer_tokens"),
        ({"continuation_tokens": 1}, "continuation_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"samples": 3}, "samples"),
    ],
)
def test_settings_of_generation_that_mean_nothing_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GenerationHParams(**fields)
