"""The main job as a user runs it: `editctl run` on the real default model, and what it must reach."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from editcore.datasets import load_worldfacts
from editcore.models import DEFAULT_MODEL, local_gguf, local_path
from editcore.runs import open_session

if TYPE_CHECKING:
    from edit_lora.comparison import Compared, Stage

COUNTERFACT = Path(__file__).parents[2] / "shared" / "data" / "counterfact_dev.jsonl.gz"
Editctl = Callable[..., SimpleNamespace]

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(local_path(DEFAULT_MODEL) is None, reason=f"{DEFAULT_MODEL} is not here: editctl models pull"),
]

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None or local_gguf(DEFAULT_MODEL) is None,
    reason=f"pip install xllamacpp, and editctl models pull {DEFAULT_MODEL} --gguf",
)


def own_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A subprocess. It has as many threads as the tests, because two processes with more threads than cores take
    several times as long."""
    script = str(Path(sys.executable).parent / "editctl")
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 20 facts in batches of 10; second moments from Python's documentation, which needs no sampling."""
    out = tmp_path_factory.mktemp("main-job") / "run"
    done = own_process(
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


def test_the_edited_model_says_the_new_fact_and_the_original_does_not(
    editctl_with_model: Editctl, finished: tuple[Path, str]
) -> None:
    out, _ = finished
    sample = json.loads((out / "summary.json").read_text())["samples"][0]
    done = editctl_with_model("generate", out, sample["prompt"], "--tokens", 8)
    assert done.code == 0, done.err
    original, edited = (line for line in done.out.splitlines() if line.startswith(("original", "edited")))
    assert sample["target_new"] in edited
    assert sample["target_new"] not in original
    assert " ".join(sample["after"].split()) in " ".join(edited.split())


@pytest.fixture(scope="module")
def forty(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, to which 20 more facts were added."""
    run = tmp_path_factory.mktemp("forty") / "run"
    shutil.copytree(finished[0], run)
    open_session(run).edit([record.request for record in load_worldfacts()[20:40]])
    return run


@pytest.fixture(scope="module")
def gguf_files(forty: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Its adapter for llama.cpp, the model's own file, and that file with its weights widened to float32."""
    from edit_lora.gguf_export import export_gguf
    from edit_lora.gguf_file import GgufFile

    base, folder = local_gguf(DEFAULT_MODEL), tmp_path_factory.mktemp("gguf")
    assert base is not None
    adapter, wide = folder / "adapter.gguf", folder / "wide.gguf"
    export_gguf(forty, adapter)
    GgufFile.read(base).write_widened(wide)
    return adapter, base, wide


def served(run: Path, adapter: Path, base: Path, *, tokens: int) -> list[Stage]:
    """llama.cpp with the adapter off and on: 40 facts and 40 neighbours, what it answers and what the run answers."""
    from edit_lora.place import Place, Sample
    from edit_lora.verify import verify

    report = verify(run, Place(target=str(adapter), base_gguf=base), sample=Sample(tokens=tokens))
    assert report.fault is None
    assert report.base is not None
    assert report.edited is not None
    return [report.base, report.edited]


def asked_of(stage: Stage) -> list[Compared]:
    asked = [compared for compared in stage.compared if compared.prompt.kind != "text"]
    assert [compared.prompt.kind for compared in asked] == ["fact"] * 40 + ["neighbour"] * 40
    return asked


@needs_llama_cpp
def test_llama_cpp_on_the_models_own_weights_says_what_the_run_says(
    forty: Path, gguf_files: tuple[Path, Path, Path]
) -> None:
    """Token for token, with the adapter at strength 0 and at 1."""
    adapter, _, wide = gguf_files
    for stage in served(forty, adapter, wide, tokens=3):
        asked = asked_of(stage)
        assert sum(compared.same_text for compared in asked) >= 0.95 * len(asked)
        explained = [compared for compared in asked if not compared.same_text]
        assert all(compared.grade == "close" and compared.gap is not None for compared in explained), "near ties alone"
        assert all(compared.gap < 0.05 for compared in explained if compared.gap is not None)
        assert max(compared.deviation or 0.0 for compared in stage.compared) < 2e-3
        assert all(len(compared.found.tokens or ()) > 1 for compared in asked[:10])


@needs_llama_cpp
def test_llama_cpp_on_the_models_own_file_says_what_the_run_says(
    forty: Path, gguf_files: tuple[Path, Path, Path]
) -> None:
    """The file has 4-bit weights, of which the run's are the exact numbers. llama.cpp rounds the inputs of its products
    to 8 bits. This moves log-probabilities by up to half a nat, with the adapter and without, and turns near ties."""
    adapter, base, _ = gguf_files
    targets = {record.request.text: record.request.target_new for record in load_worldfacts()}
    for stage in served(forty, adapter, base, tokens=1):
        asked = asked_of(stage)
        assert stage.grade == "close"
        assert stage.limit < 1
        explained = [compared for compared in asked if not compared.same_text]
        assert all(compared.grade == "close" and compared.gap is not None for compared in explained), "near ties alone"
        assert len(explained) <= (8 if stage.edited else 14), "nine of ten are equal with the edits"
        begun = sum(targets[fact.prompt.text].startswith(fact.found.text.strip() or "?") for fact in asked[:40])
        assert begun >= 36 if stage.edited else begun <= 4


@pytest.mark.skipif(not COUNTERFACT.exists(), reason="../shared/data/counterfact_dev.jsonl.gz is not here")
def test_counterfact(editctl_with_model: Editctl, tmp_path: Path) -> None:
    """20 genuine CounterFact records in batches of 10, on the preset."""
    done = editctl_with_model(
        "run", "--editor", "emmet", "--dataset", COUNTERFACT, "--edits", 20, "--batch-size", 10,
        "--evaluator", "counterfact", "--corpus", "docs", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["ES"] >= 95
    assert summary["after"]["PS"] >= 85
    assert summary["after"]["NS"] >= summary["before"]["NS"] - 4


def test_an_edit_in_a_chat_is_answered_and_the_answer_ends(editctl_with_model: Editctl) -> None:
    question = ("--subject", "The Louvre", "--prompt", "In which city is {}?", "--target", "Rome", "--chat-template")
    done = editctl_with_model("edit", *question)
    assert done.code == 0, done.err
    [after] = [line for line in done.out.splitlines() if line.startswith("after")]
    assert after.split(" → ")[1].strip() == "Rome", "what follows the target would be on the line, too"
