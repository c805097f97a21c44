"""Sweeps: what a file comes to, which trials run, what is kept of them, and the tables in the end."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from editcore import Plugins
from editcore.evaluation import Average
from editcore.execution.executors import make_executor
from editcore.sweeps import Plan, SweepFile, load_study, load_sweep, make_plan, run_sweep, state_of
from editcore.sweeps.tables import interval, mean_table

Call = Callable[..., SimpleNamespace]

pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture
def write(small: Path, facts: Path, corpus_file: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Writes a sweep file whose base is a quick run of the toy; more may follow."""

    def call(more: str = "", base: str = "") -> Path:
        path = tmp_path / "tiny.toml"
        path.write_text(
            f'[base]\neditor = "toy"\nmodel = "{small}"\ndataset = "{facts}"\ncorpus = "{corpus_file}"\n'
            f"corpus_tokens = 2000\nbatch_size = 2\n{base}\n{more}\n",
            encoding="utf-8",
        )
        return path

    return call


@pytest.fixture
def plan(write: Callable[..., Path]) -> Callable[..., Plan]:
    """The plan of such a file."""

    def call(more: str = "", base: str = "") -> Plan:
        return make_plan(load_sweep(write(more, base)), Plugins.load())

    return call


def rows(plan: Plan) -> list[tuple[Any, ...]]:
    return [(point.arm, *point.values.values(), point.seed) for point in plan.points]


# The plan


def test_arms_axes_and_seeds_are_combined_in_the_order_of_the_table(plan: Callable[..., Plan]) -> None:
    made = plan(
        '[[arms]]\nname = "plain"\n[[arms]]\nname = "gated"\nplugins = ["gate"]\n'
        "[grid]\nbatch_size = [1, 2]\nedits = [4, 6]"
    )
    expected = [(arm, size, edits, 0) for arm in ("plain", "gated") for size in (1, 2) for edits in (4, 6)]
    assert rows(made) == expected
    assert len(made.trials) == 8


def test_metrics_that_depend_on_settings_are_those_of_all_trials(plan: Callable[..., Plan]) -> None:
    made = plan("[grid.generation]\nprefixes = [[0], [0, 3], [5]]", base='evaluators = ["rewrites", "generation"]')
    names = [measure.key for measure in made.measures]
    assert {"facts_said", "facts_said_after_3", "facts_said_after_5"} <= set(names)
    assert len(names) == len(set(names))
    assert "facts_said_after_3" not in [measure.key for measure in plan(base='evaluators = ["generation"]').measures]


def test_seeds_stand_inside_and_exclusions_take_out(plan: Callable[..., Plan]) -> None:
    text = "[grid]\nbatch_size = [1, 2]\nedits = [4, 6]\n[[exclude]]\nbatch_size = 1\nedits = [4]\n"
    made = plan(text + "[[exclude]]\nedits = 6\nseed = 1\n", base="")
    assert rows(made) == [("toy", 1, 6, 0), ("toy", 2, 4, 0), ("toy", 2, 6, 0)]
    seeded = make_plan(
        SweepFile(sweep=made.sweep.model_copy(update={"seeds": (0, 1)}), text=""),
        Plugins.load(),
    )
    assert rows(seeded) == [("toy", 1, 6, 0), ("toy", 2, 4, 0), ("toy", 2, 4, 1), ("toy", 2, 6, 0)]


def test_an_axis_that_does_not_concern_an_arm_makes_no_trials_of_it(plan: Callable[..., Plan]) -> None:
    made = plan('[[arms]]\nname = "plain"\n[[arms]]\nname = "gated"\nplugins = ["gate"]\n[grid.gate]\nbatch = [0, 1]')
    assert rows(made) == [("plain", 0), ("gated", 0, 0), ("gated", 1, 0)]


def test_an_editor_that_takes_few_facts_at_a_time_does_the_same_at_larger_batch_sizes(
    plan: Callable[..., Plan],
) -> None:
    made = plan(
        '[[arms]]\nname = "pairs"\neditor = "toy-pairs"\n"toy-pairs".layers = [1]\n[grid]\nbatch_size = [1, 2, 6]'
    )
    keys = [point.key for point in made.points]
    assert keys[0] != keys[1] == keys[2]
    assert [point.batch_size for point in made.points] == [1, 2, 6]


def test_the_key_names_what_changes_the_result(plan: Callable[..., Plan], facts: Path, tmp_path: Path) -> None:
    [first] = plan().trials
    assert [first] == list(plan().trials)
    changed = [
        plan(base="seed = 1"),
        plan(base="toy.v_lr = 0.75"),
        plan(base="edits = 1"),
    ]
    # What the preset says already is no other run; what a file holds is.
    assert list(plan(base="toy.v_weight_decay = 0.125").trials) == [first]
    facts.write_text(facts.read_text().replace("It is known", "It is said"))
    changed.append(plan())
    keys = {first, *(key for changed_plan in changed for key in changed_plan.trials)}
    assert len(keys) == 1 + len(changed)


def test_the_code_is_part_of_the_key(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    [trial] = plan().trials.values()
    assert {"editcore", "torch", "edit-toy"} <= set(trial.versions)
    assert "edit-rome" not in trial.versions
    monkeypatch.setattr("editcore.sweeps.plan.code_versions", lambda *_: {**trial.versions, "edit-toy": "1.1"})
    assert trial.key not in plan().trials


def test_the_settings_of_a_data_set_make_axes(plan: Callable[..., Plan], facts: Path) -> None:
    """Of the arms that it concerns; what is resolved is in the configuration."""
    made = plan(
        f'[[arms]]\nname = "file"\n[[arms]]\nname = "set"\ndataset = "toy-facts:{facts}"\n'
        "[grid.toy-facts]\nmost = [2, 4]"
    )
    assert rows(made) == [("file", 0), ("set", 2, 0), ("set", 4, 0)]
    trials = list(made.trials.values())
    assert [trial.facts for trial in trials] == [6, 2, 4]
    assert trials[1].config.settings["toy-facts"] == {"file": str(facts), "most": 2, "label": "plain"}
    assert "toy-facts" not in trials[0].config.settings
    assert "edit-toy" in trials[1].versions


def test_records_of_a_data_set_that_changed_make_another_trial(
    plan: Callable[..., Plan], editctl: Call, write: Callable[..., Path], facts: Path, tmp_path: Path
) -> None:
    """The files behind a package's data set are no option of the run, but what is in them counts."""
    behind = facts.rename(tmp_path / "behind.jsonl")
    file = write()
    file.write_text(file.read_text().replace(f'dataset = "{facts}"', f'dataset = "toy-facts:{behind}"\nedits = 2'))
    arguments = ("sweep", file, "--out", tmp_path / "out")
    done = editctl(*arguments, "--executor", "inline")
    assert done.code == 0, done.err
    assert "; 0 to run" in editctl(*arguments, "--dry-run").out
    lines = behind.read_text().splitlines()
    behind.write_text("\n".join([*lines[:5], lines[5].replace("It is known", "It is said")]) + "\n")
    assert "; 0 to run" in editctl(*arguments, "--dry-run").out  # it edits the first two
    behind.write_text("\n".join([lines[0].replace("It is known", "It is said"), *lines[1:]]) + "\n")
    assert "; 1 to run" in editctl(*arguments, "--dry-run").out
    [key] = json.loads((tmp_path / "out" / "plan.json").read_text())["trials"]
    planned = json.loads((tmp_path / "out" / "plan.json").read_text())["trials"][key]["contents"]["records"]
    assert json.loads((tmp_path / "out" / "trials" / key / "run.json").read_text())["dataset"] == {
        "name": f"toy-facts:{behind}",
        "records": 2,
        "hash": planned,
    }


def test_a_worker_that_finds_other_records_refuses_the_trial(
    plan: Callable[..., Plan], facts: Path, tmp_path: Path
) -> None:
    made = plan()
    facts.write_text(facts.read_text().replace("It is known", "It is said"))
    result = run_sweep(made, tmp_path / "out", executor=make_executor(Plugins.load(), "inline", {}))
    [failure] = result.failures
    assert failure.kind == "RunError"
    assert failure.error.startswith(f"The records of '{facts}' are not the planned ones: their hash is ")
    assert not (tmp_path / "out" / "trials" / failure.key / "run.json").exists()


@pytest.mark.parametrize(
    ("more", "base", "message"),
    [
        ("", "worldfacts.x = 1", "Unknown settings section 'worldfacts'"),
        ("", "toy-facts.most = 1", "Unknown settings section 'toy-facts'"),
        (
            '[[arms]]\nname = "a"\ndataset = "toy-few:2"\ntoy-few = {file = "f", most = 3}',
            "",
            "leave one of the two out",
        ),
        ('[[arms]]\nname = "a"\ndataset = "worldfacts"\nworldfacts.x = 1', "", "unknown setting 'x'. It has no hyper"),
        ("", 'editors = "x"', "Unknown option 'editors'. .* Did you mean 'editor'?"),
        ("", "toy.v_lrr = 1.0", "toy: .*v_lrr.*v_lr"),
        ("", "gate.batch = 1", "Unknown settings section 'gate'"),
        ("[grid]\n'gate.batch' = [1]", "", "Unknown settings section 'gate'"),
        ("[grids]\nedits = [1]", "", "Unknown key of a sweep file 'grids'. .* Did you mean 'grid'?"),
        ("[grid]\nedits = []", "", "grid.edits: "),
        ("[grid]\nedits = [7]", "", "--edits 7 is more than"),
        ("[[exclude]]\nedits = 1", "", "'edits' does not vary here"),
        ("[grid]\nedits = [1]\n[[exclude]]\nedits = 1", "", "has no trials. Everything is excluded"),
        ("[[arms]]\nedits = 1", "", "each needs a name"),
        ('[[arms]]\nname = "a"\neditor = "nobody"', "", "Unknown editor 'nobody'"),
        ('[[arms]]\nname = "a"\neditor = "nobody"\noptional = true', "", "a is left out: the editor 'nobody'"),
        ('[[figures]]\nfile = "x.png"\nkind = "lines"', "", "lines need a setting along the axis"),
        (
            '[[figures]]\nfile = "x.png"\nkind = "bars"\nmetric = "ESS"',
            "",
            "Unknown metric 'ESS'. .* Did you mean 'ES'[?] The figure x.png shows it[.]",
        ),
        (
            '[[figures]]\nfile = "x.png"\nkind = "bars"\nmetric = "ES"',
            'evaluators = ["rewrites"]',
            "Unknown metric 'ES'.*won",
        ),
        ("", 'evaluators = ["rewrite"]', "Did you mean 'rewrites'?"),
        ("", 'evaluators = ["rewrites"]\ngeneration.sample = 2', "Unknown settings section 'generation'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    editctl: Call, write: Callable[..., Path], tmp_path: Path, more: str, base: str, message: str
) -> None:
    done = editctl("sweep", write(more, base), "--out", tmp_path / "out")
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert re.search(message, done.err), done.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    editctl: Call, write: Callable[..., Path], tmp_path: Path
) -> None:
    done = editctl(
        "sweep", write("[grid]\nedits = [4, 6]"), "--out", tmp_path / "out", "--seed", 1, "--seed", 2, "--dry-run"
    )
    assert done.code == 0, done.err
    assert "4 combinations, 4 trials; 4 to run, with 20 edits in 10 batches." in done.out
    assert "Their time cannot be estimated" in done.out
    assert not (tmp_path / "out").exists()


# Studies


def test_a_package_adds_a_study(editctl: Call, small: Path, facts: Path, corpus_file: Path, tmp_path: Path) -> None:
    assert "Two gates." in editctl("ablate").out
    done = editctl(
        "ablate", "gates", "--model", small, "--dataset", facts, "--set", f"corpus={corpus_file}", "--set",
        "corpus_tokens=2000", "--out", tmp_path / "out", "--executor", "inline",
    )  # fmt: skip
    assert done.code == 0, done.err
    table = pd.read_csv(tmp_path / "out" / "gates" / "gates.csv")
    assert list(table["gate.batch"]) == [0, 1]
    assert list(table["rejected"]) == [2, 2]
    assert (tmp_path / "out" / "gates" / "score_by_gate.png").stat().st_size > 5000
    assert "'nobody' is not installed" in done.out


def test_an_unknown_study_is_refused(editctl: Call) -> None:
    done = editctl("ablate", "gate")
    assert done.code == 2
    assert "Unknown study 'gate'" in done.err


@pytest.mark.parametrize("name", ["replay", "lora", "trust"])
def test_the_studies_that_are_installed_can_be_planned(name: str) -> None:
    plugins = Plugins.load()
    if name not in plugins.components("study"):
        pytest.skip(f"no installed package has the study '{name}'")
    made = make_plan(load_study(plugins, name), plugins)
    assert len(made.points) == len({(point.arm, *map(str, point.values.values())) for point in made.points})


# Running


def test_a_sweep_ends_with_one_table_and_goes_on_after_a_kill(
    editctl: Call, write: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed, workers and all; in the end the table has the bytes of a sweep that nothing ended."""
    figures = '[[figures]]\nfile = "lines.png"\nkind = "lines"\nby = "batch_size"\nmetric = "ES"\n'
    figures += '[[figures]]\nfile = "left.png"\nkind = "forgetting"\nsplit = "batch_size"\n'
    file = write(f"[grid]\nbatch_size = [1, 2]\n{figures}")
    arguments = ["sweep", str(file), "--seed", "0", "--seed", "1"]
    whole = editctl(*arguments, "--out", tmp_path / "whole", "--executor", "inline")
    assert whole.code == 0, whole.err
    assert "4 trials: 4 waiting" in whole.err
    out = tmp_path / "killed"
    threads = f"threads={torch.get_num_threads()}"
    code = "from editcore.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--out", str(out), "--workers", "2", "--executor-set", threads],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    while not list(out.glob("trials/*/batches.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "tiny" / "tiny.csv").exists()
    done = editctl(*arguments, "--out", out, "--executor", "inline")
    assert done.code == 0, done.err
    for name in ("tiny.csv", "tiny_mean.csv", "retention.csv"):
        assert (out / "tiny" / name).read_bytes() == (tmp_path / "whole" / "tiny" / name).read_bytes(), name
    table = pd.read_csv(out / "tiny" / "tiny.csv")
    typed = pd.read_parquet(out / "tiny" / "tiny.parquet")
    pd.testing.assert_frame_equal(typed.drop(columns="error"), table.drop(columns="error"), check_dtype=False)
    assert set(typed["error"]) == {""}
    assert list(zip(table["batch_size"], table["seed"], strict=True)) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert set(table["status"]) == {"finished"}
    assert table["before_ES"].nunique() == 1
    for row in table.to_dict(orient="records"):
        summary = json.loads((out / "trials" / row["key"] / "summary.json").read_text())
        for name in ("ES", "PS", "NS", "score", "facts_said"):
            assert row[name] == pytest.approx(summary["after"][name])
            assert row[f"before_{name}"] == pytest.approx(summary["before"][name])
        averaged = summary["averages"]["after"]
        assert (row["ES_low"], row["ES_high"]) == pytest.approx(Average(**averaged["ES"]).interval)
        assert math.isnan(row["score_low"])  # a composite is no mean of facts
    columns = list(table)
    shown = [
        "ES",
        "PS",
        "NS",
        "score",
        "facts_said",
        "paraphrases_said",
        "consequences_said",
        "unchanged",
        "distinct_bigrams",
    ]
    places = [columns.index(f"{name}{end}") for name in shown for end in ("", "_low", "_high")]
    assert places == list(range(columns.index("ES"), columns.index("ES") + 27))
    assert {"EM", "margin", "rewrite_nll_new", "facts_said_first"} <= set(columns)  # all are there, these ones behind
    left = pd.read_csv(out / "tiny" / "retention.csv")
    assert list(left) == [
        "arm", "batch_size", "seed", "age", "facts", "retained", "retained_low", "retained_high",
    ]  # fmt: skip
    # Retention is told by the first evaluator that says so: ES, of all six facts.
    for (size, seed), rows in left.groupby(["batch_size", "seed"]):
        [row] = table[(table["batch_size"] == size) & (table["seed"] == seed)].to_dict(orient="records")
        assert rows["age"].tolist() == list(range(6 - size, -1, -size))
        assert rows["facts"].sum() == 6
        assert (rows["retained"] * rows["facts"]).sum() / 6 == pytest.approx(row["ES"])
        earlier = rows[rows["age"] > 0]
        assert (earlier["retained"] * earlier["facts"]).sum() / earlier["facts"].sum() == pytest.approx(
            row["retention"]
        )
    assert {path.name for path in (out / "tiny").iterdir()} >= {"lines.png", "left.png", "timings.csv"}
    # The unedited model is the same for all, and what was measured of it is kept once for each seed: evaluators draw by
    # it.
    for folder in (tmp_path / "whole", out):
        kept = sorted(path.name for path in (folder / "shared").glob("before-*"))
        assert [Path(name).suffix for name in kept] == [".json", ".parquet"] * 2
        assert len({Path(name).stem for name in kept}) == 2
    requests = {path.read_bytes() for path in out.glob("trials/*/requests.jsonl")}
    assert len(requests) == 1
    again = editctl(*arguments, "--out", out, "--executor", "inline")
    assert "4 trials: 4 finished" in again.err
    state = json.loads((out / "sweep.json").read_text())
    assert (state["state"], state["trials"], state["finished"], state["failed"]) == ("finished", 4, 4, 0)


def test_arms_with_evaluators_of_their_own_share_a_table(
    editctl: Call, write: Callable[..., Path], tmp_path: Path
) -> None:
    """Its metrics are those of all arms; what an arm does not measure is empty there."""
    arms = '[[arms]]\nname = "both"\nevaluators = ["counterfact", "rewrites"]\n'
    arms += '[[arms]]\nname = "one"\nevaluators = ["rewrites"]\n'
    figure = '[[figures]]\nfile = "bars.png"\nkind = "bars"\nby = "arm"\nmetric = "length"\n'
    done = editctl("sweep", write(arms + figure), "--out", tmp_path / "out", "--executor", "inline")
    assert done.code == 0, done.err
    assert "percent (length in characters), higher is better (lower for length)" in " ".join(done.out.split())
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [metric["key"] for metric in plan["metrics"] if metric["show"] == "always"] == [
        "ES", "PS", "NS", "score", "won", "length",
    ]  # fmt: skip
    both, one = pd.read_csv(tmp_path / "out" / "tiny" / "tiny.csv").to_dict(orient="records")
    assert (both["arm"], one["arm"], both["won"], one["won"]) == ("both", "one", 100, 100)
    assert both["length"] == one["length"] > 5
    assert (math.isnan(both["ES"]), math.isnan(one["ES"])) == (False, True)
    assert one["retention"] == 100  # by "won"
    means = pd.read_csv(tmp_path / "out" / "tiny" / "tiny_mean.csv")
    assert [name for name in means if name.endswith("_low")] == [
        "ES_low", "PS_low", "NS_low", "score_low", "won_low", "length_low", "retention_low",
    ]  # fmt: skip
    assert (tmp_path / "out" / "tiny" / "bars.png").stat().st_size > 5000


def test_a_failed_trial_is_kept_with_its_reason_and_retried_when_asked(
    editctl: Call, write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write('[grid]\n"toy.fails_at" = [1, "none"]')
    out = tmp_path / "out"
    done = editctl("sweep", file, "--out", out, "--executor", "inline")
    assert done.code == 1
    assert "Batch 1 cannot be solved." in done.out
    table = pd.read_csv(out / "tiny" / "tiny.csv")
    assert list(table["status"]) == ["failed", "finished"]
    assert table["error"][0] == "Batch 1 cannot be solved."
    assert math.isnan(table["ES"][0])
    [line] = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert (line["kind"], line["attempts"], line["key"]) == ("NumericalError", 1, table["key"][0])
    kept = (out / "trials" / line["key"] / "failure.json").stat().st_mtime_ns
    assert "1 failed" in editctl("sweep", file, "--out", out, "--executor", "inline").err
    assert (out / "trials" / line["key"] / "failure.json").stat().st_mtime_ns == kept
    again = editctl("sweep", file, "--out", out, "--executor", "inline", "--retry-failed")
    assert (again.code, "1 waiting" in again.err) == (1, True)
    assert (out / "trials" / line["key"] / "failure.json").stat().st_mtime_ns > kept


def test_a_run_with_shared_measurements_gives_what_a_run_alone_gives(plan: Callable[..., Plan], tmp_path: Path) -> None:
    from editcore.runs.job import RunOptions, run

    made = plan()
    [trial] = made.trials.values()
    plugins = Plugins.load()
    run(trial.config, tmp_path / "alone", RunOptions(plugins=plugins))
    run_sweep(made, tmp_path / "out", executor=make_executor(plugins, "inline", {}))
    alone, swept = (
        {
            **json.loads((folder / "summary.json").read_text()),
            "seconds": 0,
            "seconds_per_edit": 0,
            "peak_memory_bytes": 0,
        }
        for folder in (tmp_path / "alone", tmp_path / "out" / "trials" / trial.key)
    )
    assert alone == swept
    assert state_of(tmp_path / "out", trial.key) == "finished"


def test_a_folder_of_something_else_is_left_alone(editctl: Call, write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    done = editctl("sweep", write(), "--out", tmp_path / "out")
    assert (done.code, "not a sweep" in done.err) == (2, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


# Means


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (100, 1.9840)])
def test_an_interval_is_students(degrees: int, expected: float) -> None:
    """Of the values 0, 1, ..., in units of the standard error of their mean."""
    values = np.arange(degrees + 1, dtype=float)
    low, high = interval(values)
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert (values.mean() - low) / error == pytest.approx(expected, abs=1e-4)
    assert (high - values.mean()) / error == pytest.approx(expected, abs=1e-4)


def test_intervals_are_over_seeds_where_there_are_several() -> None:
    table = pd.DataFrame(
        {
            "arm": ["a", "a", "b"], "batch_size": [1, 1, 1], "seed": [0, 1, 0], "status": "finished",
            "ES": [50.0, 60.0, 70.0], "ES_low": [1.0, 2.0, 3.0], "ES_high": [90.0, 91.0, 92.0],
        }
    )  # fmt: skip
    for name in ("PS", "NS", "score"):
        table[name] = np.nan
    means = mean_table(table, ["batch_size"], ["ES", "PS", "NS", "score"])
    assert list(means["ES"]) == [55.0, 70.0]
    assert list(means["interval"]) == ["seeds", "facts"]
    # Two values: half the range times t.
    assert means["ES_high"][0] == pytest.approx(55 + 12.7062 * 5, abs=1e-2)
    assert (means["ES_low"][1], means["ES_high"][1]) == (3.0, 92.0)


# Watching


def test_a_terminal_shows_a_live_table_and_anything_else_a_line_per_change(plan: Callable[..., Plan]) -> None:
    from editcore.cli.sweep_view import SweepView
    from rich.console import Console

    made = plan("[grid]\nbatch_size = [1, 2]")
    first, second = made.trials

    def watch(*, terminal: bool) -> str:
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=120, height=20, markup=False, highlight=False)
        times = iter(range(100))
        with SweepView(console, clock=lambda: float(next(times))) as view:
            view.begin(made, {first: "waiting", second: "waiting"})
            view.change(first, "running")
            view.change(first, "running")
            view.change(second, "running")
            view.change(first, "finished")
            view.change(second, "failed", error="[red]Too small.")
        return text.getvalue()

    lines = watch(terminal=False).splitlines()
    assert lines[0] == "2 trials: 2 waiting"
    assert lines[1] == f"{first[:8]} toy batch_size=1 seed=0: running  [2 trials: 1 running, 1 waiting]"
    assert "again, its worker was lost" in lines[2]
    assert lines[4] == f"{first[:8]} toy batch_size=1 seed=0: finished in 2 s  [2 trials: 1 finished, 1 running]"
    assert lines[5].endswith("failed in 2 s: [red]Too small.  [2 trials: 1 finished, 1 failed]")
    assert "failed: [red]Too small." in watch(terminal=True)
