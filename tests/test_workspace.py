"""A directory that is edited day after day: begun, added to, corrected, checked, and taken back from."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import editcore
import pytest
from editcore import EditRequest, FactRecord, Plugins, Probe, RequestError, RunError, Signature
from editcore.interfaces.errors import StatisticsError
from editcore.ledger.finding import edits_since
from editcore.ledger.ledger import Ledger, write_ledger
from editcore.onboarding.onboard import tunable_editors
from editcore.runs.begin import begin
from editcore.runs.check_record import Answers, CheckLimits, CheckRecord, LostFact
from editcore.runs.config import RunConfig
from editcore.runs.planned_edit import plan_edit
from editcore.runs.record import RunRecord
from editcore.runs.resolved import default_editor
from editcore.runs.workspace import signed
from editcore.settings.presets import preset_for
from editcore.testing import tiny_requests

FACTS = tiny_requests(6)
Run = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_corpus: Path) -> Any:
    """A directory without an edit, and its cache."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(folder / "cache"))
        config = RunConfig.create(
            {
                "editor": "emmet",
                "plugins": ["replay"],
                "model": str(tiny_folder),
                "dataset": "facts",
                "batch_size": 2,
                "corpus": str(tiny_corpus),
                "corpus_tokens": 1024,
                "settings": {
                    "emmet": {"layers": [1], "v_num_grad_steps": 8, "context_count": 1, "context_length": 3},
                    "replay": {"replay_rate": 1.0},
                },
            },
            Plugins.load(),
        )
        begin(config, folder / "facts")
        yield folder / "facts"


@pytest.fixture
def directory(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the directory, with the cache that it was begun with."""
    monkeypatch.setenv("EDITCORE_CACHE", str(begun.parent / "cache"))
    return Path(shutil.copytree(begun, tmp_path / "facts"))


@pytest.fixture
def called(directory: Path, editctl: Run, begun: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``editctl`` with the cache of the directory."""
    monkeypatch.setenv("EDITCORE_CACHE", str(begun.parent / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return editctl


def words(fact: EditRequest, target: str | None = None) -> list[str]:
    return ["--subject", fact.subject, "--prompt", fact.prompt, "--target", target or fact.target_new]


# In Python


def test_facts_come_day_after_day_and_a_session_sees_all_of_them(directory: Path) -> None:
    for number, fact in enumerate(FACTS[:3]):
        with editcore.workspace(directory) as ws:
            (result,) = ws.edit([fact], note=f"day {number}", author="Ada")
            edited = ws.session.model.fingerprint()
        assert (result.batch.index, result.batch.num_new) == (number, 1)
        assert ws.ledger.batch(number).signature == Signature(
            author="Ada", time=ws.ledger.batch(number).signature.time, note=f"day {number}"
        )
    ledger = Ledger.read(directory)
    assert [request.text for request in ledger.facts()] == [fact.text for fact in FACTS[:3]]
    third = ledger.batches[2]  # replay knows what earlier processes wrote
    assert {FACTS[0].id, FACTS[1].id} <= {*third.known, *(key.request_id for key in third.held)}
    with editcore.workspace(directory) as ws:
        model = ws.session.model
        assert model.fingerprint() == edited
    assert model.fingerprint() == model.base_fingerprint  # the block gives the base bits back


def test_what_the_editor_learnt_from_the_model_is_not_learnt_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(*_: object, **__: object) -> None:
        raise AssertionError("contexts were sampled again")

    monkeypatch.setattr("editcore.locate_then_edit.preparation.sample_context_templates", sampled)
    with editcore.workspace(directory) as ws:
        learnt = ws.record.provenance["context_templates"]
        assert ws.session.provenance["context_templates"] == learnt
        assert len(learnt) == 2
    # With another seed they are others, and are sampled.
    path = directory / "run.json"
    record = json.loads(path.read_text())
    record["config"]["seed"] = 5
    path.write_text(json.dumps(record))
    with editcore.workspace(directory) as ws, pytest.raises(AssertionError, match="sampled again"):
        _ = ws.session


def test_a_large_request_is_cut_into_batches_of_the_directory(directory: Path) -> None:
    with editcore.workspace(directory) as ws:
        results = ws.edit(FACTS[:5])
    assert [result.batch.num_new for result in results] == [2, 2, 1]
    assert [line["new"] for line in map(json.loads, (directory / "batches.jsonl").read_text().splitlines())] == [
        2,
        2,
        1,
    ]


def test_probes_are_kept_with_the_facts_they_belong_to(directory: Path) -> None:
    probe = Probe(kind="paraphrase", prompt="So it is.")
    with editcore.workspace(directory) as ws:
        ws.edit([FactRecord(request=FACTS[0], probes=(probe,)), FACTS[1]])
        first, second = ws.active_records()
    assert first.probes == (probe,)
    assert not second.probes
    # What was never written (a kill came between) is dropped when the next facts come.
    stray = FactRecord(request=FACTS[5].model_copy(update={"id": "stray"}), probes=(probe,))
    with (directory / "added.jsonl").open("a") as file:
        file.write(stray.model_dump_json() + "\n")
    with editcore.workspace(directory) as ws:
        ws.edit([FactRecord(request=FACTS[2], probes=(probe,))])
    assert [json.loads(line)["request"]["id"] for line in (directory / "added.jsonl").read_text().splitlines()] == [
        FACTS[0].id,
        FACTS[2].id,
    ]


def test_undo_loads_no_model_where_none_is_needed_and_is_signed(directory: Path) -> None:
    with editcore.workspace(directory) as ws:
        ws.edit([FACTS[0]])
        ws.edit(FACTS[1:3])
    with editcore.workspace(directory) as ws:
        (undone,) = ws.change("undo", [(0, FACTS[0].id)], signed("wrong", "Ada"))
        assert ws._session is None
        assert undone.text == FACTS[0].text
    assert Ledger.read(directory).events[-1].signature.note == "wrong"
    with editcore.workspace(directory) as ws:
        ws.undo(subjects=[FACTS[1].subject])  # the rest of its batch is solved again
        assert [request.id for request in ws.ledger.facts()] == [FACTS[2].id]
        assert ws.check().facts == 1
        ws.redo(FACTS[0].id)
        with_session = ws.session.model.fingerprint()
    with editcore.workspace(directory) as ws:
        assert ws.session.model.fingerprint() == with_session


def test_a_workspace_is_for_one_process_and_for_finished_runs(directory: Path) -> None:
    held = pytest.raises(RunError, match=f"in use by process {os.getpid()}")
    with editcore.workspace(directory), held, editcore.workspace(directory):
        raise AssertionError
    with pytest.raises(RunError, match="is not a run directory"), editcore.workspace(directory / "nothing"):
        raise AssertionError


# The plan


def test_a_plan_names_what_it_corrects_joins_and_leaves(directory: Path) -> None:
    lived = EditRequest(subject=FACTS[0].subject.upper(), prompt="{} lived in", target_new="Rome")
    with editcore.workspace(directory) as ws:
        ws.edit(FACTS[:2])
        corrected = FACTS[0].model_copy(update={"target_new": "Oslo"})
        planned = ws.plan([FACTS[1], corrected, lived])
    (correction,) = planned.corrections
    assert [request.target_new for request in correction] == [FACTS[0].target_new, "Oslo"]
    assert planned.active_already == (ws.ledger.facts()[1],)
    assert [record.request.target_new for record in planned.records] == ["Oslo", "Rome"]
    assert planned.records[0].request.id == f"{FACTS[0].id}-2"  # ids in a ledger are unique
    # The fact about the same subject is the corrected one, so nothing else is told of it.
    assert planned.same_subject == ()
    (found,) = plan_edit(ws.ledger, [FactRecord(request=lived)]).same_subject
    assert [request.text for request in found[1]] == [FACTS[0].text]
    assert [r.request.id for r in plan_edit(ws.ledger, [FactRecord(request=FACTS[1])], again=True).records] == [
        f"{FACTS[1].id}-2"
    ]


def test_contradicting_facts_are_refused_before_anything_is_written(directory: Path) -> None:
    contradiction = FACTS[0].model_copy(update={"id": "other", "target_new": "Oslo"})
    with editcore.workspace(directory) as ws:
        with pytest.raises(
            RequestError, match=f"of one call contradict each other: .* → '{FACTS[0].target_new}' and → 'Oslo'"
        ):
            ws.edit([*FACTS[1:4], FACTS[0], contradiction])
        with pytest.raises(RequestError, match="A request is twice in one call"):
            ws.edit([FACTS[0], FACTS[0]])
        assert not ws.ledger.batches


# At the terminal


def test_a_directory_from_beginning_to_end_at_the_terminal(
    called: Run, tmp_path: Path, tiny_folder: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "here" / "mine"
    made = called(
        "init", place, "--model", tiny_folder, "--editor", "emmet", "--corpus", tiny_corpus, "--corpus-tokens", 1024,
        "--set", "layers=[1]", "--set", "v_num_grad_steps=8", "--set", "context_count=0",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert made.out == f"{place} takes edits of {tiny_folder} by emmet: editctl edit {place} --help\n"
    assert RunRecord.read(place).dataset is None
    assert called("init", place, "--editor", "emmet").code == 2  # it is there already
    empty = called("status", place)
    assert "0 active, in 0 batches; 0 undone, 0 rejected" in empty.out
    assert "never; 'editctl check" in empty.out

    for wrong, says in (
        (["run", "--resume", "--out"], "no run in {} to resume"),
        (["report"], "no run in {} to report"),
    ):
        refused = called(*wrong, place)
        assert (refused.code, says.format(place) in refused.err) == (2, True), refused.err

    dry = called("edit", place, *words(FACTS[0]), "--dry-run")
    assert dry.out == (f"emmet would write 1 fact into {tiny_folder}, 10 at a time. Nothing was loaded or written.\n")
    assert not Ledger.read(place).batches
    done = called("edit", place, *words(FACTS[0]), "--note", "asked by\nlegal", "--author", "Ada")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"Active facts: 1. 'editctl check {place}' asks all of them again."
    same = called("edit", place, *words(FACTS[0]))
    assert same.out == "1 fact is active already and is not written again (--again writes it).\n"

    rows = [f"{fact.subject}\t{fact.prompt}\t{fact.target_new}" for fact in FACTS[1:4]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join([*rows, "half a row"]).encode())))
    pasted = called("edit", place, "--facts", "-")
    assert pasted.code == 0
    assert "Note: standard input: 1 record cannot be used and is left out. Line 4: It has 1 cell;" in pasted.out
    table = tmp_path / "facts.tsv"
    table.write_text("\n".join(rows))
    corrected = called("edit", place, *words(FACTS[1], "Oslo"))
    assert corrected.out.startswith("Corrections of active facts\n"), corrected.out
    assert FACTS[1].target_new in corrected.out.splitlines()[2]

    told = called("status", place)
    assert "4 active, in 3 batches; 0 undone, 0 rejected" in told.out
    assert "% of the weight's norm" in told.out
    log = called("log", place, "--json")
    events = json.loads(log.out)
    assert [(event["what"], len(event["edits"])) for event in events] == [("wrote", 1), ("wrote", 3), ("wrote", 1)]
    assert (events[0]["author"], events[0]["note"]) == ("Ada", "asked by legal")

    dry = called("ledger", place, "undo", "--subject", FACTS[1].subject.lower(), "--dry-run")
    assert dry.out.splitlines()[-1] == "Batches that would be solved again: 1. Nothing was changed."
    assert len(Ledger.read(place).facts()) == 4
    gone = called("ledger", place, "undo", "--subject", FACTS[1].subject.lower(), "--note", "mistaken")
    assert gone.code == 0, gone.err
    assert gone.out.splitlines()[-1] == "Active facts: 3."
    assert called("ledger", place, "undo", "--file", table).code == 0
    assert [request.text for request in Ledger.read(place).facts()] == [FACTS[0].text]
    assert "not measured since the last change" in called("status", place).out
    assert called("ledger", place, "redo", "--since", "2020-01-01T00:00").code == 0
    assert len(Ledger.read(place).facts()) == 4
    last = called("log", place).out.splitlines()
    assert [line.split()[3] for line in last[1:]] == ["wrote", "wrote", "wrote", "undid", "undid", "redid"]
    assert last[4].rstrip().endswith("mistaken")


def test_what_only_reads_needs_no_torch(directory: Path) -> None:
    with editcore.workspace(directory) as ws:
        ws.edit(FACTS[:1])
    fact = FACTS[1]
    calls = [
        ["status", str(directory)],
        ["log", str(directory)],
        ["edit", str(directory), *words(fact), "--dry-run"],
        ["ledger", str(directory), "undo", "--batch", "0", "--dry-run"],
        ["ledger", str(directory), "undo", "--batch", "0"],
    ]
    code = (
        "import json, sys\n"
        "class Refused:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name != 'torch', 'torch is imported'\n"
        "sys.meta_path.insert(0, Refused())\n"
        "from editcore.cli import main\n"
        "for call in json.load(sys.stdin):\n"
        "    sys.argv = ['editctl', *call]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as left:\n"
        "        print('code', left.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(calls), capture_output=True, text=True)
    assert done.stderr == ""
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes in (["code 0"] * 5, ["code None"] * 5), done.stdout
    assert not Ledger.read(directory).facts()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--editor", "rome"], "--editor: {} has its own model and settings, and keeps what is written. Leave it out."),
        (["--save", "x", "--seed", "1"], "--seed, --save: {} has its own model and settings"),
        (["--facts", "x.jsonl", "--subject", "Rome"], "--facts FILE and a fact on the command line were both given"),
        (["--subject", "Rome", "--prompt", "{{}} is"], "--target is missing. A fact has --prompt and --target"),
        (["--facts", "none.jsonl"], "none.jsonl"),
    ],
)
def test_wrong_calls_of_edit_are_refused_in_a_sentence(
    called: Run, directory: Path, arguments: list[str], says: str
) -> None:
    found = called("edit", directory, *arguments)
    assert (found.code, found.out) == (2, "")
    assert says.format(directory) in found.err
    assert len(found.err.splitlines()) == 1
    assert not Ledger.read(directory).batches


def test_what_needs_a_directory_says_so(called: Run) -> None:
    found = called("edit", *words(FACTS[0]), "--note", "x", "--dry-run")
    assert (found.code, found.out) == (2, "")
    assert found.err == "Error: --note, --dry-run: this is for a directory. 'editctl init DIR' makes one.\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--subject", "Nobody"], "No edit is about 'Nobody'."),
        (["--since", "2999-01-01"], "No edit was written since 2999-01-01T00:00:00+00:00."),
        (["--since", "yesterday"], "'yesterday' is no date and no time; write 2026-03-31"),
        ([], "There is nothing to undo: no edit was named."),
    ],
)
def test_undo_of_what_is_not_there_is_refused(called: Run, directory: Path, arguments: list[str], says: str) -> None:
    with editcore.workspace(directory) as ws:
        ws.edit([FACTS[0]])
    found = called("ledger", directory, "undo", *arguments)
    assert (found.code, found.out) == (2, "")
    assert says in found.err
    then = datetime.fromisoformat(Ledger.read(directory).batches[0].signature.time)
    assert edits_since(Ledger.read(directory), then) == ((0, FACTS[0].id),)
    with pytest.raises(RunError, match="No edit was written since"):
        edits_since(Ledger.read(directory), then + timedelta(seconds=1))
    never = directory / "other.jsonl"
    never.write_text(FactRecord(request=FACTS[4]).model_dump_json() + "\n")
    assert f"'{FACTS[4].text}' was never written here" in called("ledger", directory, "undo", "--file", never).err
    assert len(Ledger.read(directory).facts()) == 1


def test_a_run_that_was_stopped_is_resumed_before_it_is_edited(called: Run, directory: Path) -> None:
    record = json.loads((directory / "run.json").read_text())
    record["dataset"] = {"name": "x", "records": 2, "hash": "0"}
    (directory / "run.json").write_text(json.dumps(record))
    found = called("edit", directory, *words(FACTS[0]))
    assert (found.code, found.out) == (2, "")
    assert f"is not finished. Resume it first, with: editctl run --resume --out {directory}" in found.err


def test_where_no_editor_is_named_a_preferred_one_comes_first() -> None:
    plugins = Plugins.load()
    fitting = [name for name, spec in sorted(plugins.editors().items()) if preset_for(spec, "smollm2-135m") is not None]
    assert fitting.index("alphaedit") < fitting.index("emmet")
    assert default_editor(plugins, "smollm2-135m") == "emmet"
    assert tunable_editors(plugins)[0].name == "emmet"


# The check


def test_a_check_asks_everything_and_keeps_what_the_unedited_model_said(
    called: Run, directory: Path, tiny_corpus: Path
) -> None:
    neighbour = Probe(kind="neighborhood", prompt=FACTS[5].text)
    with editcore.workspace(directory) as ws:
        ws.edit([FactRecord(request=fact, probes=(neighbour,)) for fact in FACTS[:3]])
    limits = ["--min-said", 0, "--max-perplexity", 1e9, "--max-moved", 100]
    asked = ["--text", tiny_corpus, "--neighbours", 8, "--json"]
    found = called("check", directory, *asked, *limits)
    assert found.code == 0, found.err
    check = json.loads(found.out)
    assert (check["facts"], check["neighbours"], check["subjects"]) == (3, 8, 3)
    assert check["said"] == pytest.approx(100 * (3 - len(check["lost"])) / 3)
    assert check["perplexity_ratio"] != 1.0
    assert check["passed_limits"] == []
    assert len(check["samples"]) == 3
    kept = json.loads((directory / "unedited.json").read_text())
    assert FACTS[5].text in kept["answers"]
    assert len(kept["answers"]) == 11
    for answers in [*check["moved"], *check["subjects_moved"]]:
        assert answers["before"] != answers["after"]
        assert answers["before"].startswith(kept["answers"][answers["prompt"]])
    # The answers are those of the model before it was edited, whatever it says now.
    with editcore.workspace(directory) as ws:
        unedited = ws.session.generate_unedited(list(kept["answers"]), max_new_tokens=1)
        now = ws.session.generate(list(kept["answers"]), max_new_tokens=1)
    assert list(kept["answers"].values()) == unedited
    said = dict(zip(kept["answers"], zip(unedited, now, strict=True), strict=True))
    moved = {answers["prompt"] for answers in [*check["moved"], *check["subjects_moved"]]}
    assert moved == {prompt for prompt, (before, after) in said.items() if before != after}
    # A second check takes them from the file.
    kept["answers"][FACTS[5].text] = "something else"
    (directory / "unedited.json").write_text(json.dumps(kept))
    again = json.loads(called("check", directory, *asked, *limits).out)
    assert FACTS[5].text in {answers["prompt"] for answers in again["moved"]}
    assert json.loads((directory / "unedited.json").read_text()) == kept

    told = called("status", directory).out
    assert f"{3 - len(check['lost'])} of 3 facts said" in told
    assert "since" not in told.split("check")[-1]
    with editcore.workspace(directory) as ws:
        ws.change("undo", [(0, FACTS[0].id)])
    assert "; 1 change since" in called("status", directory).out
    failed = called("check", directory, "--text", tiny_corpus, "--neighbours", 8, "--max-perplexity", 0)
    assert failed.code == 1
    assert "times that of the unedited model; at most 0 is wanted (--max-perplexity)." in failed.out


def test_a_pack_is_checked_as_its_run_is(called: Run, directory: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    with editcore.workspace(directory) as ws:
        ws.edit(FACTS[:3])
    pack = tmp_path / "facts.editpack"
    assert called("pack", directory, pack).code == 0
    asked = ["--text", tiny_corpus, "--neighbours", 4, "--json", "--min-said", 0, "--max-perplexity", 1e9]
    asked += ["--max-moved", 100]
    run, packed = (
        json.loads(called("check", *where, *asked).out)
        for where in ([directory], [pack, "--model", RunRecord.read(directory).source])
    )
    for name in ("lost", "moved", "subjects_moved", "perplexity_ratio", "samples"):
        assert run[name] == packed[name], name
    refused = called("check", directory, "--model", "smollm2-135m")
    assert (refused.code, "--model is for a pack" in refused.err) == (2, True)


def test_a_pack_is_loaded_in_the_type_that_it_was_made_for(
    called: Run, tmp_path: Path, tiny_folder: Path, tiny_corpus: Path
) -> None:
    place, pack = tmp_path / "bfloat16", tmp_path / "facts.editpack"
    made = called(
        "init", place, "--model", tiny_folder, "--editor", "emmet", "--dtype", "bfloat16", "--corpus", tiny_corpus,
        "--corpus-tokens", 512, "--set", "layers=[1]", "--set", "v_num_grad_steps=2", "--set", "context_count=0",
    )  # fmt: skip
    assert made.code == 0, made.err
    for step in (["edit", place, *words(FACTS[0])], ["pack", place, pack], ["apply", pack, "--model", tiny_folder]):
        done = called(*step)
        assert done.code == 0, done.err
    asked = [pack, "--model", tiny_folder, "--text", tiny_corpus, "--neighbours", 1, "--json", "--min-said", 0]
    checked = called("check", *asked, "--max-perplexity", 1e9, "--max-moved", 100)
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["facts"] == 1
    refused = called("apply", pack, "--model", tiny_folder, "--dtype", "float32")  # its weights have other bits
    assert (refused.code, "--force applies them anyway" in refused.err) == (2, True)


def test_a_pack_is_read_and_planned_before_it_is_applied(called: Run, directory: Path, tmp_path: Path) -> None:
    other_directory = shutil.copytree(directory, tmp_path / "other")
    with editcore.workspace(directory) as ws:
        ws.edit(FACTS[:3])
    with editcore.workspace(other_directory) as ws:
        ws.edit([FACTS[0], FACTS[1].model_copy(update={"target_new": "Oslo"})])
    pack = tmp_path / "facts.editpack"
    assert called("pack", directory, pack).code == 0
    listed = called("pack", "--list", pack).out.splitlines()
    assert listed[0].startswith("3 edits of ")
    assert ") by emmet, in 2 batches; 0." in listed[0]
    assert listed[1:] == [f"  {fact.text} → {fact.target_new}" for fact in FACTS[:3]]
    dry = called("apply", pack, "--into", other_directory, "--dry-run")
    assert dry.code == 0, dry.err
    lines = dry.out.splitlines()
    assert lines[0].startswith("3 facts in ")
    assert lines[1] == "1 fact is active already and is not written again (--again writes it)."
    assert "would write 2 facts into" in lines[2]
    assert lines[3] == "Corrections of active facts"
    assert len(Ledger.read(other_directory).batches) == 1
    done = called("apply", pack, "--into", other_directory, "--note", "from the other")
    assert done.code == 0, done.err
    assert {(fact.text, fact.target_new) for fact in Ledger.read(other_directory).facts()} == {
        (fact.text, fact.target_new) for fact in FACTS[:3]
    }
    assert Ledger.read(other_directory).batches[-1].signature.note == "from the other"
    for wrong, says in (
        (["pack", "--list", directory, pack], "2 paths given; 'editctl pack RUN FILE' takes two"),
        (["pack", directory], "1 path given"),
        (["apply", pack, "--dry-run"], "--dry-run: this is for --into DIR."),
        (["apply", pack, "--into", other_directory, "--save", "x", "--force"], "--force, --save: "),
    ):
        found = called(*wrong)
        assert (found.code, found.out) == (2, ""), wrong
        assert says in found.err


def test_limits_are_told_one_by_one() -> None:
    lost = LostFact(id="a", prompt="p", target_new="t", probability=0.1, said="x", in_answer=False)
    found = CheckRecord(
        time="2026-01-01T00:00:00+00:00", changes=1, facts=10, lost=(lost,), neighbours=0, moved=(), subjects=0,
        subjects_moved=(), text="docs", tokens=10, perplexity_ratio=1.04, samples=(),
    )  # fmt: skip
    assert found.said == 90.0
    assert found.neighbours_moved == 0.0
    assert list(found.passed_limits(CheckLimits())) == [
        "90.0 % of the facts are said; at least 95 % are wanted (--min-said)."
    ]
    assert len(list(found.passed_limits(CheckLimits(min_said=91, max_perplexity=1.03)))) == 2
    moved = found.model_copy(update={"neighbours": 10, "moved": (Answers(prompt="p", before="a", after="b"),)})
    assert list(moved.passed_limits(CheckLimits(min_said=0, max_moved=9))) == [
        "10.0 % of the neighbours moved; at most 9 % are wanted (--max-moved)."
    ]
    assert not list(moved.passed_limits(CheckLimits(min_said=0, max_moved=10)))
    empty = found.model_copy(update={"facts": 0, "lost": ()})
    assert empty.said == 100.0
    assert not list(empty.passed_limits(CheckLimits()))


def test_a_check_of_a_short_text_says_so(directory: Path, tmp_path: Path) -> None:
    from editcore.runs.checking import CheckOptions

    (tmp_path / "short.txt").write_text("too short")
    with editcore.workspace(directory) as ws, pytest.raises(StatisticsError):
        ws.check(CheckOptions(text=str(tmp_path / "short.txt")))
    assert not (directory / "check.json").exists()


# What a reviewer reads


def test_diff_says_what_another_directory_has_otherwise(directory: Path, called: Run, tmp_path: Path) -> None:
    with editcore.workspace(directory) as ws:
        ws.edit(FACTS[:4], author="Ada")  # two batches of two
    proposed = Path(shutil.copytree(directory, tmp_path / "proposed"))
    equal = called("ledger", directory, "diff", proposed)
    assert equal.out.splitlines() == [
        "Facts: 0 added, 0 taken out, 0 corrected; 4 are the same in both.",
        f"Both are edits of {Ledger.read(directory).header.model}, and begin with the same 2 batches. "  # type: ignore[union-attr]
        "facts has 0 more, proposed has 0 more.",
        "The edited weights are the same, bit for bit.",
    ]
    with editcore.workspace(proposed) as ws:
        ws.edit([FACTS[4]], author="Bo", note="asked by legal")
        ws.edit([EditRequest(subject=FACTS[0].subject, prompt=FACTS[0].prompt, target_new="Oslo")], author="Bo")
        ws.undo(FACTS[2].id, note="was a rumour")
    shown = called("ledger", directory, "diff", proposed).out
    today = signed("").day
    rows = {line.split("  ")[0]: line for line in shown.splitlines()}
    assert all(part in rows["added"] for part in (FACTS[4].text, FACTS[4].target_new, f"Bo, {today}: asked by legal"))
    assert all(part in rows["taken out"] for part in (FACTS[2].text, FACTS[2].target_new, "was a rumour"))
    assert all(part in rows["corrected"] for part in (FACTS[0].text, FACTS[0].target_new, "Oslo", f"Bo, {today}"))
    for sentence in (
        "Facts: 1 added, 1 taken out, 1 corrected; 2 are the same in both.",
        "begin with the same 2 batches. facts has 0 more, proposed has 2 more.",
        "Solved again, because other facts are taken out: batch 1.",
    ):
        assert sentence in shown
    found = json.loads(called("ledger", directory, "diff", proposed, "--json").out)
    assert [(fact["what"], fact["here"], fact["there"]) for fact in found["facts"]] == [
        ("added", "", FACTS[4].target_new),
        ("taken out", FACTS[2].target_new, ""),
        ("corrected", FACTS[0].target_new, "Oslo"),
    ]
    [(address, size)] = found["weights"].items()
    models = []
    for place in (directory, proposed):
        with editcore.workspace(place) as ws:
            models.append(ws.session.model.weight(address).double())
            base = ws.session.without_edits(lambda ws=ws: ws.session.model.weight(address).double())  # type: ignore[misc]
    difference = float((models[1] - models[0]).norm())
    assert size["norm"] == pytest.approx(difference, rel=1e-4)  # the weights are rounded to float32
    assert size["relative"] == pytest.approx(difference / float(base.norm()), rel=1e-4)
    assert f"{100 * size['relative']:.2g} % of the weight" in shown
    header = Ledger.read(directory).header
    assert header is not None
    (tmp_path / "else").mkdir()
    write_ledger(tmp_path / "else", [], header.model_copy(update={"fingerprint": "0" * 64}))
    assert "different base models" in called("ledger", directory, "diff", tmp_path / "else").out


# Other processes, and other people's directories


WRITES = """
import sys, editcore
from editcore.runs.session import EditSession

write = EditSession._write

def slowly(*arguments):
    print("writing", flush=True)
    sys.stdin.readline()
    return write(*arguments)

EditSession._write = slowly
subject, prompt, target = sys.argv[2:]
with editcore.workspace(sys.argv[1]) as ws:
    ws.edit([editcore.EditRequest(subject=subject, prompt=prompt, target_new=target)])
"""


def test_while_one_process_writes_others_may_read_and_none_writes(
    directory: Path, called: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with editcore.workspace(directory) as ws:
        ws.edit([FACTS[0]])

    def begins(fact: EditRequest) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITES, directory, fact.subject, fact.prompt, fact.target_new],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    first = begins(FACTS[1])
    for command in (
        ["edit", directory, *words(FACTS[2])],
        ["ledger", directory, "undo", FACTS[0].id],
        ["check", directory],
    ):
        refused = called(*command)
        assert refused.code == 2
        assert f"in use by process {first.pid}" in refused.err
    for command in (["status", directory], ["log", directory], ["ledger", directory, "show"]):
        assert called(*command).code == 0
    first.communicate("\n")
    assert first.returncode == 0
    assert called("ledger", directory, "undo", FACTS[0].id).code == 0
    assert [fact.text for fact in Ledger.read(directory).facts()] == [FACTS[1].text]

    second = begins(FACTS[2])
    second.kill()  # before its batch is in the ledger
    second.communicate()
    assert called("edit", directory, *words(FACTS[3])).code == 0
    assert f"process {second.pid} has ended without releasing the lock" in caplog.text
    ledger = Ledger.read(directory)
    assert [fact.text for fact in ledger.facts()] == [FACTS[1].text, FACTS[3].text]
    assert called("ledger", directory, "verify").code == 0


def test_a_directory_that_cannot_be_written_is_read_and_checked(
    directory: Path, called: Run, tiny_corpus: Path
) -> None:
    with editcore.workspace(directory) as ws:
        ws.edit(FACTS[:2])
    asked = ["--text", tiny_corpus, "--neighbours", 4, "--json", "--min-said", 0, "--max-perplexity", 1e9]
    asked += ["--max-moved", 100]
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    access = os.access
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode, **more: mode != os.W_OK and access(path, mode, **more))
        for command in ("status", "log"):
            assert called(command, directory).code == 0
        found = called("check", directory, *asked)
    assert found.code == 0, found.err
    assert "cannot be written, so what is found is not kept" in found.err
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    kept = called("check", directory, *asked)
    same = ("facts", "lost", "moved", "subjects_moved", "perplexity_ratio", "samples")
    assert [json.loads(found.out)[name] for name in same] == [json.loads(kept.out)[name] for name in same]
