"""``editctl run --editor emmet --plugin replay`` on a tiny model: what stands in the directory it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from editcore.ledger.ledger import Ledger
from editcore.models import LanguageModel
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

Call = Callable[..., SimpleNamespace]

KINDS = {"rewrite": 1, "paraphrase": 2, "neighborhood": 2}
"""Prompts of each kind in a record."""
METRICS = {
    "rewrite": ("ES", "EM", "rewrite_acc", "rewrite_nll_new", "rewrite_nll_true"),
    "paraphrase": ("PS", "PM", "paraphrase_acc", "paraphrase_nll_new", "paraphrase_nll_true"),
    "neighborhood": ("NS", "NM", "neighborhood_acc", "neighborhood_nll_new", "neighborhood_nll_true"),
}
"""What counterfact observes after a prompt of each kind."""
EDITS, BATCH = 6, 4


@pytest.fixture
def command(tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path) -> list[object]:
    """A run of six facts in batches of four and two, with replay."""
    return [
        "run", "--editor", "emmet", "--plugin", "replay", "--model", tiny_folder, "--dataset", tiny_facts,
        "--corpus", tiny_corpus, "--corpus-tokens", 2000, "--batch-size", BATCH, "--seed", 3,
        "--set", "layers=[1]", "--set", "v_num_grad_steps=3", "--set", "context_count=2",
        "--set", "context_length=3", "--set", "replay.replay_rate=0.5", "--set", "replay.replay_asked=0",
    ]  # fmt: skip


@pytest.fixture
def done(editctl: Call, command: list[object], tmp_path: Path) -> SimpleNamespace:
    """The run, finished: ``out`` and ``err`` of the command, ``directory``, ``saved`` and the ``command`` itself."""
    directory, saved = tmp_path / "run", tmp_path / "saved"
    result = editctl(*command, "--out", directory, "--save", saved)
    assert result.code == 0, result.err
    return SimpleNamespace(directory=directory, saved=saved, out=result.out, err=result.err)


def read(directory: Path, name: str) -> Any:
    """A JSON file that holds neither NaN nor Infinity."""
    return json.loads((directory / name).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def lines(directory: Path, name: str) -> list[Any]:
    """The objects of a file of JSON lines."""
    text = (directory / name).read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_everything_is_there(done: SimpleNamespace) -> None:
    files = {str(path.relative_to(done.directory)) for path in done.directory.rglob("*") if path.is_file()}
    assert files == {
        "run.json",
        "requests.jsonl",
        "results.parquet",
        "summary.json",
        "batches.jsonl",
        "ledger.jsonl",
        "deltas/batch-00000.safetensors",
        "deltas/batch-00001.safetensors",
        "figures/summary.png",
    }


def test_run_json_says_how_to_make_it_again(
    done: SimpleNamespace, command: list[object], tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path
) -> None:
    record = read(done.directory, "run.json")
    config = record["config"]
    assert (config["editor"], config["plugins"], config["backend"]) == ("emmet", ["replay"], "raw")
    assert (config["model"], config["dataset"], config["corpus"]) == tuple(
        map(str, (tiny_folder, tiny_facts, tiny_corpus))
    )
    assert (config["batch_size"], config["seed"], config["corpus_tokens"]) == (BATCH, 3, 2000)
    # Settings are resolved: what was not given stands there with its default.
    assert record["settings"]["emmet"]["layers"] == [1]
    assert record["settings"]["emmet"]["v_num_grad_steps"] == 3
    assert record["settings"]["emmet"]["emmet_lambda"] == 0.0
    assert record["settings"]["replay"]["replay_rate"] == 0.5
    templates = record["provenance"]["context_templates"]
    assert len(templates) == 3
    assert templates[0] == "{}"
    assert all(template.count("{}") == 1 for template in templates)
    assert record["model"]["fingerprint"] == LanguageModel.load(str(tiny_folder)).fingerprint()
    assert record["model"]["layout"]["num_layers"] == 3
    assert record["statistics"]["corpus"].startswith("corpus.txt:")
    assert record["statistics"]["tokens"] == 2000
    for package in ("editcore", "edit-emmet", "edit-replay", "torch", "transformers"):
        assert record["versions"][package] == version(package)
    assert record["seed"] == 3
    assert record["command"].startswith("editctl run --editor emmet --plugin replay --model ")
    assert "--seed 3 --set 'layers=[1]' " in record["command"]


def test_requests_are_those_of_the_data(done: SimpleNamespace, tiny_facts: Path) -> None:
    found = lines(done.directory, "requests.jsonl")
    given = [json.loads(line) for line in tiny_facts.read_text().splitlines()]
    assert [record["request"]["id"] for record in found] == [str(record["case_id"]) for record in given]
    for record, source in zip(found, given, strict=True):
        assert record["request"]["target_new"] == source["requested_rewrite"]["target_new"]["str"]
        paraphrases = [probe["prompt"] for probe in record["probes"] if probe["kind"] == "paraphrase"]
        assert paraphrases == source["paraphrase_prompts"]


def test_results_have_a_row_per_observation(done: SimpleNamespace) -> None:
    frame = pd.read_parquet(done.directory / "results.parquet")
    assert list(frame) == [
        "phase", "request_id", "relation", "evaluator", "metric", "kind", "prompt", "value", "text",
    ]  # fmt: skip
    records = lines(done.directory, "requests.jsonl")
    prompts = {
        (record["request"]["id"], kind): [probe["prompt"] for probe in record["probes"] if probe["kind"] == kind]
        for record in records
        for kind in KINDS
    }
    for record in records:
        request = record["request"]
        prompts[request["id"], "rewrite"] = [request["prompt"].replace("{}", request["subject"])]
    assert {kind: len(found) for (_, kind), found in prompts.items()} == KINDS
    scored = frame[frame["evaluator"] == "counterfact"]
    expected = [
        (phase, str(case), kind, prompt, metric)
        for phase in ("before", "after")
        for case in range(EDITS)
        for kind in KINDS
        for prompt in prompts[str(case), kind]
        for metric in METRICS[kind]
    ]
    columns = ["phase", "request_id", "kind", "prompt", "metric"]
    assert list(scored[columns].itertuples(index=False, name=None)) == expected
    assert scored[scored["metric"].isin(["ES", "PS", "NS"])]["value"].isin([0.0, 1.0]).all()
    assert scored[scored["metric"].str.contains("_nll_")]["value"].gt(0).all()
    assert scored["text"].isna().all()
    assert dict(zip(frame["request_id"], frame["relation"], strict=True)) == {
        record["request"]["id"]: record["relation"] for record in records
    }


def test_what_the_model_said_is_in_the_results(done: SimpleNamespace) -> None:
    """Every fact is asked, because the sample is larger; elsewhere answers are held against those from before."""
    frame = pd.read_parquet(done.directory / "results.parquet")
    spoken = frame[frame["evaluator"] == "generation"]
    assert spoken["text"].notna().all()
    asked = {(phase, metric): list(rows["request_id"]) for (phase, metric), rows in spoken.groupby(["phase", "metric"])}
    every, names = [str(case) for case in range(EDITS)], ("facts_said", "paraphrases_said")
    for phase in ("before", "after"):
        for name in (*names, *(f"{name}_first" for name in names), "elsewhere_answered", "elsewhere_correct"):
            assert asked.pop((phase, name)) == every
        continued = asked.pop((phase, "distinct_bigrams"))
        assert 0 < len(continued) <= 3
        assert set(continued) <= set(every)
    assert asked == {("after", "unchanged"): every}
    texts = {
        phase: {row["prompt"]: row["text"] for row in rows[rows["kind"] != "generation"].to_dict(orient="records")}
        for phase, rows in spoken.groupby("phase")
    }
    model = LanguageModel.load(str(done.saved))
    for prompt, text in texts["after"].items():
        [said] = model.generate([prompt], max_new_tokens=10)
        assert said.startswith(text)
    for row in spoken[spoken["metric"] == "unchanged"].to_dict(orient="records"):
        same = texts["before"][row["prompt"]].strip() == row["text"].strip()
        assert (row["kind"], row["value"]) == ("neighborhood", float(same))


def test_the_summary_is_that_of_the_results(done: SimpleNamespace) -> None:
    summary = read(done.directory, "summary.json")
    frame = pd.read_parquet(done.directory / "results.parquet")
    assert {*(name for names in METRICS.values() for name in names), "score", "margin", "facts_said"} <= {
        metric["key"] for metric in summary["metrics"]
    }
    for phase in ("before", "after"):
        found, averages = summary[phase], summary["averages"][phase]
        for metric in summary["metrics"]:
            key, scale = metric["key"], 100 if metric["unit"] == "%" else 1
            rows = frame[(frame["phase"] == phase) & (frame["metric"] == key)]
            if not len(rows):  # a composite, or one without a question
                assert key not in averages
                assert (found[key] is None) == (not metric["of"])
                continue
            own = scale * rows.groupby("request_id")["value"].mean()
            assert found[key] == averages[key]["mean"] == pytest.approx(own.mean())
            assert averages[key]["std"] == pytest.approx(own.std(ddof=0), abs=1e-9)
            assert (averages[key]["facts"], averages[key]["prompts"]) == (len(own), len(rows))
        wanted = [found[name] for name in ("ES", "PS", "NS")]
        harmonic = 3 / sum(1 / value for value in wanted) if min(wanted) else 0.0
        assert found["score"] == pytest.approx(harmonic)
        assert found["margin"] == pytest.approx(sum(found[name] for name in ("EM", "PM", "NM")) / 3)
    after = frame[(frame["phase"] == "after") & (frame["metric"] == "facts_said")]
    [tally] = summary["tallies"]
    assert (tally["metric"], tally["held"], tally["asked"], tally["active"]) == (
        "facts_said", after["value"].sum(), EDITS, EDITS,
    )  # fmt: skip
    assert len(tally["missing"]) == EDITS - tally["held"]
    assert (summary["edits"], summary["rejected"]) == (EDITS, 0)
    [unsaid] = summary["notes"]  # a random model after three steps says none of them
    assert unsaid.startswith(f"{EDITS} of {EDITS} facts are not what the model says to the bare prompt")
    batches = lines(done.directory, "batches.jsonl")
    assert summary["seconds_per_edit"] == pytest.approx(sum(batch["seconds"] for batch in batches) / EDITS)
    assert {"model", "before", "targets", "keys", "solve", "other", "after"} == summary["seconds"].keys()
    assert 50e6 < summary["peak_memory_bytes"] < 64e9
    assert [sample["prompt"] for sample in summary["samples"]] == [
        "Marie Curie was born in",
        "The mother tongue of Isaac Newton is",
        "Ada Lovelace works as a",
    ]
    replay = summary["extensions"]["replay"]
    assert (replay["size"], replay["hits"]) == (EDITS, 1)  # one for the two new facts of the second batch


def test_batches_and_ledger_tell_the_same_story(done: SimpleNamespace) -> None:
    batches, entries = lines(done.directory, "batches.jsonl"), Ledger.read(done.directory).entries
    assert [(b["batch"], b["new"], b["replayed"], b["applied"]) for b in batches] == [(0, 4, 0, True), (1, 2, 1, True)]
    assert [(e.batch, e.num_new, len(e.requests)) for e in entries] == [(0, 4, 4), (1, 2, 3)]
    for batch, entry in zip(batches, entries, strict=True):
        assert [evidence["request_id"] for evidence in batch["evidence"]] == [r.id for r in entry.requests]
        assert batch["diagnostics"] == entry.diagnostics
        assert batch["verdicts"] == {}
    assert [evidence["replayed"] for evidence in batches[1]["evidence"]] == [False, False, True]


def test_the_picture_is_one(done: SimpleNamespace) -> None:
    with Image.open(done.directory / "figures" / "summary.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_the_command_prints_a_table(done: SimpleNamespace) -> None:
    table = [row.split() for row in done.out.splitlines()]
    summary = read(done.directory, "summary.json")
    spoken = ("facts_said", "paraphrases_said", "unchanged", "distinct_bigrams")  # no record has a consequence
    for names in (("ES", "PS", "NS", "score"), spoken):
        assert list(names) in table
        for phase in ("before", "after"):
            values = [summary[phase][name] for name in names]
            assert [phase, *("-" if value is None else f"{value:.1f}" for value in values)] in table
    assert "6 edits, by counterfact; percent, higher is better" in done.out
    assert "6 edits, by generation; percent, higher is better" in done.out
    assert f"{summary['tallies'][0]['held']} of 6 facts are said; not: " in done.out
    assert "s per edit; seconds by stage: " in done.out
    assert "Peak memory " in done.out
    assert f"Everything is in {done.directory}" in done.out
    assert "editing: 6/6" in done.err


def test_the_same_command_gives_the_same_bits(
    done: SimpleNamespace, editctl: Call, command: list[object], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    assert editctl(*command, "--out", again).code == 0
    for name in ("batch-00000.safetensors", "batch-00001.safetensors"):
        assert (again / "deltas" / name).read_bytes() == (done.directory / "deltas" / name).read_bytes()
    for name in ("ledger.jsonl", "requests.jsonl"):
        assert (again / name).read_bytes() == (done.directory / name).read_bytes()
    first, second = (pd.read_parquet(directory / "results.parquet") for directory in (done.directory, again))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    for phase in ("before", "after"):
        assert read(again, "summary.json")[phase] == read(done.directory, "summary.json")[phase]


def test_another_seed_gives_other_bits(
    done: SimpleNamespace, editctl: Call, command: list[object], tmp_path: Path
) -> None:
    other_run = tmp_path / "other"
    assert editctl(*command, "--seed", 4, "--out", other_run).code == 0
    name = "deltas/batch-00000.safetensors"
    assert (other_run / name).read_bytes() != (done.directory / name).read_bytes()


def test_the_saved_model_is_the_base_and_the_deltas(done: SimpleNamespace, tiny_folder: Path) -> None:
    saved, base = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (done.saved, tiny_folder))
    ids = AutoTokenizer.from_pretrained(done.saved)("Marie Curie was born in", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        unedited = base(ids).logits
        for entry in Ledger.read(done.directory).entries:
            for name, delta in entry.changes.items():
                base.get_parameter(name).add_(delta.dense())
        # Rounded once per batch here, once in all there.
        torch.testing.assert_close(saved(ids).logits, base(ids).logits, rtol=0, atol=1e-4)
        assert (saved(ids).logits - unedited).abs().max() > 1e-2


def test_generate_speaks_with_both_models(done: SimpleNamespace, editctl: Call, tiny_folder: Path) -> None:
    prompt = "Marie Curie was born in"
    said = editctl("generate", done.directory, prompt, "--tokens", 6)
    assert said.code == 0, said.err
    for kind, folder in (("original", tiny_folder), ("edited", done.saved)):
        [text] = LanguageModel.load(str(folder)).generate([prompt], max_new_tokens=6)
        assert f"{kind} {prompt}{text}".split() in [row.split() for row in said.out.splitlines()]


def test_raw_may_be_named_as_a_plugin(editctl: Call, command: list[object], tmp_path: Path) -> None:
    assert editctl(*command, "--plugin", "raw", "--edits", 1, "--out", tmp_path / "raw").code == 0
    config = read(tmp_path / "raw", "run.json")["config"]
    assert (config["backend"], config["plugins"]) == ("raw", ["replay"])


def test_a_fact_that_is_contradicted_later_is_left_out_and_said(
    editctl: Call, command: list[object], tiny_facts: Path, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in tiny_facts.read_text().splitlines()[:3]]
    later = json.loads(json.dumps(records[0]))
    later["case_id"], later["requested_rewrite"]["target_new"]["str"] = "later", "Madrid"
    path = tmp_path / "contradicting.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, later]), encoding="utf-8")
    result = editctl(*command, "--dataset", path, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    note = (
        "2 requests contradict each other about 'Marie Curie was born in' (subject 'Marie Curie'): "
        "'Paris' (0), 'Madrid' (later). The last is kept: 'Madrid'."
    )
    assert f"Note: {note}" in result.out
    summary = read(tmp_path / "run", "summary.json")
    assert (summary["edits"], summary["notes"][0]) == (3, note)
    assert [record["request"]["id"] for record in lines(tmp_path / "run", "requests.jsonl")] == ["1", "2", "later"]
