"""What prompt scores add up to, and that the evaluator asks the right questions."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from editcore import EditRequest, FactRecord, Probe
from editcore.evaluation import CounterFactEvaluator, PromptScore, score_targets, summarize, summarize_frame, to_frame
from editcore.evaluation.scores import Kind, Metric, summarize_by_relation
from editcore.testing import tiny_model
from hypothesis import given, settings, strategies as st


def score(
    case: str, kind: Kind, new: float, true: float | None, *, correct: bool = False, relation: str = "r"
) -> PromptScore:
    sign = -1 if kind == "neighborhood" else 1
    return PromptScore(
        case_id=case,
        relation=relation,
        kind=kind,
        prompt="p",
        nll_new=new,
        nll_true=true,
        success=None if true is None else sign * (true - new) > 0,
        magnitude=None if true is None else sign * (math.exp(-new) - math.exp(-true)),
        correct=correct,
    )


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


def test_evaluator_follows_the_definitions() -> None:
    model = tiny_model("llama")
    found = CounterFactEvaluator().evaluate(model, records())
    kinds = ["rewrite", "paraphrase", "paraphrase", "neighborhood", "neighborhood", "rewrite", "paraphrase"]
    assert [entry.kind for entry in found] == kinds
    assert [entry.case_id for entry in found] == ["a"] * 5 + ["b"] * 2
    assert found[0].prompt == "Marie Curie was born in"
    for entry in found[:5]:
        new, true = score_targets(model, [entry.prompt] * 2, ["Rome", "Paris"])
        assert (entry.nll_new, entry.nll_true) == pytest.approx((new.nll, true.nll), abs=1e-5)
        wanted, other = (true, new) if entry.kind == "neighborhood" else (new, true)
        assert entry.success == (wanted.nll < other.nll)
        assert entry.magnitude == pytest.approx(math.exp(-wanted.nll) - math.exp(-other.nll), abs=1e-5)
        assert entry.correct == wanted.correct
    assert all(entry.nll_true is None and entry.success is None and entry.magnitude is None for entry in found[5:])


def test_a_tie_is_a_failure() -> None:
    same = EditRequest(subject="Marie Curie", prompt="{} was born in", target_new="Rome", target_true="Rome")
    record = FactRecord(request=same, probes=probes("neighborhood", "Bob was born in"))
    found = CounterFactEvaluator().evaluate(tiny_model("gpt2"), [record])
    assert [entry.success for entry in found] == [False, False]


def test_averages_are_per_case_first() -> None:
    scores = [
        score("1", "rewrite", 1, 2, correct=True),
        score("2", "rewrite", 2, 1),
        score("1", "paraphrase", 1, 2),
        score("1", "paraphrase", 2, 1),
        score("2", "paraphrase", 1, 2),
        score("1", "neighborhood", 2, 1),  # case 2 has none and does not count
        score("1", "neighborhood", 2, 1),
        score("1", "neighborhood", 1, 2),
    ]
    summary = summarize(scores)
    assert (summary.ES, summary.PS) == (50.0, 75.0)  # PS by prompts would be 66.7
    assert pytest.approx(200 / 3) == summary.NS
    assert summary.score == pytest.approx(3 / (1 / 50 + 1 / 75 + 3 / 200))
    assert summary.metrics["NS"].cases == 1
    assert summary.metrics["PS"].prompts == 3
    assert summary.metrics["PS"].std == pytest.approx(np.std([50, 100]))
    assert summary.metrics["rewrite_acc"].mean == 50.0
    assert summary.metrics["EM"].mean == pytest.approx(0.0)
    assert summary.metrics["NM"].mean == pytest.approx(100 * (math.exp(-1) - math.exp(-2)) / 3)
    assert summary.cases == 2


def test_score_is_zero_if_any_part_is() -> None:
    scores = [score("1", "rewrite", 2, 1), score("1", "paraphrase", 1, 2), score("1", "neighborhood", 2, 1)]
    assert summarize(scores).score == 0.0


def test_what_cannot_be_computed_is_absent() -> None:
    summary = summarize([score("1", "rewrite", 1, None, correct=True), score("1", "paraphrase", 1, None)])
    assert math.isnan(summary.ES)
    assert math.isnan(summary.NS)
    assert math.isnan(summary.score)
    assert summary.percentages() == {"rewrite_acc": 100.0, "paraphrase_acc": 0.0}
    written = json.loads(json.dumps(summary.as_json(), allow_nan=False))
    assert written["ES"] is None
    assert written["rewrite_acc"] == 100.0
    assert summarize([]).percentages() == {}


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            score,
            st.sampled_from(["a", "b", "c"]),
            st.sampled_from(["rewrite", "paraphrase", "neighborhood"]),
            st.floats(0, 9),
            st.none() | st.floats(0, 9),
            correct=st.booleans(),
        ),
        min_size=1,
    )
)
def test_a_table_adds_up_to_what_its_scores_do(found: list[PromptScore]) -> None:
    """A case with a prompt that has no true object is left out of the table's share for that prompt alone."""
    whole, again = summarize(found), summarize_frame(to_frame(found, phase="after"))
    assert (again.cases, list(again.metrics)) == (whole.cases, list(whole.metrics))
    for name, metric in whole.metrics.items():
        table = again.metrics[name]
        assert (table.mean, table.std) == pytest.approx((metric.mean, metric.std))
        assert (table.cases, table.share) == (metric.cases, metric.share)
        assert table.prompts >= metric.prompts


def test_by_relation() -> None:
    scores = [score("1", "rewrite", 1, 2, relation="x"), score("2", "rewrite", 2, 1, relation="w")]
    groups = summarize_by_relation(scores)
    assert list(groups) == ["w", "x"]
    assert (groups["w"].ES, groups["x"].ES) == (0.0, 100.0)


def test_intervals_hold_the_mean_and_stay_open_at_the_ends() -> None:
    sure = Metric(mean=100.0, std=0.0, cases=40, prompts=40)
    low, high = sure.interval
    assert high == pytest.approx(100.0)
    assert 90 < low < 92.5  # Wilson's interval for 40 of 40: 91.2
    binary = Metric(mean=50.0, std=50.0, cases=100, prompts=100)
    assert binary.interval == pytest.approx((40.4, 59.6), abs=0.05)
    steady = Metric(mean=50.0, std=5.0, cases=100, prompts=1000)
    assert steady.interval == pytest.approx((50 - 1.96 * 0.5, 50 + 1.96 * 0.5), abs=0.02)
    gap = Metric(mean=-3.0, std=10.0, cases=25, prompts=25, share=False)
    assert gap.interval == pytest.approx((-3 - 3.92, -3 + 3.92), abs=0.01)


def test_frame_has_a_row_per_case_and_kind(tmp_path: object) -> None:
    scores = [
        score("1", "rewrite", 1, 2, correct=True),
        score("1", "paraphrase", 1, 2),
        score("1", "paraphrase", 2, 1),
        score("2", "rewrite", 3, None),
    ]
    frame = to_frame(scores, phase="before")
    assert list(frame["case_id"] + "/" + frame["kind"]) == ["1/rewrite", "1/paraphrase", "2/rewrite"]
    assert list(frame["prompts"]) == [1, 2, 1]
    assert set(frame["phase"]) == {"before"}
    assert frame["success"][1] == 0.5
    assert frame["nll_new"][1] == 1.5
    assert math.isnan(frame["success"][2])
    assert math.isnan(frame["nll_true"][2])
    assert frame["accuracy"][0] == 1.0
    path = f"{tmp_path}/results.parquet"
    frame.to_parquet(path)
    import pandas as pd

    pd.testing.assert_frame_equal(pd.read_parquet(path), frame)
    assert list(to_frame([], phase="before").columns) == list(frame.columns)


def test_summaries_need_no_torch() -> None:
    code = (
        "import sys; from editcore.evaluation import summarize, CounterFactEvaluator; summarize([]); "
        "print([name for name in ('torch', 'pandas', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
