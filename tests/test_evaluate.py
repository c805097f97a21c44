"""``editctl evaluate``: every way to give a model is measured the same, and nothing is asked twice."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import editcore
import pandas as pd
import pytest
from editcore.evaluation import scoring
from editcore.models import generating, language_model
from editcore.models.answers import AnswerStore
from editcore.runs import RunRecord
from editcore.runs.evaluation_record import EvaluationRecord, HarnessScore

Run = Callable[..., SimpleNamespace]
SAMPLES = ("--set", "generation.further=none")


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path) -> Path:
    """A finished run of four facts, beside it the same edits as a pack, an adapter and a model."""
    from edit_lora.export import export_adapter
    from editcore import Plugins
    from editcore.runs import RunConfig, open_run, run, write_pack

    folder = tmp_path_factory.mktemp("edited")
    plugins = Plugins.load()
    config = RunConfig.create(
        {
            "editor": "emmet",
            "model": str(tiny_folder),
            "dataset": str(tiny_facts),
            "edits": 4,
            "batch_size": 2,
            "corpus": str(tiny_corpus),
            "corpus_tokens": 1024,
            "settings": {
                "emmet": {"layers": [1], "v_num_grad_steps": 8, "context_count": 1, "context_length": 3},
                "generation": {"further": None},
            },
        },
        plugins,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(folder / "cache"))
        run(config, folder / "run")
        write_pack(folder / "run", folder / "facts.editpack", plugins)
        export_adapter(folder / "run", folder / "adapter", plugins=plugins)
        open_run(folder / "run", plugins=plugins)[0].save(folder / "model")
    shutil.copytree(folder / "adapter", folder / "foreign", ignore=shutil.ignore_patterns("edits", "base.json", "*.md"))
    return folder


def summary_of(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return found["before"], found["after"]


def test_a_run_is_measured_as_it_measured_itself_and_the_second_time_asks_nothing(
    editctl: Run, edited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = editctl("evaluate", edited / "run", *SAMPLES, "--out", "first")
    assert done.code == 0, done.err
    assert "4 facts, by counterfact; percent, higher is better" in done.out
    record = EvaluationRecord.read("first")
    assert (record.before, record.after) == summary_of(edited / "run")
    assert record.kind == "run"
    assert record.method is not None
    assert record.method.edits == 4
    assert record.questions.asked > 0
    assert "questions asked" in done.out
    ours, theirs = (pd.read_parquet(folder / "results.parquet") for folder in (Path("first"), edited / "run"))
    pd.testing.assert_frame_equal(ours, theirs)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(scoring, "_score_pass", refused)
    monkeypatch.setattr(language_model, "continue_rows", refused)
    again = editctl("evaluate", edited / "run", *SAMPLES, "--out", "second", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["questions"] == {"asked": 0, "known": 0}
    pd.testing.assert_frame_equal(pd.read_parquet("second/results.parquet"), theirs)
    # Other samples of the same questions, by which no evaluator was asked as a whole.
    settings = (*SAMPLES, "--set", "generation.continuations=0")
    fewer = editctl("evaluate", edited / "run", *settings, "--edits", 2, "--out", "third")
    assert fewer.code == 0, fewer.err
    assert "Nothing was asked: all answers were known" in fewer.out


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("facts.editpack", ("--base", "{base}")),
        ("adapter", ("--dataset", "{facts}", "--edits", 4)),
        ("foreign", ("--dataset", "{facts}", "--edits", 4, "--base", "{base}")),
        ("model", ("--dataset", "{facts}", "--edits", 4, "--base", "{base}")),
    ],
)
def test_a_pack_an_adapter_and_a_folder_are_measured_like_the_run_they_are_from(
    name: str, more: tuple[object, ...], editctl: Run, edited: Path, tiny_folder: Path, tiny_facts: Path
) -> None:
    options = [str(option).format(facts=tiny_facts, base=tiny_folder) for option in more]
    done = editctl("evaluate", edited / name, *options, *SAMPLES, "--out", "out")
    assert done.code == 0, done.err
    before, after = summary_of(edited / "run")
    record = EvaluationRecord.read("out")
    if name == "facts.editpack":  # it has no probes
        shared = {"ES", "rewrite_acc", "facts_said"}
        before, after = ({key: values[key] for key in shared} for values in (before, after))
    for expected, found in ((before, record.before), (after, record.after)):
        assert {key: found[key] for key in expected} == pytest.approx(expected, nan_ok=True, abs=1e-4)
    assert record.before != record.after
    assert record.model.fingerprint == RunRecord.read(edited / "run").model.fingerprint  # the unedited one's
    assert record.kind == {"facts.editpack": "pack", "model": "model"}.get(name, "adapter")


def test_a_model_without_a_base_has_no_before(editctl: Run, edited: Path, tiny_facts: Path) -> None:
    done = editctl("evaluate", edited / "model", "--dataset", tiny_facts, "--edits", 4, *SAMPLES, "--out", "out")
    assert done.code == 0, done.err
    record = EvaluationRecord.read("out")
    assert set(record.before.values()) == {None}
    assert record.after["ES"] == summary_of(edited / "run")[1]["ES"]
    assert record.after["unchanged"] is None
    assert "the model" in done.out
    assert "before" not in done.out.split("Note")[0]


def test_what_was_asked_before_a_kill_is_kept(
    editctl: Run, edited: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passes: list[int] = []
    score_pass = scoring._score_pass

    def killed(*arguments: Any) -> Any:
        passes.append(1)
        if len(passes) > 1:
            raise KeyboardInterrupt
        return score_pass(*arguments)

    monkeypatch.setattr(scoring, "plan_passes", lambda lengths, *_, **__: [[row] for row in range(len(lengths))])
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_score_pass", killed)
        interrupted = editctl("evaluate", edited / "run", *SAMPLES, "--out", "out")
    assert interrupted.code == 130
    assert "the same command goes on from there" in interrupted.err
    assert not Path("out").exists()
    asked = editctl("evaluate", edited / "run", *SAMPLES, "--out", "out", "--json")
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "empty"))
    anew = editctl("evaluate", edited / "run", *SAMPLES, "--out", "anew", "--json")
    counts, all_counts = (json.loads(done.out)["questions"] for done in (asked, anew))
    assert counts["known"] > 0
    assert counts["asked"] + counts["known"] == all_counts["asked"]
    fresh = editctl("evaluate", edited / "run", *SAMPLES, "--out", "fresh", "--fresh", "--json")
    assert json.loads(fresh.out)["questions"] == {"asked": 0, "known": 0}  # nothing is counted where nothing is kept
    pd.testing.assert_frame_equal(pd.read_parquet("out/results.parquet"), pd.read_parquet("fresh/results.parquet"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere", "--dataset", "worldfacts"), "There is no model 'nowhere'"),
        (("{model}",), "does not say which facts it was taught; give --dataset NAME or FILE"),
        (("{run}", "--edits", 5), "has 4 active facts"),
        (("{run}", "--dataset", "worldfacts", "--edits", 999), "--edits 999 is more than the data set 'worldfacts'"),
        (("{run}", "--base", "{model}"), "--base: the run directory"),
        (("{pack}",), "facts.editpack is for 'tiny'. There is no model 'tiny'"),
        (("{run}", "--evaluator", "none"), "Unknown evaluator 'none'"),
        (("{run}", "--set", "sample=3"), "say whose setting it is"),
        (("{run}", "--set", "generation.smaple=3"), "generation: unknown setting 'smaple'"),
        (("{run}", "--set", "damage.tokens=3"), "Unknown settings section 'damage'"),
        (("{run}", "--text", "missing.txt"), "missing.txt"),
        (("{run}", "--lm-eval-limit", 3), "--lm-eval-limit is for --lm-eval TASKS"),
        (("{run}", "--lm-eval", "./missing"), "--lm-eval: there is no folder ./missing"),
        (("{run}", "--lm-eval", " , "), "--lm-eval needs the names of tasks"),
        (("{run}", "--out", "{run}"), "is already there"),
        (("{model}", "--dataset", "worldfacts", "--force"), "--force is for a pack or an adapter"),
        (("{model}/config.json", "--dataset", "worldfacts"), "is not an edit pack"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(
    arguments: tuple[object, ...], said: str, editctl: Run, edited: Path
) -> None:
    given = [
        str(argument).format(model=edited / "model", run=edited / "run", pack=edited / "facts.editpack")
        for argument in arguments
    ]
    done = editctl("evaluate", *given)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not Path("runs").exists()


def test_an_adapter_of_another_base_needs_force(editctl: Run, edited: Path, tmp_path: Path, tiny_facts: Path) -> None:
    from editcore.testing import tiny_model

    tiny_model(seed=5).save(tmp_path / "other")
    given = ("evaluate", edited / "adapter", "--base", tmp_path / "other", "--dataset", tiny_facts, "--edits", 1)
    assert "was made for" in editctl(*given).err
    assert editctl(*given, "--force", "--evaluator", "counterfact", "--out", "out").code == 0


def test_a_base_with_another_tokenizer_is_refused(
    editctl: Run, edited: Path, tiny_folder: Path, tmp_path: Path, tiny_facts: Path
) -> None:
    other_base = tmp_path / "other"
    shutil.copytree(tiny_folder, other_base)
    tokenizer = json.loads((other_base / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 600, "content": "<more>"})
    (other_base / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    done = editctl("evaluate", edited / "model", "--base", other_base, "--dataset", tiny_facts, "--out", "out")
    assert done.code == 2
    assert "is not what" in done.err
    assert "their tokenizers have other tokens" in done.err


def test_an_adapter_that_names_no_base_needs_one(editctl: Run, edited: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nameless"
    shutil.copytree(edited / "foreign", folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "does not say which model it is for; name it with --base" in editctl("evaluate", folder).err


def test_the_perplexity_of_a_text(editctl: Run, edited: Path, tiny_corpus: Path) -> None:
    given = ("evaluate", edited / "run", "--evaluator", "counterfact", "--text", tiny_corpus, "--text-tokens", 256)
    assert editctl(*given, "--out", "out").code == 0
    found = EvaluationRecord.read("out").perplexity
    assert found is not None
    ids = list(_ids(tiny_corpus, edited))[: found.text.tokens]
    model, _ = editcore.runs.open_run(edited / "run")
    expected = editcore.evaluation.perplexity(model.model, ids, window=found.text.window)
    assert found.after == pytest.approx(expected, rel=1e-6)
    model.rebuild([])
    before = editcore.evaluation.perplexity(model.model, ids, window=found.text.window)
    assert found.ratio == pytest.approx(expected / before, rel=1e-6) != 1.0


def test_another_state_is_asked_anew(editctl: Run, edited: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(edited / "run", copy)
    given = ("evaluate", copy, "--evaluator", "counterfact")
    all_facts = ("--dataset", copy / "requests.jsonl")
    first = json.loads(editctl(*given, *all_facts, "--out", "first", "--json").out)
    assert editctl("ledger", copy, "undo", "--batch", 1).code == 0
    done = editctl(*given, "--out", "undone", "--json")
    assert json.loads(done.out)["dataset"]["records"] == 2  # its own facts are the active ones
    undone = json.loads(editctl(*given, *all_facts, "--out", "all", "--json").out)
    assert undone["state"] != first["state"]
    assert undone["questions"]["asked"] > 0
    assert undone["before"] == first["before"]
    fresh = json.loads(editctl(*given, *all_facts, "--out", "fresh", "--fresh", "--json").out)
    assert undone["after"] == pytest.approx(fresh["after"], rel=1e-4) != first["after"]


def _ids(text: Path, edited: Path) -> tuple[int, ...]:
    model, _ = editcore.runs.open_run(edited / "run")
    return model.model.read_text(text.read_text(encoding="utf-8"))


# Answers that are kept


@pytest.mark.parametrize("limit", [1, 3, 6])
@pytest.mark.parametrize("wanted", [None, 2, 5])
def test_a_kept_text_ends_where_it_would_have_been_written_to(tmp_path: Path, limit: int, wanted: int | None) -> None:
    model = editcore.testing.tiny_model()
    prompts = ["The capital of France is", "My name is", "It is"]
    enough = None if wanted is None else (lambda index, text: len(text.split()) >= wanted + index)
    asked = {"max_new_tokens": [limit, limit + 1, limit + 2], "enough": enough}
    plain = model.generate(prompts, **asked)
    for first in (1, 4, 12):  # what an earlier question has kept
        store = AnswerStore(tmp_path / f"{first}.sqlite")
        with model.remembering(store):
            model.generate(prompts, max_new_tokens=first)
            assert model.generate(prompts, **asked) == plain
            before = store.asked
            assert model.generate(prompts, **asked) == plain
            assert store.asked == before
    assert model.answers is None


def test_a_text_that_ended_is_known_to_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = editcore.testing.tiny_model()
    row = list(model.read_prompt("It is")[0])
    third = model.generate_ids([row], max_new_tokens=4, stop_at_end=False)[0][2]
    monkeypatch.setattr(type(model), "end_ids", frozenset({third}))
    store = AnswerStore(tmp_path / "answers.sqlite")
    with model.remembering(store):
        text = model.generate_ids([row], max_new_tokens=9)
        monkeypatch.setattr(language_model, "continue_rows", None)
        assert model.generate_ids([row], max_new_tokens=200) == text
        assert len(model.generate_ids([row], max_new_tokens=1)[0]) == min(1, len(text[0]))
    assert (store.asked, store.found) == (1, 2)
    assert generating.StopRule(limits=[2], at_end_token=True, enough=None).is_complete(0, [1, 2])


def test_a_damaged_file_of_answers_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_text("this is no database " * 100, encoding="utf-8")
    with pytest.raises(editcore.StorageError, match=r"answers\.sqlite cannot be read or written .*Remove the file"):
        AnswerStore(path)


# Comparing results


@pytest.fixture(scope="module")
def unedited(edited: Path, tiny_folder: Path, tiny_facts: Path) -> Path:
    """An evaluation of the unedited model on six facts, four of which the run edits."""
    from editcore import Plugins
    from editcore.datasets import load_records
    from editcore.runs.evaluating import EvaluationPlan, evaluate
    from editcore.runs.targets import TargetOptions, find_target

    plugins = Plugins.load()
    records = load_records(tiny_facts, plugins=plugins, notes=[])
    plan = EvaluationPlan(
        dataset=str(tiny_facts), evaluators=("counterfact",), settings={"generation": {"further": None}}, fresh=True
    )
    target = find_target(str(tiny_folder), TargetOptions(), plugins)
    evaluate(target, records, plan=plan, out=edited / "unedited", plugins=plugins)
    return edited / "unedited"


def test_two_results_are_compared_on_the_facts_that_both_measured(editctl: Run, edited: Path, unedited: Path) -> None:
    before, after = summary_of(edited / "run")
    done = editctl("compare-results", unedited, edited / "run", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["facts"], found["shared"]) == ([6, 4], 4)
    rows = {row["metric"]: row for row in found["differences"]}
    assert {"ES", "PS", "NS", "score", "rewrite_nll_new"} <= rows.keys()
    assert "facts_said" not in rows
    for key in ("ES", "PS", "NS", "score", "rewrite_nll_new"):
        assert rows[key]["first"] == pytest.approx(before[key], abs=1e-4)
        assert rows[key]["second"] == pytest.approx(after[key], abs=1e-4)
        assert rows[key]["units"] == 4
    assert [note for note in found["notes"] if "The facts are not all the same: 6 facts of" in note]
    table = editctl("compare-results", unedited, edited / "run")
    assert "B: " in table.out
    assert "4 are in both" in table.out
    assert "rewrite_nll_new" not in table.out
    assert "rewrite_nll_new" in editctl("compare-results", unedited, edited / "run", "--all").out


def test_facts_that_changed_sides_are_named(editctl: Run, edited: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(edited / "run", copy)
    table = pd.read_parquet(copy / "results.parquet")
    rows = table[(table.phase == "after") & (table.metric == "facts_said")].index
    table.loc[rows[:3], "value"] = 1 - table.loc[rows[:3], "value"]
    table.to_parquet(copy / "results.parquet", index=False)

    def changed(first: Path, second: Path) -> dict[str, Any]:
        found = json.loads(editctl("compare-results", first, second, "--json").out)["changed"]
        return next(change for change in found if change["metric"] == "facts_said")

    there, back = changed(edited / "run", copy), changed(copy, edited / "run")
    ids = set(table.loc[rows[:3], "request_id"])
    assert {fact["id"] for side in ("only_first", "only_second") for fact in there[side]} == ids
    assert (there["only_first"], there["only_second"]) == (back["only_second"], back["only_first"])
    named = [*there["only_first"], *there["only_second"]]
    shown = editctl("compare-results", edited / "run", copy).out
    assert "by facts_said: " in shown
    assert all(fact["prompt"] in shown for fact in named)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("other", "no fact is in both, so they cannot be compared"),
        ("empty", "is neither a run directory (run.json) nor a folder of 'editctl evaluate' (evaluation.json)"),
        ("unfinished", "has no results yet (summary.json is not there)"),
        ("apart", "and no question that both asked: "),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    second: str, said: str, editctl: Run, edited: Path, unedited: Path, tmp_path: Path
) -> None:
    folder = tmp_path / second
    match second:
        case "other":
            assert (
                editctl("evaluate", edited / "model", "--dataset", "worldfacts", "--edits", 2, "--out", folder).code
                == 0
            )
        case "empty":
            folder.mkdir()
        case "unfinished":
            shutil.copytree(edited / "run", folder)
            (folder / "summary.json").unlink()
        case "apart":
            given = ("evaluate", edited / "run", "--evaluator", "teacher-forced", "--out", folder)
            assert editctl(*given).code == 0
    done = editctl("compare-results", unedited, folder)
    assert done.code == 2
    assert said in done.err


# Reports


def rows_of(report: str) -> list[list[str]]:
    """The rows of the checklist in a report's Markdown."""
    part = report.split("## Checklist")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_checklist_of_a_run_has_every_item_and_says_what_measures_the_rest(editctl: Run, edited: Path) -> None:
    assert editctl("report", edited / "run", "--out", "page").code == 0
    text, page = (Path("page", name).read_text(encoding="utf-8") for name in ("report.md", "index.html"))
    rows = rows_of(text)
    found = json.loads((edited / "run" / "summary.json").read_text(encoding="utf-8"))
    by_item: dict[str, list[list[str]]] = {}
    for row in rows:
        by_item.setdefault(row[0], []).append(row[1:])
    assert list(by_item) == [
        "Model", "Method", "Edits", "Success, teacher-forced", "Success, generated", "Success on rephrased prompts",
        "Locality: unchanged", "Locality: correct", "Capability", "Facts written first", "Perplexity ratio",
        "Time per edit", "Peak memory", "Baselines",
    ]  # fmt: skip
    fingerprint = json.loads((edited / "run" / "run.json").read_text(encoding="utf-8"))["model"]["fingerprint"]
    assert f"weights {fingerprint[:12]}" in by_item["Model"][0][2]
    assert by_item["Edits"][0][2:] == ["4 facts", "2 at a time"]
    (es, accuracy) = by_item["Success, teacher-forced"]
    assert es[0] == "Efficacy (ES)"
    assert es[2].startswith(f"{found['after']['ES']:.1f} % (")
    assert es[3] == "4 facts"
    assert accuracy[2].startswith(f"{found['after']['rewrite_acc']:.1f} % (")
    assert by_item["Capability"] == [
        ["", "", "not measured", "'editctl evaluate' with --evaluator capability or --lm-eval TASKS"]
    ]
    assert by_item["Perplexity ratio"][0][2] == "not measured"
    assert "--eval-every" in by_item["Perplexity ratio"][0][3]
    assert by_item["Time per edit"][0][2] == f"{found['seconds_per_edit']:.2f} s"
    assert by_item["Facts written first"][0][2] == "not measured"
    assert "editctl compare" in by_item["Baselines"][0][3]
    assert "Checklist" in page
    assert "--evaluator capability" in page


def test_an_evaluation_has_a_page_with_its_checklist(editctl: Run, edited: Path, tiny_corpus: Path) -> None:
    evaluators = [part for name in ("counterfact", "capability", "damage") for part in ("--evaluator", name)]
    settings = ("--set", "capability.sample=12", "--set", "capability.answer_tokens=2", "--set", "damage.prompts=3")
    text = ("--text", tiny_corpus, "--text-tokens", 256)
    done = editctl("evaluate", edited / "run", *evaluators, *settings, *text, "--out", "out")
    assert done.code == 0, done.err
    assert "The model as a whole, by damage; " in done.out
    assert "capability could not compute capability_kept" in done.out  # the tiny model solves no task
    assert editctl("report", "out").code == 0
    report = Path("out/report/report.md").read_text(encoding="utf-8")
    record = EvaluationRecord.read("out")
    rows = rows_of(report)
    assert ["Tasks solved", "12 questions"] in [[row[1], row[4]] for row in rows if row[0] == "Capability"]
    (ratio,) = [row for row in rows if row[0] == "Perplexity ratio"]
    assert record.perplexity is not None
    assert ratio[3] == f"{record.perplexity.ratio:.4f}"
    (generated,) = [row for row in rows if row[0] == "Success, generated"]
    assert "--evaluator generation" in generated[4]
    assert "Metrics of the evaluator damage: the model as a whole." in report
    page = Path("out/report/index.html").read_text(encoding="utf-8")
    facts = page.split('id="facts"')[1].split("<section")[0] if 'id="facts"' in page else page.split(">Facts<")[-1]
    assert "Efficacy (ES)" in facts
    assert "Drift (KL)" not in facts


def test_what_is_about_the_model_is_compared_whichever_facts_are_measured(tmp_path: Path) -> None:
    from editcore import EditSession, SessionConfig
    from editcore.testing import tiny_model, tiny_records

    records = tiny_records(4)
    config = SessionConfig(
        editor="emmet", evaluators=["damage"], settings={"emmet": {"layers": [1]}, "damage": {"prompts": 3}}
    )
    session = EditSession.open(tiny_model(), config, records=records)
    before = session.evaluate_unedited(records)
    found = session.evaluate(records[2:])  # the first fact, under which the observations are, is not among them
    assert found.summary.value("next_token_kl") == pytest.approx(0.0, abs=1e-9)
    assert found.summary.value("largest_norm_growth") == pytest.approx(0.0, abs=1e-9)
    part = before.of_facts([record.request.id for record in records[2:]])
    assert len(part.observations["damage"]) == len(before.observations["damage"])


# lm-eval


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of lm-eval: six questions with two choices."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = ("Rome", "Paris", "London", "Berlin", "Vienna", "Madrid")
    lines = [{"question": f"It is in {word}", "choices": [word, "chess"], "answer": 1} for word in words]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "toy.yaml").write_text(
        f"""
task: toy_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
        encoding="utf-8",
    )
    return folder


def test_tasks_of_lm_eval_are_scored_as_their_choices_are(
    editctl: Run, edited: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'editcore[lm-eval]')")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    given = ("evaluate", edited / "run", "--evaluator", "counterfact", "--lm-eval", tasks, "--lm-eval-limit", 4)
    done = editctl(*given, "--out", "out")
    assert done.code == 0, done.err
    record = EvaluationRecord.read("out")
    lines = [json.loads(line) for line in (tasks / "data.jsonl").read_text(encoding="utf-8").splitlines()][:4]
    prompts = [line["question"] for line in lines for _ in range(2)]
    choices = [choice for line in lines for choice in line["choices"]]
    opened, _ = editcore.runs.open_run(edited / "run")
    for found in (record.harness, record.harness_before):
        (score,) = [score for score in found if score.metric == "acc,none"]
        sums = [
            scored.nll * scored.num_tokens
            for scored in editcore.evaluation.score_targets(opened.model, prompts, choices)
        ]
        expected = sum(sums[1::2][place] < sums[::2][place] for place in range(4)) / 4
        assert (score.task, score.questions, score.value) == ("toy_choices", 4, expected)
        opened.rebuild([])  # the second time, the unedited model
    assert "The model as a whole, by lm-eval" in done.out
    monkeypatch.setattr("lm_eval.simple_evaluate", None)
    again = editctl(*given, "--out", "again")
    assert again.code == 0, again.err
    assert EvaluationRecord.read("again").harness == record.harness
    assert editctl("report", "out").code == 0
    rows = rows_of(Path("out/report/report.md").read_text(encoding="utf-8"))
    assert r"lm-eval toy\_choices, acc,none" in [row[1] for row in rows if row[0] == "Capability"]
    unknown = editctl("evaluate", edited / "run", "--lm-eval", "no_such_task", "--out", "unknown")
    assert unknown.code == 2
    assert "lm-eval failed: " in unknown.err


def test_intervals_of_lm_eval_have_a_width_at_every_value() -> None:
    def interval(value: float, stderr: float, questions: int = 4) -> tuple[float, float] | None:
        return HarnessScore(task="t", metric="m", value=value, stderr=stderr, questions=questions).interval

    assert interval(1.0, 0.0) == pytest.approx((4 / (4 + 1.959964**2), 1.0))  # Wilson's, for 4 of 4
    assert interval(20.0, 2.0, 100) == pytest.approx((20 - 3.919928, 20 + 3.919928))
    assert interval(0.5, math.nan) is None
    assert interval(1.0, 0.0, 1) is None


def test_without_lm_eval_a_sentence_says_what_to_install(
    editctl: Run, edited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = editctl("evaluate", edited / "run", "--lm-eval", "hellaswag")
    assert done.code == 2
    assert "which is not installed. Install with: pip install 'editcore[lm-eval]'" in done.err
