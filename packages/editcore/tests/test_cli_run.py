"""``editctl run``, ``edit`` and ``generate``: options, files that say what happened, and errors of one paragraph."""

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

import pandas as pd
import pytest
import torch
from editcore import EditcoreError, Plugins, RunError
from editcore.datasets import content_hash, load_records
from editcore.ledger.ledger import Ledger
from editcore.models import LanguageModel
from editcore.runs.config import RunConfig
from editcore.runs.job import default_directory, run
from editcore.runs.reopening import open_run, open_session
from editcore.testing import StandInServer, tiny_model

Call = Callable[..., SimpleNamespace]

pytestmark = pytest.mark.usefixtures("toys", "plain_pictures")


@pytest.fixture
def run_toy(editctl: Call, small: Path, facts: Path, corpus_file: Path, tmp_path: Path) -> Call:
    """``editctl run`` of the toy editor on the small model; more options may follow. The run is in ``out``."""

    def call(*more: object, editor: str | None = "toy") -> SimpleNamespace:
        options = ["--model", small, "--dataset", facts, "--corpus", corpus_file, "--corpus-tokens", 2000]
        options += ["--batch-size", 2, "--out", tmp_path / "out"]
        return editctl("run", *(["--editor", editor] if editor else []), *options, *more)

    return call


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, with no number that JSON does not have."""
    return [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]


def strict(text: str) -> Any:
    """JSON without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def setting(out: Path, name: str, *, of: str = "toy") -> Any:
    """A hyperparameter, as the run recorded it."""
    return json.loads((out / "run.json").read_text())["settings"][of][name]


# Options


def test_set_wins_over_the_file_and_the_file_over_the_preset(run_toy: Call, tmp_path: Path) -> None:
    config = tmp_path / "toy.toml"
    config.write_text("edits = 2\nseed = 7\n[toy]\nv_lr = 0.5\nclamp_norm_factor = 2.0\n", encoding="utf-8")
    done = run_toy("--config", config, "--set", "v_lr=0.75", "--seed", 8)
    assert done.code == 0, done.err
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())
    toy = recorded["settings"]["toy"]
    # The preset is the one with the name of the model's folder.
    assert (toy["v_weight_decay"], toy["clamp_norm_factor"], toy["v_lr"]) == (0.125, 2.0, 0.75)
    assert toy["layers"] == [1]
    assert (recorded["config"]["edits"], recorded["config"]["seed"], recorded["seed"]) == (2, 8, 8)
    assert recorded["config"]["settings"] == {"toy": {"v_lr": 0.75, "clamp_norm_factor": 2.0}}


@pytest.mark.parametrize("written", ['plugins = ["gate"]', 'plugin = ["gate"]', 'plugin = "gate"'])
def test_a_file_may_hold_every_option(
    editctl: Call, small: Path, facts: Path, corpus_file: Path, tmp_path: Path, written: str
) -> None:
    config = tmp_path / "all.toml"
    config.write_text(
        f'editor = "toy"\n{written}\nmodel = "{small}"\ndataset = "{facts}"\ncorpus = "{corpus_file}"\n'
        "corpus-tokens = 2000\nbatch_size = 2\nedits = 4\n[gate]\nbatch = 0\n",
        encoding="utf-8",
    )
    done = editctl("run", "--config", config, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "2 facts were rejected" in done.out
    assert setting(tmp_path / "out", "batch", of="gate") == 0


@pytest.mark.parametrize("asked", [("--plugin", "half"), ("--backend", "half")])
def test_the_name_of_a_backend_selects_it(run_toy: Call, tmp_path: Path, asked: tuple[str, str]) -> None:
    done = run_toy(*asked, "--set", "half.strength=0.125", "--edits", 2)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    config = json.loads((out / "run.json").read_text())["config"]
    assert (config["backend"], config["plugins"]) == ("half", [])
    # Opened again, the backend has its hyperparameters.
    edited, ledger = open_run(out)
    base = LanguageModel.load(config["model"])
    name = base.layout.weight_name(1)
    change = 0.125 * ledger.entries[0].changes[name].dense()
    found = edited.model.weight(name).double()
    torch.testing.assert_close(found, base.weight(name).double() + change, rtol=0, atol=5e-7)


def test_an_evaluator_of_a_package_measures_the_run(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--evaluator", "rewrites", "--edits", 4, "--eval-every", 2)
    assert done.code == 0, done.err
    summary = strict((tmp_path / "out" / "summary.json").read_text())
    # Its own two metrics are the run's, in every file and in the printed table, and no other is.
    assert [(metric["evaluator"], metric["key"], metric["unit"]) for metric in summary["metrics"]] == [
        ("rewrites", "won", "%"),
        ("rewrites", "length", "characters"),
    ]
    records = load_records(tmp_path / "out" / "requests.jsonl", plugins=Plugins.load())
    lengths = [len(record.request.text) for record in records]
    for phase in ("before", "after"):
        assert summary[phase] == {"won": 100, "length": pytest.approx(sum(lengths) / 4)}
        assert summary["averages"][phase]["won"] == {
            "mean": 100,
            "std": 0,
            "facts": 4,
            "prompts": 4,
            "share": True,
            "within": "facts",
        }
    assert [checkpoint["values"]["won"] for checkpoint in summary["checkpoints"]] == [100, 100]
    assert summary["checkpoints"][0]["values"]["length"] == pytest.approx(sum(lengths[:2]) / 2)
    assert summary["checkpoints"][0]["before"] == summary["checkpoints"][0]["values"]
    assert all(checkpoint["values"].keys() == {"won", "length"} for checkpoint in summary["checkpoints"])
    table = [row.split() for row in done.out.splitlines()]
    assert ["won", "length"] in table
    assert ["after", "100.0", f"{sum(lengths) / 4:.4g}"] in table
    heading = "4 edits, by rewrites; percent (length in characters), higher is better (lower for length)"
    assert heading in " ".join(done.out.split())
    assert "are said" not in done.out
    frame = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(zip(frame["phase"], frame["evaluator"], frame["metric"], strict=True)) == {
        (phase, "rewrites", metric) for phase in ("before", "after") for metric in ("won", "length")
    }
    assert len(frame) == 16


def test_two_evaluators_measure_a_run_side_by_side(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--evaluator", "rewrites", "--evaluator", "generation", "--edits", 4, "--set", "generation.sample=3")
    assert done.code == 0, done.err
    summary = strict((tmp_path / "out" / "summary.json").read_text())
    assert list(dict.fromkeys(metric["evaluator"] for metric in summary["metrics"])) == ["rewrites", "generation"]
    assert summary["averages"]["after"]["won"]["facts"] == 4
    assert summary["averages"]["after"]["facts_said"]["facts"] == 3
    [tally] = summary["tallies"]
    assert (tally["metric"], tally["words"], tally["asked"], tally["active"]) == ("facts_said", "are said", 3, 4)
    assert tally["held"] + len(tally["missing"]) == 3
    assert summary["after"]["facts_said"] == pytest.approx(100 * tally["held"] / 3)
    printed = " ".join(done.out.split())
    assert "4 edits, by rewrites; percent" in printed
    assert "4 edits, by generation on 3 of them; percent, higher is better" in printed
    assert f"{tally['held']} of 3 facts (a sample of 4) are said" in printed


class Court(StandInServer):
    """A judge that finds everything right."""

    def post(self, _path: str, _body: bytes) -> tuple[int, object]:
        return 200, {"choices": [{"message": {"content": "CORRECT"}}]}


def test_a_judge_is_recorded_and_its_key_is_not(run_toy: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURT_KEY", "a-secret-key")
    settings = {"contexts": '["prompt", "chat"]', "judge_model": "court", "judge_key_from": "COURT_KEY", "sample": 2}
    options = [option for name, value in settings.items() for option in ("--set", f"generation.{name}={value}")]
    court = Court()
    done = run_toy("--edits", 2, *options, "--set", f"generation.judge={court.url}")
    court.close()
    assert done.code == 0, done.err
    assert set(court.keys) == {"Bearer a-secret-key"}
    summary = strict((tmp_path / "out" / "summary.json").read_text())
    [metric] = [metric for metric in summary["metrics"] if metric["key"] == "facts_judged"]
    assert f"the judge court at {court.url} finds" in metric["meaning"]
    assert summary["before"]["facts_judged"] == summary["after"]["facts_judged"] == 100.0
    printed = " ".join(done.out.split())
    assert "facts_said_chat (needs a model with a chat template)" in printed
    frame = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(frame[frame["metric"] == "facts_judged"]["text"]) == {"CORRECT"}
    kept = lines(tmp_path / "out" / "judgements.jsonl")
    assert {(line["judge"], line["reply"]) for line in kept} == {(f"court at {court.url}", "CORRECT")}
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if b"a-secret-key" in path.read_bytes()]

    missing = run_toy("--set", "generation.judge=http://127.0.0.1:9", "--set", "generation.judge_key_from=NO_SUCH_KEY")
    assert missing.code == 2
    assert "the environment variable NO_SUCH_KEY is not set" in missing.err


def test_an_evaluator_that_is_not_installed_stops_before_anything_is_written(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--evaluator", "rewrite")
    assert done.code == 2
    assert "Did you mean 'rewrites'?" in done.err
    assert not (tmp_path / "out").exists()


def test_two_backends_are_one_too_many(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--plugin", "raw", "--plugin", "half")
    assert (done.code, done.err) == (
        2,
        "Error: The backends raw and half were asked for (--plugin with a backend's name chooses it); a run has one "
        "backend.\n",
    )
    assert not (tmp_path / "out").exists()


def test_a_run_needs_an_editor(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy(editor=None)
    assert done.code == 2
    assert done.err.startswith("Error: No editor was given. Installed: ")
    assert not (tmp_path / "out").exists()


def test_facts_without_a_subject_are_refused_before_anything_is_loaded(run_toy: Call, tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"prompt": "It rains in", "target_new": "spring"}) + "\n", encoding="utf-8")
    done = run_toy("--dataset", bare)
    assert done.code == 2
    assert done.err == (
        f"Error: {bare}, line 1: It names no subject, and the editor 'toy' needs one in every request.\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def flawed(facts: Path, tmp_path: Path) -> Path:
    """The six facts, with what cannot be edited in front, between and behind them, and one subject in other letters."""
    lines = facts.read_text(encoding="utf-8").splitlines()
    fields = json.loads(lines[1])["requested_rewrite"]
    prompt = fields["prompt"].replace("{}", fields["subject"])
    in_capitals = {"subject": fields["subject"].upper(), "prompt": prompt, "target_new": fields["target_new"]["str"]}
    lines[1] = json.dumps(in_capitals)
    bad = [json.dumps({"prompt": "It rains in", "target_new": "spring"}), "{"]
    path = tmp_path / "flawed.jsonl"
    path.write_text(
        "\n".join([*bad, *lines[:3], json.dumps({**in_capitals, "subject": "Zorg"}), *lines[3:], "}"]), "utf-8"
    )
    return path


def test_records_that_cannot_be_edited_are_left_out_and_told(run_toy: Call, flawed: Path, tmp_path: Path) -> None:
    done = run_toy("--dataset", flawed, "--edits", 4)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    left_out = (
        f"{flawed}: 3 records cannot be used and are left out. Line 1: It names no subject, and the editor 'toy' needs "
        "one in every request; line 2: This is not JSON (Expecting property name enclosed in double quotes, column 2); "
        "line 6: The subject 'Zorg' is not in the prompt "
    )
    recorded, summary = (strict((out / name).read_text()) for name in ("run.json", "summary.json"))
    assert (recorded["config"]["strict"], recorded["dataset"]["records"]) == (False, 4)
    for notes in (recorded["notes"], summary["notes"]):
        assert notes[0].startswith(left_out)
        assert notes[1].startswith(f"{flawed}: 1 subject is spelt otherwise than in the prompt, by case, Unicode form ")
        assert "line 4 (" in notes[1]
    assert f"Note: {left_out}" in done.out
    assert recorded["dataset"]["hash"] == content_hash(load_records(out / "requests.jsonl", plugins=Plugins.load()))


def test_a_strict_run_refuses_them_all_at_once(run_toy: Call, flawed: Path, tmp_path: Path) -> None:
    done = run_toy("--dataset", flawed, "--strict")
    assert done.code == 2
    assert done.err.startswith(f"Error: {flawed}: 5 records cannot be used. Line 1: It names no subject, ")
    for line in (2, 4, 6, 10):
        assert f"; line {line}: " in done.err
    assert not (tmp_path / "out").exists()


def test_too_few_that_can_be_edited(run_toy: Call, flawed: Path, tmp_path: Path) -> None:
    done = run_toy("--dataset", flawed, "--edits", 7)
    assert done.code == 2
    assert done.err.startswith(
        f"Error: --edits 7 is more than the data set '{flawed}' has; it has 6 records that can be edited. "
        f"{flawed}: 4 records cannot be used and are left out. Line 1: "
    )


def test_what_was_left_out_is_still_told_by_a_resumed_run(
    run_toy: Call, editctl: Call, flawed: Path, tmp_path: Path, toys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(toys.ToyEditor, "propose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_toy("--dataset", flawed).code == 130
    done = editctl("run", "--resume", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "has other records now" not in done.err
    summary = strict((tmp_path / "out" / "summary.json").read_text())
    assert summary["notes"][0].startswith(f"{flawed}: 4 records cannot be used and are left out. ")


def test_a_run_whose_edits_are_beside_the_weights(run_toy: Call, editctl: Call, tmp_path: Path) -> None:
    options = ["--set", "layers=[1]", "--set", "spoils=beside", "--edits", 2]
    refused = run_toy(*options, "--save", tmp_path / "saved", editor="toy-any")
    assert refused.code == 2
    assert refused.err.startswith("Error: --save: the editor 'toy-any' keeps its edits beside the weights")
    assert not (tmp_path / "out").exists()
    done = run_toy(*options, editor="toy-any")
    assert done.code == 0, done.err
    edited, _ = open_run(tmp_path / "out")
    assert edited.model.asked("A") == "0, 1 A"
    assert editctl("generate", tmp_path / "out", "A").code == 0


def test_what_the_backend_does_not_take_is_refused_before_anything_is_loaded(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--backend", "half", "--set", "layers=[1]", editor="toy-any")
    assert done.code == 2
    assert done.err.startswith(
        "Error: The editor 'toy-any' gives changes that the backend 'half' does not take: attachment, dense."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 2}, "Unknown option 'batchsize'. .* Did you mean 'batch_size'?"),
        ({"edits": 0}, "The run's configuration is wrong. edits: "),
        ({"plugins": ("gate", "gate")}, "A plugin is named twice: --plugin gate --plugin gate"),
    ],
)
def test_a_wrong_configuration_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EditcoreError, match=message):
        RunConfig.create({"editor": "toy", **options}, Plugins.load())


def test_a_setting_without_preset_is_asked_for(run_toy: Call, small: Path, tmp_path: Path) -> None:
    done = run_toy("--model", small.rename(tmp_path / "other"))
    assert done.code == 2
    assert "toy: layers is required (list of int" in done.err
    assert "such as --set layers=[3], let 'editctl onboard " in done.err
    assert "or choose another model's preset with --preset (small)." in done.err
    assert not (tmp_path / "out").exists()
    again = run_toy("--model", tmp_path / "other", "--preset", "small", "--edits", 1)
    assert again.code == 0, again.err
    assert setting(tmp_path / "out", "layers") == [1]


@pytest.mark.parametrize(
    ("dataset", "directory", "title"),
    [
        ("some/where/facts.v2.jsonl.gz", "runs/toy-facts-2", "facts.v2.jsonl.gz"),
        ("worldfacts", "runs/toy-worldfacts-2", "worldfacts"),
        ("toy-facts:dev", "runs/toy-toy-facts-dev-2", "toy-facts:dev"),
        ("toy-facts:some/where.jsonl", "runs/toy-toy-facts-some-where-2", "toy-facts:some/where.jsonl"),
    ],
)
def test_directory_and_title_have_a_name_of_their_own(dataset: str, directory: str, title: str) -> None:
    config = RunConfig(editor="toy", dataset=dataset)
    found = default_directory(config)
    assert found.parent == Path("runs")  # and the time follows
    assert found.as_posix().startswith(directory)
    assert config.title(2).endswith(f": 2 edits of {title}")


# Data sets


def test_a_data_set_has_an_argument_and_settings(run_toy: Call, editctl: Call, facts: Path, tmp_path: Path) -> None:
    done = run_toy("--dataset", f"toy-facts:{facts}", "--set", "toy-facts.most=3", "--set", "toy-facts.label=x")
    assert done.code == 0, done.err
    out = tmp_path / "out"
    recorded = json.loads((out / "run.json").read_text())
    assert recorded["settings"]["toy-facts"] == {"file": str(facts), "most": 3, "label": "x"}
    kept = load_records(out / "requests.jsonl", plugins=Plugins.load())
    assert [record.extra["label"] for record in kept] == ["x", "x", "x"]
    assert recorded["dataset"] == {"name": f"toy-facts:{facts}", "records": 3, "hash": content_hash(kept)}
    assert kept == load_records(
        f"toy-facts:{facts}", plugins=Plugins.load(), settings={"toy-facts": {"most": 3, "label": "x"}}
    )
    # The records of a run are a data set, and the session of the run can be opened.
    again = run_toy("--dataset", out / "requests.jsonl", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "requests.jsonl").read_bytes() == (out / "requests.jsonl").read_bytes()
    assert len(open_session(out).requests) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "worldfacts:dev"), "The data set 'worldfacts' takes no argument; found 'worldfacts:dev'."),
        (("--dataset", "worldfacts", "--set", "worldfacts.x=1"), "worldfacts: unknown setting 'x'. It has no hyper"),
        (
            ("--dataset", "toy-facts:f", "--set", "toy-facts.labl=x"),
            "toy-facts: unknown setting 'labl'. It has: file, ",
        ),
        (
            ("--dataset", "toy-facts:f", "--set", "toy-facts.file=g"),
            "The data set is 'toy-facts:f', and toy-facts.file ",
        ),
        (("--dataset", "toy-facts:f", "--set", "toy-few.file=g"), "Unknown settings section 'toy-few'."),
        (("--dataset", "toy-fact:f"), "Unknown data set 'toy-fact'."),
        (("--set", "toy-facts.most=1"), "Unknown settings section 'toy-facts'."),
        (
            ("--dataset", "toy"),
            "The data set 'toy' has hyperparameters, and another part of the run has the same name, ",
        ),
        (("--dataset", "toy-subclassed"), "The data set 'toy-subclassed' returned something other than a FactRecord "),
    ],
)
def test_a_data_set_that_is_wrong_stops_before_anything_is_written(
    run_toy: Call, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = run_toy(*options)
    assert done.code == 2
    assert done.err.startswith(f"Error: {message}"), done.err
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_data_set_is_described(editctl: Call) -> None:
    done = editctl("describe", "toy-facts")
    assert done.code == 0, done.err
    assert "toy-facts (data set): Those of a file." in done.out
    assert "Argument: file (--dataset toy-facts:FILE)" in done.out
    assert "What stands in the extra of each." in done.out


@pytest.fixture
def stopped(run_toy: Call, facts: Path, tmp_path: Path, toys: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a data set of a package that was ended after its first batch."""
    propose = toys.ToyEditor.propose

    def interrupted(self: Any, model: Any, batch: Any, context: Any) -> Any:
        if batch.index == 1:
            raise KeyboardInterrupt
        return propose(self, model, batch, context)

    with monkeypatch.context() as patch:
        patch.setattr(toys.ToyEditor, "propose", interrupted)
        assert run_toy("--dataset", f"toy-facts:{facts}", "--set", "toy-facts.most=4").code == 130
    return tmp_path / "out"


@pytest.mark.parametrize("now", ["same", "changed", "gone"])
def test_a_resumed_run_goes_on_with_its_own_records(
    editctl: Call, stopped: Path, facts: Path, now: str, caplog: pytest.LogCaptureFixture
) -> None:
    requests = (stopped / "requests.jsonl").read_bytes()
    if now == "changed":
        facts.write_text(facts.read_text().replace("It is known", "It is said"))
    if now == "gone":
        facts.unlink()
    done = editctl("run", "--resume", "--out", stopped, "--dataset", f"toy-facts:{facts}", "--set", "toy-facts.most=4")
    assert done.code == 0, done.err
    assert (stopped / "requests.jsonl").read_bytes() == requests
    assert json.loads((stopped / "summary.json").read_text())["edits"] == 4
    said = [message for message in caplog.messages if "has other records now than when the run began" in message]
    assert len(said) == (1 if now == "changed" else 0)


# What a run leaves


def test_verdicts_and_statistics_are_on_record(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--plugin", "first", "--plugin", "gate", "--set", "gate.action=scale", "--set", "gate.scale=0.5")
    assert done.code == 0, done.err
    batches = lines(tmp_path / "out" / "batches.jsonl")
    assert [(batch["batch"], batch["applied"]) for batch in batches] == [(0, True), (1, True), (2, True)]
    fine = {"action": "accept", "reason": "fine", "scale": 1.0, "figures": {"checked": 1.0}}
    odd = {"action": "scale", "reason": "it looks odd", "scale": 0.5, "figures": {"oddness": 0.75, "ratio": None}}
    assert [batch["verdicts"] for batch in batches] == [{"first": fine}, {"gate": odd, "first": fine}, {"first": fine}]
    assert [batch["reason"] for batch in batches] == ["", "gate: it looks odd", ""]
    summary = strict((tmp_path / "out" / "summary.json").read_text())
    assert summary["extensions"] == {"gate": {"judged": 3, "mean": None}}
    assert [entry.scale for entry in Ledger.read(tmp_path / "out").entries] == [1.0, 0.5, 1.0]


def test_a_rejected_batch_is_logged_and_not_measured(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--plugin", "gate")
    assert done.code == 0, done.err
    assert "2 facts were rejected" in done.out
    out = tmp_path / "out"
    assert [(batch["batch"], batch["applied"]) for batch in lines(out / "batches.jsonl")] == [
        (0, True),
        (1, False),
        (2, True),
    ]
    assert [entry.batch for entry in Ledger.read(out).entries] == [0, 2]
    summary = strict((out / "summary.json").read_text())
    assert (summary["edits"], summary["rejected"]) == (4, 2)
    assert summary["averages"]["after"]["ES"]["facts"] == 4


def test_rejected_requests_are_named_and_not_tried_again(run_toy: Call, editctl: Call, tmp_path: Path) -> None:
    done = run_toy("--plugin", "gate", "--set", 'gate.rejects=["3"]')
    assert done.code == 0, done.err
    assert "unwanted" in done.out
    assert "1 fact was rejected" in done.out
    out = tmp_path / "out"
    summary = strict((out / "summary.json").read_text())
    assert (summary["edits"], summary["rejected"], summary["averages"]["after"]["ES"]["facts"]) == (5, 1, 5)
    [rejection] = summary["rejections"]
    assert (rejection["id"], rejection["batch"], rejection["by"], rejection["reason"], rejection["figures"]) == (
        "3", 1, "gate", "unwanted", {"harm": 2.0},
    )  # fmt: skip
    del rejection["batch"]
    assert [batch["rejected"] for batch in lines(out / "batches.jsonl")] == [[], [rejection], []]
    shown = editctl("ledger", out, "show")
    assert "unwanted" in shown.out
    edits = {row["id"]: row for row in json.loads(editctl("ledger", out, "show", "--edits", "--json").out)}
    assert (edits["3"]["state"], edits["3"]["reason"], edits["2"]["state"]) == ("rejected", "gate: unwanted", "active")
    refused = editctl("ledger", out, "undo", "3")
    assert refused.err.endswith("Error: The edit '3' was rejected (gate: unwanted); it is not in the model.\n")
    (out / "summary.json").unlink()
    again = editctl("run", "--resume", "--out", out)
    assert again.code == 0, again.err
    assert len(Ledger.read(out).batches) == 3


def test_a_run_whose_batches_are_all_rejected_ends_well(run_toy: Call, editctl: Call, tmp_path: Path) -> None:
    done = run_toy("--plugin", "gate", "--set", "gate.batch=0", "--edits", 2)
    assert done.code == 0, done.err
    summary = strict((tmp_path / "out" / "summary.json").read_text())
    assert (summary["edits"], summary["rejected"], set(summary["after"].values())) == (0, 2, {None})
    assert (summary["averages"]["after"], summary["tallies"]) == ({}, [])
    assert summary["averages"]["before"]["ES"]["facts"] == 2
    said = editctl("generate", tmp_path / "out", "Marie Curie was born in")
    assert said.code == 0, said.err
    assert "0 edits" in said.out


def test_facts_without_true_objects_leave_no_nan(run_toy: Call, tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    fact = {"subject": "Max Planck", "prompt": "{} works as a", "target_new": "singer"}
    bare.write_text(json.dumps(fact) + "\n", encoding="utf-8")
    done = run_toy("--dataset", bare)
    assert done.code == 0, done.err
    after = strict((tmp_path / "out" / "summary.json").read_text())["after"]
    assert [after[name] for name in ("ES", "PS", "NS", "score")] == [None] * 4
    assert after["rewrite_acc"] in (0.0, 100.0)


def test_without_true_objects_the_accuracies_are_shown_and_name_what_did_not_take(
    run_toy: Call, editctl: Call, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.jsonl"
    long = "It is well known that " + "the old town lies by the river and " * 5 + "{} works as a"
    facts = [
        {"subject": "Max Planck", "prompt": "{} works as a", "target_new": "singer", "paraphrase_prompts": ["He is a"]},
        {"subject": "Max Planck", "prompt": long, "target_new": "river Rome painter"},
    ]
    bare.write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    done = run_toy("--dataset", bare, "--evaluator", "counterfact", "--eval-every", 1)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    summary = strict((out / "summary.json").read_text())
    table = [row.split() for row in done.out.splitlines()]
    assert ["rewrite_acc", "paraphrase_acc"] in table
    accuracies = [f"{summary['after'][name]:.1f}" for name in ("rewrite_acc", "paraphrase_acc")]
    assert ["after", *accuracies] in table
    assert not any("ES" in row for row in table if row[:1] != ["Note:"])
    assert (
        "Note: counterfact could not compute ES (needs a true object); PS (needs paraphrases and a true object); "
        in done.out
    )
    # The last lines name the facts that did not take, and no prompt makes a table wider than a screen can show.
    [tally] = summary["tallies"]
    assert (tally["metric"], tally["asked"], len(tally["missing"])) == ("rewrite_acc", 2, 2 - tally["held"])
    assert tally["held"] < 2
    assert f"{tally['held']} of 2 facts are what the model finds likeliest; not: " in done.out
    rows = done.out.splitlines()
    start = rows.index("What the model says")
    assert max(map(len, rows[start : start + 5])) < 4 * 62 + 8
    page = editctl("report", out)
    assert page.code == 0, page.err
    text = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert "Efficacy accuracy" in text
    assert "Efficacy (ES)" not in text
    watched = strict((out / "forgetting.json").read_text())
    assert watched["retention"] == "rewrite_acc"
    shown = editctl("forgetting", out)
    assert "rewrite_acc" in shown.out
    assert "ES" not in shown.out.split()


def test_what_was_edited_before_a_failure_stays(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--set", "fails_at=2")
    assert (done.code, done.err.splitlines()[-1]) == (2, "Error: Batch 2 cannot be solved.")
    out = tmp_path / "out"
    assert [batch["batch"] for batch in lines(out / "batches.jsonl")] == [0, 1]
    assert not (out / "summary.json").exists()
    edited, ledger = open_run(out)
    model = edited.model
    assert [entry.batch for entry in ledger.entries] == [0, 1]
    expected = LanguageModel.load(str(tmp_path / "small"))
    name = expected.layout.weight_name(1)
    total = sum(entry.changes[name].dense() for entry in ledger.entries)
    written = (expected.weight(name).double() + total).float()
    # The backend sums in another order in float64, which may move one rounding to float32.
    torch.testing.assert_close(model.weight(name), written, rtol=1.2e-7, atol=1e-9)
    edited.rebuild([])
    assert torch.equal(model.weight(name), expected.weight(name))


def test_batches_that_the_editor_limits_are_logged_one_by_one(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--batch-size", 6, "--set", "layers=[0]", "--set", "fails_at=2", editor="toy-pairs")
    assert done.code == 2
    assert [batch["new"] for batch in lines(tmp_path / "out" / "batches.jsonl")] == [2, 2]


# Opening a run again


def test_a_run_opens_from_any_working_directory(
    editctl: Call, run_toy: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_toy("--model", "small", "--edits", 2, "--save", "saved").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = editctl("generate", "../out", "Marie Curie was born in", "My name is", "--tokens", 4, "--save", "edited")
    assert done.code == 0, done.err
    rows = [row.split(maxsplit=1) for row in done.out.splitlines() if row.startswith(("original", "edited"))]
    assert [(kind, text[:8]) for kind, text in rows] == [
        ("original", "Marie Cu"),
        ("edited", "Marie Cu"),
        ("original", "My name "),
        ("edited", "My name "),
    ]
    assert "2 edits" in done.out
    first, second = (LanguageModel.load(str(path)) for path in (tmp_path / "saved", Path("edited")))
    assert first.fingerprint() == second.fingerprint()


def test_another_model_in_the_same_place_is_noticed(editctl: Call, run_toy: Call, small: Path, tmp_path: Path) -> None:
    assert run_toy("--edits", 2).code == 0
    shutil.rmtree(small)
    tiny_model(seed=1).save(small)
    done = editctl("generate", tmp_path / "out", "A")
    assert done.code == 2
    assert "is not the one of the run: its weights have the fingerprint" in done.err


def test_what_is_no_run_or_damaged_is_said(editctl: Call, tmp_path: Path) -> None:
    done = editctl("generate", tmp_path / "nothing", "A")
    assert done.code == 2
    assert "is not a run directory: run.json cannot be read (No such file or directory)." in done.err
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    assert "run.json is damaged: " in editctl("generate", tmp_path, "A").err
    (tmp_path / "run.json").write_text('{"config": {"editor": "toy"}}', encoding="utf-8")
    assert "run.json is damaged: " in editctl("generate", tmp_path, "A").err


# One fact


def test_one_fact(editctl: Call, small: Path, corpus_file: Path, tmp_path: Path) -> None:
    options = ["--subject", "Max Planck", "--prompt", "{} works as a", "--target", "singer", "--editor", "toy"]
    options += ["--model", small, "--corpus", corpus_file, "--tokens", 4, "--save", tmp_path / "saved"]
    done = editctl("edit", *options)
    assert done.code == 0, done.err
    before, after = (row.split(maxsplit=1) for row in done.out.splitlines() if row.startswith(("before", "after")))
    assert before[1].startswith("Max Planck works as a")
    assert after[1].startswith("Max Planck works as a")
    base, edited = (LanguageModel.load(str(path)) for path in (small, tmp_path / "saved"))
    assert base.fingerprint() != edited.fingerprint()
    again = editctl("edit", *options)
    assert again.code == 2
    assert again.err.startswith("Error: --save ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--prompt": "Max Planck works as a"}, "the prompt 'Max Planck works as a' must contain {} exactly once"),
        ({"--prompt": "{} and {}"}, "found 2 (subject: 'Max Planck')"),
        ({"--target": " "}, "Bad edit request: target_new: "),
        ({"--subject": ""}, "the prompt '{} works as a' has a place for a subject, {}, and no subject is given."),
        (
            {"--subject": "", "--prompt": "It rains in"},
            "The editor 'toy' needs a subject in every request; 1 of 1 have",
        ),
        ({"--editor": "toi"}, "Unknown editor 'toi'."),
        ({"--set": "layers=[9]"}, "toy: layer 9 does not exist in "),
        ({"--set": "v_lr"}, "--set takes KEY=VALUE, found 'v_lr'."),
        ({"--corpus": "nowhere.txt"}, "Corpus 'nowhere.txt' is neither 'self', 'docs', 'hf:NAME' nor a text file"),
    ],
)
def test_one_fact_that_is_wrong(editctl: Call, small: Path, change: dict[str, str], message: str) -> None:
    options = {"--subject": "Max Planck", "--prompt": "{} works as a", "--target": "singer", "--editor": "toy"}
    done = editctl("edit", "--model", small, *(word for pair in {**options, **change}.items() for word in pair))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Error: ")
    assert message in done.err


# As a process


def test_a_run_as_a_process(small: Path, facts: Path, corpus_file: Path, tmp_path: Path) -> None:
    """What tests call in their own process is what a shell starts: exit code, streams, files."""
    site = [path for path in sys.path if Path(path).name.startswith(("toys", "site"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from editcore.cli import main; main()", "run", "--editor", "toy"]
    command += ["--model", str(small), "--dataset", str(facts), "--corpus", str(corpus_file), "--edits", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Everything is in" in done.stdout
    assert "editing: 2/2" in done.stderr
    again = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, env=environment, timeout=300
    )
    assert (again.returncode, again.stdout) == (2, "")
    assert "already holds a finished run. Give another --out, or remove the directory." in again.stderr
    assert "--resume" not in again.stderr


def test_a_place_that_cannot_be_written_to_is_found_first(toys: Any, tmp_path: Path) -> None:
    config = RunConfig(editor="toy", model="no/such/model/anywhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file is a file; give a directory that does not exist yet"):
        run(config, tmp_path / "file")
    with pytest.raises(RunError, match=r"cannot be made: .*file is not a folder that can be written to"):
        run(config, tmp_path / "file" / "out")


# What a model is given as


def test_a_run_an_adapter_and_nothing_are_no_models(editctl: Call, run_toy: Call, tmp_path: Path) -> None:
    assert run_toy().code == 0
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}', encoding="utf-8")
    for command in (
        ("edit", "--prompt", "{} is in", "--subject", "Rome", "--target", "France"),
        ("run",),
        ("onboard",),
    ):
        option = ["--editor", "toy", *(["--model"] if command[0] != "onboard" else [])]
        run_dir = editctl(*command, *option, tmp_path / "out")
        assert run_dir.code == 2
        assert "is a run directory: edits of " in run_dir.err
        assert "editctl apply FILE --save DIR" in run_dir.err
        of_adapter = editctl(*command, *option, adapter)
        assert f"The folder '{adapter}' is an adapter for some/base" in of_adapter.err
        for done in (run_dir, of_adapter):
            assert "required" not in done.err
            assert "has a preset" not in done.err


def test_a_missing_hub_id_is_met_before_its_settings(editctl: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editcore.models.sources.hub_may_answer", lambda: False)
    done = editctl("run", "--editor", "toy", "--model", "nobody/nothing")
    assert (done.code, done.out) == (2, "")
    assert "There is no model 'nobody/nothing': it is no folder" in done.err


def test_runs_with_other_seeds_share_text_and_moments(run_toy: Call, tmp_path: Path) -> None:
    """The seed of the text is a setting of its own, and another text is refused when the run is opened again."""
    done = run_toy("--corpus", "self", "--corpus-tokens", 256, "--edits", 2, "--seed", 5)
    assert done.code == 0, done.err
    session = open_session(tmp_path / "out")
    statistics = session.context.statistics
    assert (session.context.seed, statistics.corpus.identity()) == (5, "self:ancestral:0")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["config"]["corpus_seed"], record["statistics"]["corpus"]) == (0, "self:ancestral:0")
    record["config"]["corpus_seed"] = 3
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"second moments are of the text self:ancestral:0, .* is self:ancestral:3 now;"):
        open_session(tmp_path / "out")


def test_a_run_is_not_resumed_on_a_text_that_was_changed(run_toy: Call, corpus_file: Path, tmp_path: Path) -> None:
    assert run_toy("--edits", 2).code == 0
    (tmp_path / "out" / "summary.json").unlink()
    kept = corpus_file.read_text(encoding="utf-8")
    corpus_file.write_text(f"Another line.\n{kept}", encoding="utf-8")
    done = run_toy("--edits", 2, "--resume")
    assert done.code == 2
    assert "one run cannot mix edits solved with both" in done.err
    corpus_file.write_text(kept, encoding="utf-8")
    assert run_toy("--edits", 2, "--resume").code == 0


def test_a_dry_run_checks_and_tells_and_writes_nothing(run_toy: Call, tmp_path: Path) -> None:
    done = run_toy("--dry-run", "--edits", 3)
    assert done.code == 0, done.err
    assert "toy would write 3 facts of " in done.out
    assert " in 2 batches. Nothing was written." in done.out
    assert not (tmp_path / "out").exists()
    done = run_toy("--dry-run", "--set", "v_lr=-1")
    assert done.code == 2
    assert "v_lr" in done.err
