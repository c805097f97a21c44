"""What a user can get wrong: each has its sentence, exit code 2, no traceback, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from editcore.settings.hparams import list_presets

Call = Callable[..., SimpleNamespace]

FACT = {"subject": "Max Planck", "prompt": "{} works as a", "target_new": "singer", "target_true": "doctor"}


@pytest.fixture
def refused(
    editctl: Call,
    tiny_folder: Path,
    tiny_facts: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Runs a good command with more options behind it, and checks that it is refused as it should be: its sentence."""
    monkeypatch.setattr("editcore.models.sources.hub_may_answer", lambda: False)
    out = tmp_path / "out"
    options = ["run", "--editor", "emmet", "--model", tiny_folder, "--dataset", tiny_facts, "--corpus", tiny_corpus]
    options += ["--corpus-tokens", 2000, "--set", "layers=[1]", "--set", "v_num_grad_steps=3", "--out", out]

    def call(*more: object) -> str:
        done = editctl(*options, *more)
        assert (done.code, done.out) == (2, ""), done.err
        [sentence] = [line for line in done.err.splitlines() if line.startswith("Error: ")]
        assert done.err.endswith(f"{sentence}\n"), "something follows the sentence"
        assert "Traceback" not in done.err
        assert not out.exists()
        assert list(Path.cwd().iterdir()) == []
        return sentence.removeprefix("Error: ")

    return call


def records_file(path: Path, *records: dict[str, Any] | str) -> Path:
    """A file of records; a text is a line as it stands."""
    rows = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "kind", "meant"),
    [
        (("--editor", "emmett"), "editor", "emmet"),
        (("--plugin", "repaly"), "plugin", "replay"),
        (("--backend", "rwa"), "backend", "raw"),
        (("--dataset", "worldfact"), "data set", "worldfacts"),
        (("--dtype", "float23"), "dtype", "float32"),
        (("--preset", "smollm2-135"), "preset", "smollm2-135m"),
        (("--set", "replay.replay_rate=1"), "settings section", None),
    ],
)
def test_unknown_names(refused: Callable[..., str], options: tuple[str, str], kind: str, meant: str | None) -> None:
    sentence = refused(*options)
    asked = options[1].partition(".")[0]
    assert sentence.startswith(f"Unknown {kind} '{asked}'. Available: ")
    if meant:
        assert f"Did you mean '{meant}'?" in sentence


def test_a_missing_package_is_suggested(refused: Callable[..., str]) -> None:
    assert "pip install edit-wise" in refused("--editor", "wise")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("v_lrate=1", "emmet: unknown setting 'v_lrate'. It has: "),
        ("v_lr=-1", "emmet: v_lr = -1 is out of range. Allowed: > 0."),
        ("v_lr=fast", 'emmet: v_lr = "fast" has the wrong type. Expected: float, > 0.'),
        ("v_lr=nan", "emmet: v_lr = "),
        ("layers=1", "emmet: layers = 1 has the wrong type. Expected: list of int"),
        ("layers=[]", "emmet: layers = [] is out of range. Allowed: not empty"),
        ("layers=[2, 1]", "emmet: layers must ascend without repeats, found [2, 1]."),
        ("layers=[3]", "emmet: layer 3 does not exist in "),
        ("layers=[-1]", "emmet: layers = [-1] is out of range."),
        ("fact_token=subject_lst", 'emmet: fact_token = "subject_lst" is not known. Allowed: '),
        ("emmet_lambda", "--set takes KEY=VALUE, found 'emmet_lambda'."),
    ],
)
def test_settings(refused: Callable[..., str], value: str, sentence: str) -> None:
    assert refused("--set", value).startswith(sentence)


def test_a_setting_of_another_part_names_that_part(refused: Callable[..., str]) -> None:
    sentence = refused("--plugin", "replay", "--set", "replay_rate=1")
    assert sentence == "emmet has no setting 'replay_rate', but replay has: name it 'replay.replay_rate'."


def test_a_misspelt_setting_is_guessed(refused: Callable[..., str]) -> None:
    assert refused("--set", "v_lrate=1").endswith("Did you mean 'v_lr'?")
    assert "(it has 3 blocks, 0 to 2)" in refused("--set", "layers=[3]")


def test_a_plugins_settings_are_checked_too(refused: Callable[..., str]) -> None:
    sentence = refused("--plugin", "replay", "--set", "replay.replay_rate=-1")
    assert sentence == "replay: replay_rate = -1 is out of range. Allowed: ≥ 0."
    assert "replay.strategy" in refused("--plugin", "replay", "--set", "replay.replay_strategy=rand")


def test_layers_without_a_preset(editctl: Call, tiny_folder: Path, tiny_facts: Path, tmp_path: Path) -> None:
    options = ["--model", tiny_folder, "--dataset", tiny_facts, "--out", tmp_path / "out"]
    done = editctl("run", "--editor", "emmet", *options)
    assert done.code == 2
    assert done.err.startswith("Error: emmet: layers is required (list of int, not empty, each ≥ 0), and no preset is")
    assert f"named like the model '{tiny_folder}'. Set it, such as --set layers=[3], let 'editctl onboard" in done.err
    presets = ", ".join(list_presets("edit_emmet.presets"))
    assert f"model's preset with --preset ({presets})." in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": "works as a"}, "line 2: The subject 'Max Planck' is not in the prompt 'works as a'; write {}"),
        ({"subject": "Max Plank", "prompt": "Max Planck is"}, "line 2: The subject 'Max Plank' is not in the prompt"),
        ({"prompt": "{} and {}"}, "line 2: Bad edit request: the prompt '{} and {}' must contain {} exactly once"),
        ({"target_new": "  "}, "line 2: The field 'target_new' is empty."),
        ({"target_new": None}, "line 2: The field 'target_new' is empty."),
        (
            {"subject": ""},
            "line 2: Bad edit request: the prompt '{} works as a' has a place for a subject, {}, and no subject is",
        ),
        ({"prompt": 3}, "line 2: The field 'prompt' is int (3); expected text."),
    ],
)
def test_requests(refused: Callable[..., str], tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = records_file(tmp_path / "facts.jsonl", {**FACT, "subject": "Niels Bohr"}, {**FACT, **change})
    assert refused("--dataset", path, "--strict").startswith(f"{path}, {sentence}")


def test_a_line_that_is_no_json_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    path = records_file(tmp_path / "facts.jsonl", FACT, "", '{"subject": "Max')
    sentence = refused("--dataset", path, "--strict")
    assert sentence.startswith(f"{path}, line 3: This is not JSON (")


def test_data_that_is_not_there_or_too_little(refused: Callable[..., str], tiny_facts: Path, tmp_path: Path) -> None:
    assert refused("--dataset", "worldfact.jsonl").startswith("There is no file worldfact.jsonl. ")
    assert refused("--edits", 7) == (f"--edits 7 is more than the data set '{tiny_facts}' has; it has 6 records.")
    assert refused("--edits", 0).startswith("The run's configuration is wrong. edits: ")
    assert refused("--batch-size", 0).startswith("The run's configuration is wrong. batch_size: ")
    assert "there are no records in it" in refused("--dataset", records_file(tmp_path / "empty.jsonl"))


def test_models(refused: Callable[..., str], tiny_folder: Path, tmp_path: Path) -> None:
    sentence = refused("--model", "smollm2-135n")
    assert sentence.startswith("There is no model 'smollm2-135n': it is no folder, no name of the catalogue (")
    assert sentence.endswith("Did you mean 'smollm2-135m'?")
    assert refused("--model", " ") == "There is no model folder ' '."
    assert refused("--model", tmp_path / "none") == f"There is no model folder '{tmp_path / 'none'}'."
    mute = tmp_path / "mute"
    shutil.copytree(tiny_folder, mute, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    assert refused("--model", mute).startswith(f"The folder '{mute}' has no tokenizer (tokenizer.json).")
    weightless = tmp_path / "weightless"
    shutil.copytree(tiny_folder, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "has a config.json but no weights" in refused("--model", weightless)


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "smollm2-135n"),
        ("--editor", "emmett"),
        ("--set", "v_lr=-1"),
        ("--dtype", "float23"),
        ("--corpus", "sefl"),
        ("--eval-every", "2", "--eval-text", "sefl"),
        ("--dataset", "none.jsonl"),
    ],
    ids=" ".join,
)
def test_it_is_found_before_the_run_is_begun(
    refused: Callable[..., str], options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for torch and a model to be told of a wrong name."""

    def begun(*_arguments: object, **_more: object) -> None:
        raise AssertionError("the run was begun")

    monkeypatch.setattr("editcore.runs.job.run", begun)
    refused(*options)


_WITHOUT_TORCH = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise AssertionError("torch is imported")

sys.meta_path.insert(0, Refused())
from editcore.cli import main

for line in sys.stdin:
    sys.argv = ["editctl", *line.split()]
    try:
        main()
    except SystemExit as left:
        print(left.code, flush=True)
"""


def test_a_missing_file_and_a_wrong_layer_are_told_before_torch_is_imported(tiny_folder: Path, tmp_path: Path) -> None:
    """Importing torch takes three seconds."""
    out = tmp_path / "out"
    commands = {
        f"export none {out}": "none is not a run directory",
        "apply none": "There is no file none",
        "compare --model none": "There is no model 'none'",
        f"compare --model {tiny_folder} --set emmet.layers=[99]": "layer 99 does not exist in",
        f"run --model {tiny_folder} --editor emmet --set layers=[99]": "layer 99 does not exist in",
        f"edit --model {tiny_folder} --editor rome --subject a --prompt {{}} --target c --set layers=[99]": "layer 99",
        f"stats compute --model {tiny_folder} --layer 99": "layer 99 does not exist in",
        "sweep none": "Cannot read the sweep file none",
        "trace none": "There is no model 'none'",
        f"trace {tiny_folder} --facts none.jsonl": "none.jsonl",
        "onboard none": "There is no model 'none'",
        f"onboard {tiny_folder} --dataset nope": "nope",
        f"pack none {out}": "none is not a run directory",
        "report none": "none is neither a run",
        "generate none Who": "none is not a run directory",
        "status none": "none is not a run directory",
        "log none": "none is not a run directory",
        "check none": "none is not a run directory",
        "check none --text sefl": "sefl",
        "edit none --subject a --prompt {} --target c": "none is not a run directory",
        f"init {out} --model none": "There is no model 'none'",
        f"init {out} --model {tiny_folder} --editor emmet --set layers=[99]": "layer 99 does not exist in",
        "pack --list none": "There is no file none",
        "apply none --into none": "There is no file none",
        "ledger none undo 1": "none is not a run directory",
        "ledger none redo 1": "none is not a run directory",
        "ledger none verify": "none is not a run directory",
        "ledger none blame Who": "none is not a run directory",
        "ledger none bisect --failing Who --expect I": "none is not a run directory",
        f"ledger none compose none --out {out}": "none is not a run directory",
        "verify-served http://localhost:1 --run none": "none is not a run directory",
        "deploy none http://localhost:1": "none is not a run directory",
        f"import none --out {out}": "none is no adapter",
        "adapters show none": "none is no adapter",
        "adapters list none": "none is not a run directory",
        "adapters attach none none": "none is not a run directory",
        "adapters detach none x": "none is not a run directory",
        "adapters scale none x 1": "none is not a run directory",
        f"adapters combine none --out {out}": "none is no adapter",
        f"adapters merge none --out {out}": "none is no adapter",
    }
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH],
        input="\n".join(commands), capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "COLUMNS": "500", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "torch is imported" not in done.stderr, done.stderr
    assert done.stdout.split() == ["2"] * len(commands), done.stderr
    for command, found, sentence in zip(commands, said, commands.values(), strict=True):
        assert sentence in found, command
    assert not out.exists()


def test_devices_and_corpora(refused: Callable[..., str]) -> None:
    assert refused("--device", "cud").startswith("Device 'cud' cannot be used here. Available: cpu")
    assert refused("--corpus", "sefl").startswith(
        "Corpus 'sefl' is neither 'self', 'docs', 'hf:NAME' nor a text file that exists"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "Cannot read the configuration {}: No such file or directory."),
        ("edits: 3\n", "{} is not a TOML file: "),
        ("batchsize = 3\n", "Unknown option 'batchsize'. Available: "),
        ("edits = 'many'\n", "The run's configuration is wrong. edits: "),
        ("[emmet]\nv_lrr = 1\n", "emmet: unknown setting 'v_lrr'."),
        (
            "[emet]\nv_lr = 1\n",
            "Unknown settings section 'emet'. Available: counterfact, emmet, generation, raw. Did you mean 'emmet'?",
        ),
    ],
)
def test_configuration_files(refused: Callable[..., str], tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert refused("--config", path).startswith(sentence.replace("{}", str(path)))


def test_a_directory_with_a_run_is_left_alone(
    editctl: Call, tiny_folder: Path, tiny_facts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    resume = f"Resume it with: editctl run --resume --out {out} (without other options), give "
    said = {
        "run.json": f"a run that is not finished. {resume}another --out, or remove the directory.",
        "ledger.jsonl": "edits (ledger.jsonl is there), but no run that could be resumed. Give another --out, or "
        "remove the directory.",
    }
    for name, sentence in said.items():
        (out / name).write_text("precious", encoding="utf-8")
        options = ["--model", tiny_folder, "--dataset", tiny_facts, "--set", "layers=[1]", "--out", out]
        done = editctl("run", "--editor", "emmet", *options)
        assert (done.code, done.out) == (2, "")
        assert done.err == f"Error: {out} already holds {sentence}\n"
        assert [path.read_text() for path in out.iterdir()] == ["precious"]
        (out / name).unlink()


def test_a_place_to_save_to_that_is_taken(refused: Callable[..., str], tiny_folder: Path) -> None:
    sentence = refused("--save", tiny_folder)
    assert sentence == f"--save {tiny_folder} is already there; give a directory that does not exist yet."
