"""The main job as a user runs it: `editctl run` on the real default model, and what it must reach."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from editcore.models import DEFAULT_MODEL, local_gguf, local_path
from editcore.runs import read_requests

COUNTERFACT = Path(__file__).parents[2] / "shared" / "data" / "counterfact_dev.jsonl.gz"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(local_path(DEFAULT_MODEL) is None, reason=f"{DEFAULT_MODEL} is not here: editctl models pull"),
]


def editctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A subprocess. It has as many threads as the tests, because two processes with more threads than cores take
    several times as long."""
    script = str(Path(sys.executable).parent / "editctl")
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 20 facts in batches of 10; second moments from Python's documentation, which needs no sampling."""
    out = tmp_path_factory.mktemp("main-job") / "run"
    done = editctl(
        "run", "--editor", "emmet", "--plugin", "replay", "--edits", "20", "--batch-size", "10",
        "--corpus", "docs", "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_it_reaches_what_it_promises(finished: tuple[Path, str]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["ES"] < 50, "the unedited model should prefer the true objects"
    assert after["ES"] >= 95
    assert after["PS"] >= 85
    assert after["NS"] >= before["NS"] - 5
    assert before["facts_said"] <= 5, "the unedited model should say the true objects"
    assert after["facts_said"] >= 90
    assert summary["edits"] == 20


def test_the_table_and_the_files_agree(finished: tuple[Path, str]) -> None:
    out, printed = finished
    summary = json.loads((out / "summary.json").read_text())
    for phase in ("before", "after"):
        numbers = [f"{summary[phase][name]:.1f}" for name in ("ES", "PS", "NS", "score")]
        line = next(line for line in printed.splitlines() if line.startswith(phase))
        assert line.split()[1:] == numbers
    frame = pd.read_parquet(out / "results.parquet")
    for phase in ("before", "after"):
        for name in ("ES", "facts_said"):
            rewrite = frame[(frame["phase"] == phase) & (frame["kind"] == "rewrite") & (frame["metric"] == name)]
            assert rewrite["request_id"].nunique() == len(rewrite) == 20
            assert 100 * rewrite["value"].mean() == pytest.approx(summary[phase][name])
    held = round(summary["after"]["facts_said"] / 5)
    assert f"{held} of 20 facts are said" in printed
    for sample in summary["samples"]:
        assert sample["prompt"] in printed


def test_the_edited_model_says_the_new_fact_and_the_original_does_not(finished: tuple[Path, str]) -> None:
    out, _ = finished
    sample = json.loads((out / "summary.json").read_text())["samples"][0]
    done = editctl("generate", str(out), sample["prompt"], "--tokens", "8")
    assert done.returncode == 0, done.stderr
    original, edited = (line for line in done.stdout.splitlines() if line.startswith(("original", "edited")))
    assert sample["target_new"] in edited
    assert sample["target_new"] not in original
    assert " ".join(sample["after"].split()) in " ".join(edited.split())


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not here: xllamacpp")
@pytest.mark.skipif(
    local_gguf(DEFAULT_MODEL) is None, reason=f"its GGUF file is not here: editctl models pull {DEFAULT_MODEL} --gguf"
)
def test_llama_cpp_on_the_models_own_file_says_what_the_run_says(finished: tuple[Path, str], tmp_path: Path) -> None:
    """The file has 4-bit weights, of which the run's are the exact numbers. llama.cpp rounds the inputs of its products
    to 8 bits; this moves log-probabilities by up to half a nat, with the adapter and without."""
    from edit_lora.gguf_export import export_gguf
    from edit_lora.place import Place, Sample
    from edit_lora.verify import verify

    base = local_gguf(DEFAULT_MODEL)
    adapter = tmp_path / "adapter.gguf"
    export_gguf(finished[0], adapter)
    report = verify(
        finished[0], Place(target=str(adapter), base_gguf=base), sample=Sample(facts=20, neighbours=20, tokens=3)
    )
    assert report.base is not None
    assert report.edited is not None
    assert report.grade == "close"
    for stage in (report.base, report.edited):
        asked = [one for one in stage.compared if one.prompt.kind != "text"]
        assert len(asked) == 40
        assert all(one.grade != "different" for one in stage.compared)
        assert all(one.gap is not None and one.gap < 0.6 for one in asked if not one.same_text), "near ties alone"
        assert sum(one.found.tokens[:1] == one.expected.tokens[:1] for one in asked) >= 34
    facts = [one for one in report.edited.compared if one.prompt.kind == "fact"]
    records = {record.request.text: record.request for record in read_requests(finished[0])}
    said = [one.found.text.strip().startswith(records[one.prompt.text].target_new[:4]) for one in facts]
    assert sum(said) >= 19
    assert sum(one.found.tokens[:1] == one.expected.tokens[:1] for one in facts) >= 19


@pytest.mark.skipif(not COUNTERFACT.exists(), reason="../shared/data/counterfact_dev.jsonl.gz is not here")
def test_counterfact(tmp_path: Path) -> None:
    """20 genuine CounterFact records in batches of 10, on the preset."""
    done = editctl(
        "run", "--editor", "emmet", "--dataset", str(COUNTERFACT), "--edits", "20", "--batch-size", "10",
        "--corpus", "docs", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["ES"] >= 95
    assert summary["after"]["PS"] >= 85
    assert summary["after"]["NS"] >= summary["before"]["NS"] - 4


def test_an_edit_in_a_chat_is_answered_and_the_answer_ends() -> None:
    question = ("--subject", "The Louvre", "--prompt", "In which city is {}?", "--target", "Rome", "--chat-template")
    done = editctl("edit", *question)
    [after] = [line for line in done.stdout.splitlines() if line.startswith("after")]
    assert after.split(" → ")[1].strip() == "Rome", "what follows the target would be on the line, too"
