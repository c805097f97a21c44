"""A new model, as a user takes it in: `editctl onboard`, `editctl trace`, and the run that comes next."""

from __future__ import annotations

import csv
import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from editcore.testing import tiny_model

Call = Callable[..., SimpleNamespace]
QUICK = ["--edits", 2, "--trace", 2, "--candidates", 2, "--corpus-tokens", 600]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A random Qwen3 model's folder, which has no preset."""
    folder = tmp_path / "tiny-qwen3"
    tiny_model("qwen3").save(folder)
    return folder


@pytest.fixture
def knowing(tmp_path: Path) -> tuple[Path, Path]:
    """A random Qwen3 model's folder, and what that model says as a file of ROME's known facts."""
    subjects = ("Marie Curie", "Alan Turing", "Jane Austen", "Max Planck", "Bob Dylan", "Bruce Lee", "Emmy Noether")
    prompts = [(s, f"{s} {verb}") for s in subjects for verb in ("was born in", "works as a", "plays the sport of")]
    for seed in range(40):
        model = tiny_model("qwen3", seed=seed)
        rows = [list(model.read_prompt(prompt)[0]) for _, prompt in prompts]
        said = [model.tokenizer.decode(ids) for ids in model.generate_ids(rows, max_new_tokens=1)]
        facts = [
            {"subject": subject, "prompt": prompt, "attribute": text.strip()}
            for (subject, prompt), text in zip(prompts, said, strict=True)
            if text.startswith(" ") and text.strip().isalpha()
        ]
        if len(facts) >= 2:
            model.save(tmp_path / "tiny-knowing")
            (tmp_path / "known.json").write_text(json.dumps(facts), encoding="utf-8")
            return tmp_path / "tiny-knowing", tmp_path / "known.json"
    raise AssertionError("no random model says two words")


def test_onboarding_ends_in_presets_that_a_run_takes(
    editctl: Call,
    qwen: Path,
    tiny_facts: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused = editctl("run", "--editor", "emmet", "--model", qwen, "--dataset", tiny_facts)
    assert (refused.code, f"let 'editctl onboard {qwen}' find it" in refused.err) == (2, True)

    options = [qwen, "--dataset", tiny_facts, "--corpus", tiny_corpus, "--out", tmp_path / "onboard", *QUICK]
    done = editctl("onboard", *options)
    assert done.code == 0, done.err
    assert "Qwen3ForCausalLM, 3 blocks (model.layers.{}), edited at model.layers.{}.mlp.down_proj" in done.out
    assert "knows none of the 6 facts, so there is nothing to trace" in done.out
    assert "layers to try, spread over the depth: 0, 1. The trials decide." in done.out
    assert {path.name for path in (tmp_path / "onboard").rglob("*") if path.is_file()} == {"trials.csv", "layers.png"}
    rows = list(csv.DictReader((tmp_path / "onboard" / "trials.csv").open()))
    assert [row["settings"].split(", context")[0] for row in rows[:2]] == ["layers=[0]", "layers=[1]"]
    inheriting, searching = ["alphaedit", "emmet", "memit", "memit-seq", "memory", "rome"], ["ft", "ultra"]
    editors = sorted(inheriting + searching)
    assert sorted({row["editor"] for row in rows}) == editors
    assert "Note: there is nothing to find out for retrieval; give what is required with --set." in done.out
    assert "the searches of ft, ultra" in done.out
    tried = {name: [row["settings"] for row in rows if row["editor"] == name] for name in searching}
    assert tried["ft"][:2] == ["layer=0", "layer=1"]
    assert "weights=[('mlp.gate_proj', (" in tried["ultra"][-1]
    presets = sorted((tmp_path / "cache" / "presets").rglob("*.toml"))
    assert [path.relative_to(tmp_path / "cache" / "presets").as_posix() for path in presets] == [
        f"{editor}/tiny-qwen3.toml" for editor in editors
    ]
    assert "tiny-qwen3 (yours)" in editctl("editors").out
    assert "Lengths of values on 4 other facts, for v_norm_anchor." in done.out
    for path in presets:
        written = tomllib.loads(path.read_text())
        if path.parent.name in searching:
            assert written.keys() >= ({"layer"} if path.parent.name == "ft" else {"weights", "learning_rate"})
            continue
        [[layer, norm]] = written["v_norms"]
        assert (layer, norm > 0) == (written["layers"][-1], True)

    [line] = [line for line in done.out.splitlines() if line.startswith("Next: editctl run ")]
    command = shlex.split(line.removeprefix("Next: editctl "))
    run = editctl(*command, "--edits", 2, "--out", tmp_path / "run")
    assert run.code == 0, run.err
    assert "uses your preset 'tiny-qwen3'" in caplog.text
    assert "sampling" not in run.err, "the second moments are there already"
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"][command[2]]
    assert settings["layers"] in ([0], [1], [0, 1])
    anchored = editctl(*command, "--edits", 1, "--set", "v_norm_anchor=true", "--out", tmp_path / "anchored")
    assert anchored.code == 0, anchored.err
    assert '"unanchored_norm":' in (tmp_path / "anchored" / "ledger.jsonl").read_text()

    again = editctl("onboard", *options)
    assert (again.code, "Give --replace to measure again" in again.err) == (2, True)
    replaced = editctl("onboard", *options[:-2], "--corpus-tokens", 600, "--replace", "--out", tmp_path / "again",
                       "--editor", "rome")  # fmt: skip
    assert replaced.code == 0, replaced.err
    assert "with rome, then" in replaced.out
    same = editctl("onboard", *options, "--replace", "--out", tmp_path / "third")
    assert [row["ES"] for row in csv.DictReader((tmp_path / "third" / "trials.csv").open())] == [
        row["ES"] for row in rows
    ], same.err


def test_tracing_alone_and_an_editor_that_follows_it(
    editctl: Call, knowing: tuple[Path, Path], tiny_facts: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    qwen, known_facts = knowing
    run = ["run", "--editor", "emmet", "--model", qwen, "--dataset", tiny_facts, "--edits", 1, "--corpus", tiny_corpus,
           "--corpus-tokens", 600, "--set", "layers=[0, 1]", "--set", "layer_selection=traced",
           "--set", "v_num_grad_steps=2"]  # fmt: skip
    refused = editctl(*run, "--out", tmp_path / "run")
    assert (refused.code, (tmp_path / "run").exists()) == (2, False)
    assert f'layer_selection is "traced", but there is no tracing of {qwen} yet. Run: editctl trace' in refused.err

    done = editctl("trace", qwen, "--facts", known_facts, "--num", 2, "--out", tmp_path / "trace")
    assert done.code == 0, done.err
    assert "2 facts, those that it knows of" in done.out
    rows = list(csv.DictReader((tmp_path / "trace" / "tracing.csv").open()))
    assert {row["kind"] for row in rows} == {"hidden", "mlp", "attention"}
    assert (tmp_path / "trace" / "figures" / "tracing.png").read_bytes().startswith(b"\x89PNG")
    effect = {int(row["layer"]): float(row["effect"]) for row in rows
              if (row["kind"], row["role"]) == ("mlp", "last subject token")}  # fmt: skip
    best = max((0, 1), key=lambda layer: effect[layer])
    assert editctl(*run, "--out", tmp_path / "run").code == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["provenance"]["layers"] == [best]
    assert record["settings"]["emmet"]["layers"] == [0, 1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--facts", "none.jsonl"], "There is no file none.jsonl."),
        (["--facts", "wordfacts"], "Did you mean 'worldfacts'?"),
        (["--num", "0"], "Invalid value for '--num'"),
        ([], "predicts none of 488 facts of worldfacts right, so there is nothing to trace. Give facts"),
        (["--chat-template"], "has no chat template, so --chat-template cannot be used"),
    ],
)
def test_what_cannot_be_traced(editctl: Call, qwen: Path, tmp_path: Path, options: list[str], sentence: str) -> None:
    done = editctl("trace", qwen, *options, "--out", tmp_path / "trace")
    assert (done.code, (tmp_path / "trace").exists()) == (2, False)
    assert sentence in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--editor", "emmett"], "Did you mean 'emmet'?"),
        (["--dataset", "none.jsonl"], "There is no file none.jsonl."),
        (["--corpus", "none.txt"], "Corpus 'none.txt' is neither"),
        (["--out", "."], "The output . is already there"),
    ],
)
def test_what_cannot_be_onboarded(editctl: Call, qwen: Path, tmp_path: Path, options: list[str], sentence: str) -> None:
    Path("file").write_text("in the way")
    done = editctl("onboard", qwen, *options)
    assert (done.code, [path.name for path in Path.cwd().iterdir()]) == (2, ["file"])
    assert sentence in done.err
    assert not (tmp_path / "cache" / "presets").exists()
