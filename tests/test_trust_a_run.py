"""``editctl run --plugin trust`` on a tiny model: what is rejected, where it is named, and that it stays rejected."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Editctl = Callable[..., Any]

FREE = [
    "--set", "trust.trust_threshold=0", "--set", "trust.trust_min_efficacy=0", "--set", "trust.trust_min_retention=0",
    "--set", "trust.trust_max_kl=1e6", "--set", "trust.trust_max_perplexity_ratio=1e6",
    "--set", "trust.trust_max_norm_growth=1e6", "--set", "trust.trust_text_tokens=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def stream(tiny_facts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six facts, and behind them a contradiction of the first and a repetition of the second."""
    lines = [json.loads(line) for line in tiny_facts.read_text(encoding="utf-8").splitlines()]
    against, again = json.loads(json.dumps(lines[0])), json.loads(json.dumps(lines[1]))
    against["requested_rewrite"]["target_new"]["str"] = "Vienna"
    path = tmp_path_factory.mktemp("stream") / "stream.jsonl"
    records = [*lines, {**against, "case_id": 100}, {**again, "case_id": 101}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def run(editctl: Editctl, tiny_folder: Path, stream: Path, tiny_corpus: Path, tmp_path: Path) -> Editctl:
    """Runs trust over the stream in batches of four."""

    def _run(*more: str, out: str = "out", code: int = 0) -> SimpleNamespace:
        done = editctl(
            "run", "--editor", "emmet", "--plugin", "trust", "--model", tiny_folder, "--dataset", stream,
            "--corpus", tiny_corpus, "--corpus-tokens", "1024", "--batch-size", "4", "--out", tmp_path / out,
            "--set", "layers=[1]", "--set", "v_num_grad_steps=3", "--set", 'context_templates=["{}"]', *FREE, *more,
        )  # fmt: skip
        assert done.code == code, done.err
        return SimpleNamespace(directory=tmp_path / out, said=done.out, err=done.err)

    return _run


def test_conflicts_and_harm_are_named_everywhere(run: Editctl, editctl: Editctl) -> None:
    done = run("--set", "trust.on_conflict=keep")
    summary = json.loads((done.directory / "summary.json").read_text())
    assert (summary["edits"], summary["rejected"]) == (6, 2)
    assert [(rejection["id"], rejection["batch"], rejection["by"]) for rejection in summary["rejections"]] == [
        ("100", 1, "trust"),
        ("101", 1, "trust"),
    ]
    assert summary["rejections"][0]["reason"].startswith("contradicts 'Paris' (0), active since batch 0")
    assert summary["rejections"][1]["reason"].startswith("repeats ")
    assert "2 facts were rejected" in done.said
    batches = [json.loads(line) for line in (done.directory / "batches.jsonl").read_text().splitlines()]
    assert [len(batch["rejected"]) for batch in batches] == [0, 2]
    assert "kl" in batches[1]["verdicts"]["trust"]["figures"]
    assert (done.directory / "trust.json").exists()
    shown = json.loads(editctl("ledger", done.directory, "show", "--edits", "--json").out)
    assert {row["id"] for row in shown if row["state"] == "rejected"} == {"100", "101"}
    (done.directory / "summary.json").unlink()
    assert editctl("run", "--resume", "--out", done.directory).code == 0
    assert json.loads((done.directory / "summary.json").read_text())["rejections"] == summary["rejections"]


def test_the_newer_request_replaces_the_older_one(run: Editctl) -> None:
    done = run("--set", "trust.on_conflict=replace")
    summary = json.loads((done.directory / "summary.json").read_text())
    assert (summary["edits"], summary["rejected"], summary["rejections"]) == (6, 0, [])


def test_a_conflict_may_end_the_run_in_one_sentence(run: Editctl) -> None:
    done = run("--set", "trust.on_conflict=error", code=2)
    assert "Traceback" not in done.err
    assert "trust: the request '100' ('Marie Curie was born in' → 'Vienna') contradicts 'Paris' (0)" in done.err
    batches = (done.directory / "batches.jsonl").read_text().splitlines()
    assert len(batches) == 1


def test_a_wrong_setting_is_refused_before_anything_is_written(run: Editctl) -> None:
    done = run("--set", "trust.trust_heldout=nothing", code=2)
    assert "nothing" in done.err
    assert "Traceback" not in done.err
    refused = run("--set", "trust.trust_threshold=2", out="other", code=2)
    assert "trust: trust_threshold = 2 is out of range" in refused.err
    assert not refused.directory.exists()


def test_the_table_of_a_poisoned_stream(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    path = Path(__file__).resolve().parent.parent / "tools" / "trust_table.py"
    spec = importlib.util.spec_from_file_location("trust_table", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "trust_table", tool)
    spec.loader.exec_module(tool)
    options = ["layers=[1]", "v_num_grad_steps=3", 'context_templates=["{}"]', "trust.trust_weights=[0.0, 1.0]"]
    free = [*FREE[1::2], "trust.trust_threshold=0.2"]
    assignments = [part for setting in (*options, *free) for part in ("--set", setting)]
    tool.main(["--model", str(tiny_folder), "--edits", "6", "--poison", "0.34", "--batch-size", "3",
               "--stretch", "300", *assignments])  # fmt: skip
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    arms = {row[0].strip(): row[-1].strip() for row in rows[1:5]}
    assert list(arms) == ["clean", "clean, trust", "poisoned", "poisoned, trust"]
    assert (arms["clean"], arms["poisoned"]) == ("0", "0")
    found = {row[0].strip(): (row[1].strip(), row[3]) for row in rows[6:]}
    assert {"norm", "contradiction"} <= {kind for kind, _ in found.values()}
    assert any("times the median cost" in why for kind, why in found.values() if kind == "norm")
    # What a random model makes of 30 tokens says nothing of its probability here: the weight of the gain is 0.
    assert "of 3 poisoned requests were rejected." in printed
