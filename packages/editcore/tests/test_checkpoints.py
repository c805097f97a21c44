"""``editctl run --eval-every N``: what checkpoints say, against a measurement by hand; and ``editctl forgetting``."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from editcore import Plugins
from editcore.evaluation import DEFAULT_EVALUATORS, CounterFactEvaluator, Measurement, measure, perplexity
from editcore.ledger.ledger import Ledger
from editcore.runs.checkpoint_history import read_checkpoint_history
from editcore.runs.forgetting import Curve
from editcore.runs.parts import make_evaluators
from editcore.runs.record import read_requests
from editcore.runs.reopening import open_run
from PIL import Image

Call = Callable[..., SimpleNamespace]

pytestmark = pytest.mark.usefixtures("toys")

COLUMNS = [
    "after_batch", "num_edits", "request_id", "batch", "age", "evaluator", "metric", "kind", "prompt", "value", "text",
]  # fmt: skip
EVALUATORS = make_evaluators(Plugins.load(), DEFAULT_EVALUATORS, {})
"""Those of a run that names none."""


@pytest.fixture
def options(small: Path, facts: Path, corpus_file: Path) -> list[object]:
    return [
        "run", "--editor", "toy", "--model", small, "--dataset", facts, "--corpus", corpus_file,
        "--corpus-tokens", 2000, "--batch-size", 1,
    ]  # fmt: skip


@pytest.fixture
def watched(editctl: Call, options: list[object], corpus_file: Path, tmp_path: Path) -> Path:
    """Six facts, one at a time, measured after every two."""
    out = tmp_path / "watched"
    done = editctl(*options, "--eval-every", 2, "--eval-text", corpus_file, "--out", out)
    assert done.code == 0, done.err
    assert f"Checkpoints: editctl forgetting {out}; their picture is " in done.out
    return out


def strict(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def observed(rows: pd.DataFrame) -> list[tuple[object, ...]]:
    """Rows of a table as tuples, all but the numbers."""
    columns = ["request_id", "evaluator", "metric", "kind", "prompt", "text"]
    return [tuple(None if pd.isna(value) else value for value in row) for row in rows[columns].itertuples(index=False)]


def told(found: Measurement) -> list[tuple[object, ...]]:
    """The same of a measurement."""
    return [
        (observation.request_id, evaluator, observation.metric, observation.kind, observation.prompt, observation.text)
        for evaluator, observations in found.observations.items()
        for observation in observations
    ]


def values_of(found: Measurement) -> list[float]:
    return [observation.value for observations in found.observations.values() for observation in observations]


def test_checkpoints_are_those_of_the_model_at_that_time(watched: Path) -> None:
    found = strict(watched / "forgetting.json")
    summary = strict(watched / "summary.json")
    assert (summary["checkpoints"], summary["forgetting"]) == (found["checkpoints"], found["forgetting"])
    assert [checkpoint["num_edits"] for checkpoint in found["checkpoints"]] == [2, 4, 6]
    assert found["metrics"] == summary["metrics"]
    assert [metric["key"] for metric in found["metrics"]] == list(summary["after"])
    assert found["retention"] == "ES"
    assert found["checkpoints"][-1]["values"] == summary["after"]
    assert found["checkpoints"][-1]["before"] == summary["before"]
    assert not (watched / "checkpoints").exists()
    frame = pd.read_parquet(watched / "checkpoints.parquet")
    assert list(frame.columns) == COLUMNS
    edited, ledger = open_run(watched)
    model = edited.model
    records = read_requests(watched)
    ids = model.tokenizer((watched.parent / "corpus.txt").read_text(), add_special_tokens=False)["input_ids"]
    ids = ids[: found["text"]["tokens"]]
    edited.rebuild([])
    base = {name: model.weight(name).double() for name in ledger.entries[0].changes}
    base = {name: weight.clone() for name, weight in base.items()}
    unedited = perplexity(model, ids, window=256)
    assert found["text"]["perplexity"] == pytest.approx(unedited, rel=1e-5)
    base_seen = measure(EVALUATORS, model, records)
    for checkpoint in found["checkpoints"]:
        edits = checkpoint["num_edits"]
        edited.rebuild([entry.written for entry in ledger.entries[:edits]])
        seen = measure(EVALUATORS, model, records[:edits], unedited=base_seen.observations)
        now = seen.summary
        assert (checkpoint["batch"], checkpoint["facts"]) == (edits - 1, edits)
        assert checkpoint["values"] == pytest.approx(now.as_json(), abs=1e-3)
        assert {"ES", "PS", "NS", "score", "facts_said", "unchanged"} <= now.values().keys()
        assert list(checkpoint["interval"]) == [key for key, average in now.averages.items() if average.facts > 1]
        for key, interval in checkpoint["interval"].items():
            assert interval == pytest.approx(list(now.averages[key].interval), abs=1e-3)
        before = base_seen.of_facts([record.request.id for record in records[:edits]]).summary
        assert checkpoint["before"] == pytest.approx(before.as_json(), abs=1e-3)
        assert checkpoint["perplexity"] == pytest.approx(perplexity(model, ids, window=256), rel=1e-5)
        assert checkpoint["perplexity_ratio"] == pytest.approx(checkpoint["perplexity"] / unedited, rel=1e-5)
        for name, weight in base.items():
            change = (model.weight(name).double() - weight).norm() / weight.norm()
            assert checkpoint["relative_change"][name] == pytest.approx(float(change), rel=1e-3)
        rows = frame[frame["num_edits"] == edits]
        assert observed(rows) == told(seen)
        assert rows["value"].tolist() == pytest.approx(values_of(seen), abs=1e-4)
        assert (rows["after_batch"] == checkpoint["batch"]).all()
        assert (rows["age"] == edits - 1 - rows["batch"]).all()
        assert dict(zip(rows["request_id"], rows["batch"], strict=True)) == {
            record.request.id: number for number, record in enumerate(records[:edits])
        }


def test_forgetting_is_that_of_the_table(watched: Path) -> None:
    found = strict(watched / "forgetting.json")["forgetting"]
    frame = pd.read_parquet(watched / "checkpoints.parquet")
    rewrite = frame[(frame["evaluator"] == "counterfact") & (frame["metric"] == "ES")]
    assert set(rewrite["kind"]) == {"rewrite"}
    curve = Curve.of(zip(rewrite["request_id"], rewrite["age"], rewrite["value"] > 0, strict=True))
    assert found["half_life"] == curve.half_life
    assert found["auc"] == pytest.approx(100 * (curve.area or 0.0))
    assert [(point["first"], point["last"]) for point in found["retention_by_age"]] == [(0, 0), (1, 2), (3, 4), (5, 6)]
    assert found["retention_by_age"][0]["facts"] == 3
    with Image.open(watched / "figures" / "forgetting_curve.png") as picture:
        assert min(picture.size) > 900


def test_watching_changes_nothing_else(editctl: Call, options: list[object], watched: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert editctl(*options, "--out", plain).code == 0
    assert not (plain / "forgetting.json").exists()
    for name in ("ledger.jsonl", "results.parquet"):
        assert (plain / name).read_bytes() == (watched / name).read_bytes()
    for path in (plain / "deltas").iterdir():
        assert path.read_bytes() == (watched / "deltas" / path.name).read_bytes()
    assert strict(plain / "summary.json").keys() == strict(watched / "summary.json").keys() - {
        "checkpoints",
        "forgetting",
    }


def test_a_sample_is_measured_of_all_ages_and_the_text_may_be_the_models_own(
    editctl: Call, options: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = editctl(*options, "--eval-every", 4, "--eval-sample", 2, "--eval-text-tokens", 1024, "--out", out)
    assert done.code == 0, done.err
    found = strict(out / "forgetting.json")
    assert [(checkpoint["num_edits"], checkpoint["facts"]) for checkpoint in found["checkpoints"]] == [(4, 2), (6, 6)]
    assert (found["text"]["source"], found["text"]["window"]) == ("self:ancestral:1", 256)
    assert 1000 <= found["text"]["tokens"] <= 1024, "an opening token of each window is not text"
    frame = pd.read_parquet(out / "checkpoints.parquet")
    first, second = sorted(frame[frame["num_edits"] == 4]["batch"].unique())
    assert (first in (0, 1), second in (2, 3)) == (True, True)


def test_batches_and_steps_need_not_fit(editctl: Call, options: list[object], tmp_path: Path) -> None:
    """After every batch that reaches or passes a multiple; a refused batch counts as handled and is not measured."""
    out = tmp_path / "out"
    gate = ["--plugin", "gate", "--set", "gate.batch=1"]
    done = editctl(*options, "--batch-size", 2, "--eval-every", 3, *gate, "--out", out)
    assert done.code == 0, done.err
    assert [entry.applied for entry in Ledger.read(out).batches] == [True, False, True]
    found = strict(out / "forgetting.json")["checkpoints"]
    assert [(checkpoint["batch"], checkpoint["num_edits"]) for checkpoint in found] == [(1, 2), (2, 4)]
    frame = pd.read_parquet(out / "checkpoints.parquet")
    assert set(zip(frame["num_edits"], frame["batch"], frame["age"], strict=True)) == {(2, 0, 0), (4, 0, 2), (4, 2, 0)}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--eval-every", 0], "eval_every: Input should be greater than or equal to 1."),
        (["--eval-sample", 2], "--eval-sample 2 is for checkpoints, and there are none without --eval-every N."),
        (["--eval-text", "docs"], "--eval-text docs is for checkpoints, and there are none without --eval-every N."),
        (["--eval-text-tokens", 512], "--eval-text-tokens 512 is for checkpoints, and there are none without"),
        (
            ["--eval-every", 2, "--eval-text-tokens", 99],
            "eval_text_tokens: Input should be greater than or equal to 256",
        ),
        (["--eval-every", 2, "--eval-text", "nowhere.txt"], "neither 'self', 'docs', 'hf:NAME' nor a text file"),
    ],
)
def test_what_cannot_be_watched_is_said_before_anything_is_written(
    editctl: Call, options: list[object], tmp_path: Path, more: list[object], sentence: str
) -> None:
    done = editctl(*options, *more, "--out", tmp_path / "out")
    assert (done.code, sentence in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_is_refused(editctl: Call, options: list[object], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Only a few words.")
    done = editctl(*options, "--eval-every", 2, "--eval-text", tmp_path / "short.txt", "--out", tmp_path / "out")
    assert done.code == 2
    assert "The corpus short.txt has " in done.err
    assert not (tmp_path / "out" / "run.json").exists()


# editctl forgetting


def test_runs_are_compared_in_a_table_and_a_picture(editctl: Call, watched: Path, tmp_path: Path) -> None:
    other_run = tmp_path / "other"
    shutil.copytree(watched, other_run)
    (other_run / "summary.json").unlink()  # as while it goes on
    picture, table = tmp_path / "both.png", tmp_path / "both.csv"
    done = editctl("forgetting", watched, other_run, "--out", picture, "--csv", table)
    assert done.code == 0, done.err
    found = strict(watched / "forgetting.json")
    keys = [metric["key"] for metric in found["metrics"] if metric["show"] == "always"]
    assert keys[:4] == ["ES", "PS", "NS", "score"]
    assert "facts_said" in keys
    rows = [line.split() for line in done.out.splitlines()]
    for label in ("watched", "other"):
        for checkpoint in found["checkpoints"]:
            values = [checkpoint["values"][key] for key in keys]
            numbers = ["-" if value is None else f"{value:.1f}" for value in values]
            start = [
                label,
                str(checkpoint["num_edits"]),
                str(checkpoint["facts"]),
                *numbers,
                f"{checkpoint['perplexity']:.2f}",
            ]
            assert any(row[: len(start)] == start for row in rows)
        half_life = found["forgetting"]["half_life"]
        ends = ["never" if half_life is None else str(half_life), f"{found['forgetting']['auc']:.1f}"]
        assert any(row[:4] == [label, "toy", *ends] for row in rows)
    written = pd.read_csv(table)
    assert written["run"].tolist() == ["watched"] * 3 + ["other"] * 3
    for key in keys:
        values = [checkpoint["values"][key] for checkpoint in found["checkpoints"]] * 2
        assert written[key].tolist() == pytest.approx(
            [math.nan if value is None else value for value in values], nan_ok=True
        )
    with Image.open(picture) as image:
        assert image.format == "PNG"
    printed = json.loads(editctl("forgetting", watched, "--json").out)
    assert printed == {"watched": found}


def test_what_cannot_be_compared_is_said(editctl: Call, options: list[object], watched: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert editctl(*options, "--edits", 1, "--out", plain).code == 0
    for arguments, sentence in (
        ((plain,), f"{plain} has no checkpoints (forgetting.json is not there). Runs have them with"),
        ((watched, watched), "A run is named twice: "),
        ((watched, "--out", tmp_path / "x.pdf"), "the picture is a PNG; give a file that ends in .png."),
        ((tmp_path / "nowhere",), "nowhere has no checkpoints"),
    ):
        done = editctl("forgetting", *arguments)
        assert (done.code, sentence in done.err) == (2, True), done.err
    (watched / "forgetting.json").write_text("{}")
    assert "is damaged (eval_every: Field required)." in editctl("forgetting", watched).err


def test_equal_prompts_of_several_records_are_run_once(watched: Path) -> None:
    """Scores are those of each record alone, with fewer tokens read."""
    edited, _ = open_run(watched)
    model = edited.model
    records = read_requests(watched)
    records += [
        record.model_copy(update={"request": record.request.model_copy(update={"id": f"{record.request.id}-"})})
        for record in records
    ]
    read: list[int] = []
    handle = model.hf.get_input_embeddings().register_forward_hook(lambda _m, ids, _o: read.append(ids[0].numel()))
    alone = [observation for record in records for observation in CounterFactEvaluator().evaluate(model, [record])]
    tokens_alone = sum(read)
    read.clear()
    together = CounterFactEvaluator().evaluate(model, records)
    handle.remove()
    assert 2 * sum(read) <= tokens_alone
    assert [
        (observation.request_id, observation.kind, observation.metric, observation.prompt) for observation in together
    ] == [(observation.request_id, observation.kind, observation.metric, observation.prompt) for observation in alone]
    assert [observation.value for observation in together] == pytest.approx(
        [observation.value for observation in alone], abs=1e-5
    )


# Other metrics


def test_the_metric_of_another_evaluator_tells_what_is_retained(
    editctl: Call, options: list[object], tmp_path: Path
) -> None:
    """The run has no CounterFact measurement; the text is the model's own."""
    out = tmp_path / "out"
    done = editctl(*options, "--evaluator", "rewrites", "--eval-every", 3, "--eval-text-tokens", 512, "--out", out)
    assert done.code == 0, done.err
    found = strict(out / "forgetting.json")
    assert found["retention"] == "won"
    assert [metric["key"] for metric in found["metrics"]] == ["won", "length"]
    lengths = [len(record.request.text) for record in read_requests(out)]
    assert [checkpoint["values"] for checkpoint in found["checkpoints"]] == [
        {"won": 100.0, "length": pytest.approx(sum(lengths[:edits]) / edits)} for edits in (3, 6)
    ]
    assert found["checkpoints"][0]["interval"]["length"][0] < sum(lengths[:3]) / 3
    assert (found["forgetting"]["half_life"], found["forgetting"]["auc"]) == (None, 100.0)
    printed = editctl("forgetting", out, "--csv", tmp_path / "table.csv", "--out", tmp_path / "both.png")
    assert printed.code == 0, printed.err
    assert "length in characters" in printed.out
    assert pd.read_csv(tmp_path / "table.csv")["length"].tolist() == pytest.approx(
        [sum(lengths[:edits]) / edits for edits in (3, 6)]
    )


def test_without_a_metric_that_tells_nothing_is_said_of_forgetting(
    editctl: Call, options: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = editctl(*options, "--evaluator", "lengths", "--eval-every", 3, "--eval-text-tokens", 512, "--out", out)
    assert done.code == 0, done.err
    found = read_checkpoint_history(out)
    assert [checkpoint.values.keys() for checkpoint in found.checkpoints] == [{"length"}] * 2
    assert (found.retention, found.forgetting.auc, found.forgetting.retention_by_age) == (None, None, ())
    printed = editctl("forgetting", out)
    assert printed.code == 0, printed.err
    [row] = [line.split() for line in printed.out.splitlines() if line.split()[:2] == ["out", "toy"]]
    assert row[3:] == ["-", "-", "-"]
