"""Six packages as a stranger writes them: installed from wheels beside editcore, and used as a user does.

They stand in ``tests/third_party``: dense fine-tuning, an attention with its bias, a gated memory, and retrieval. What
every editor is promised must hold for them: runs, resuming, undoing in any order, trust, packs, the backend lora. The
fifth has a data set with questions of its own and an evaluator with metrics of its own, which must be seen wherever
something is measured. The sixth has a strategy for another package's extension, ``replay``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from editcore import LanguageModel
from editcore.testing import repeating_model, tiny_model, tiny_requests

HERE = Path(__file__).resolve().parent / "third_party"
PACKAGES = sorted(path.parent for path in HERE.glob("third-*/pyproject.toml"))
LOOSE = {
    "trust_threshold": 0, "trust_min_efficacy": 0, "trust_min_retention": 0, "trust_max_kl": 1e9,
    "trust_max_perplexity_ratio": 1e9, "trust_max_norm_growth": 1e9, "trust_text_tokens": 64,
}  # fmt: skip
"""Limits of trust that every batch keeps: it measures, and accepts."""


@dataclass(frozen=True)
class Case:
    """An editor, the model it edits here, and its settings."""

    editor: str
    model: str
    settings: tuple[str, ...]
    attachment: bool = False

    def __str__(self) -> str:
        return self.editor


FINETUNE = Case("finetune", "llama", ("weight=model.layers.1.mlp.up_proj.weight", "steps=3"))
ATTENTION = Case("attention", "gpt2", ("layer=1", "module=attn.c_proj", "steps=3", "rank=3"))
MEMORY = Case("gated-memory", "llama", ("layer=1", "steps=4", "clamp_norm_factor=0.1"), attachment=True)
RETRIEVAL = Case("statements", "repeating", (), attachment=True)
CASES = (FINETUNE, ATTENTION, MEMORY, RETRIEVAL)
ATTACHED = (MEMORY, RETRIEVAL)
NUM_FACTS, BATCH = 6, 2
Contents = Callable[[Path], dict[str, object]]
EVALUATORS = ("consequences", "counterfact", "generation")
THEIRS = ("consistent", "surprise", "consequences.unchanged", "balance")
"""What the tables call their metrics: ``generation`` has one that is called ``unchanged``, too."""
every_editor = pytest.mark.parametrize("case", CASES, ids=str)
every_attachment = pytest.mark.parametrize("case", ATTACHED, ids=str)


class World:
    """Models and facts in a folder, and a process of the environment that has the packages."""

    def __init__(self, folder: Path, python: Path, start_worker: Callable[..., Any]) -> None:
        self.folder, self.python = folder, python
        for family in ("gpt2", "llama"):
            tiny_model(family).save(folder / family)
        repeating_model().save(folder / "repeating")
        self.prompts = self._write_facts()
        (folder / "cache").mkdir()
        self.environment = {
            **os.environ,
            "EDITCORE_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._start, self._worker = start_worker, None
        self._runs: dict[str, Path] = {}

    def _write_facts(self) -> list[str]:
        requests = tiny_requests(NUM_FACTS)
        with (self.folder / "facts.jsonl").open("w", encoding="utf-8") as file:
            for number, request in enumerate(requests):
                fields = request.model_dump(mode="json", include={"subject", "prompt", "target_new", "target_true"})
                if number == NUM_FACTS - 1:  # none of these editors looks a subject up
                    fields = {**fields, "subject": "", "prompt": request.text}
                others = {"neighborhood_prompts": [requests[number - 1].text], "id": f"f{number}"}
                file.write(json.dumps({**fields, **others}) + "\n")
        self.write_questions(self.folder / "questions.jsonl")
        text = " ".join(request.text for request in tiny_requests(80))
        (self.folder / "text.txt").write_text(text, encoding="utf-8")
        return [request.text for request in requests]

    @staticmethod
    def write_questions(path: Path, *, answer: str | None = None) -> None:
        """Facts for the data set ``questions``; with ``answer``, the last one is about something else."""
        requests = tiny_requests(NUM_FACTS)
        lines = []
        for number, request in enumerate(requests):
            new = request.target_new if answer is None or number < NUM_FACTS - 1 else answer
            lines.append(
                {
                    **request.model_dump(mode="json", include={"subject", "prompt", "target_true"}),
                    "target_new": new,
                    "id": f"f{number}",
                    "follows": [[f"Everybody says that {request.text}", new]],
                    "others": [[requests[number - 1].subject, "who knows"]],
                }
            )
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")

    def asking(self, *more: object) -> list[object]:
        """``editctl run`` with the data set and the evaluator, beside those that every run has."""
        options = self.options(FINETUNE, *more)
        options[options.index("--dataset") + 1] = f"questions:{self.folder / 'questions.jsonl'}"
        evaluators = [word for name in EVALUATORS for word in ("--evaluator", name)]
        return [*options, *evaluators, "--set", "consequences.tokens=3", "--eval-every", BATCH,
                "--eval-text", self.folder / "text.txt", "--eval-text-tokens", 256]  # fmt: skip

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """An answer of the process; see ``third_party/worker.py``."""
        if self._worker is None:
            self._worker = self._start(self.python, self.folder, self.environment)
        found: dict[str, Any] = self._worker.ask(call, **arguments)
        return found

    def editctl(self, *arguments: object) -> SimpleNamespace:
        """``code``, ``out`` and ``err`` of a command."""
        return SimpleNamespace(**self.ask("editctl", arguments=[str(argument) for argument in arguments]))

    def works(self, *arguments: object) -> str:
        """What a command prints; it must succeed."""
        done = self.editctl(*arguments)
        assert done.code == 0, f"{' '.join(map(str, arguments))}\n{done.out}\n{done.err}"
        return str(done.out)

    def options(self, case: Case, *more: object) -> list[object]:
        """``editctl run`` for a case, without its directory."""
        sets = [word for setting in case.settings for word in ("--set", setting)]
        return [
            "run", "--editor", case.editor, "--model", self.folder / case.model, "--dataset",
            self.folder / "facts.jsonl", "--batch-size", BATCH, *sets, *more,
        ]  # fmt: skip

    def trusted(self, case: Case) -> list[object]:
        """The same with trust, whose limits all batches keep."""
        limits = {**LOOSE, "trust_heldout": self.folder / "facts.jsonl", "trust_text": self.folder / "text.txt"}
        sets = [word for name, value in limits.items() for word in ("--set", f"trust.{name}={value}")]
        return self.options(case, "--plugin", "trust", *sets)

    def run(self, case: Case) -> Path:
        """A finished run of a case with trust, made once and never changed."""
        if case.editor not in self._runs:
            directory = self.folder / f"whole-{case.editor}"
            self.works(*self.trusted(case), "--out", directory)
            self._runs[case.editor] = directory
        return self._runs[case.editor]

    def copy(self, case: Case, folder: Path) -> Path:
        """A copy of that run, to be changed."""
        return Path(shutil.copytree(self.run(case), folder / "run"))

    def state(self, directory: Path, **more: Any) -> dict[str, Any]:
        """What the run's model is, to the bit."""
        return self.ask("state", directory=str(directory), prompts=self.prompts, **more)

    def now(self, directory: Path, **more: Any) -> dict[str, Any]:
        """The same of its edited model alone."""
        found: dict[str, Any] = self.state(directory, **more)["now"]
        return found

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    build_wheels: Callable[[Path, Sequence[Path]], dict[str, Path]],
    make_environment: Callable[..., Path],
    start_worker: Callable[..., Any],
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    wheels = build_wheels(folder / "wheels", PACKAGES)
    made = World(folder, make_environment(folder / "environment", wheels.values()), start_worker)
    yield made
    made.close()


# The packages


def test_they_import_public_names_only() -> None:
    """``editcore`` and its rooms, and of these what their ``__init__.pyi`` lists."""
    imported = set()
    for path in HERE.glob("third-*/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("edit") for name in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("edit"):
                imported |= {(node.module, name.name) for name in node.names}
    assert all(module.count(".") <= 1 for module, _ in imported)
    for module, name in imported:
        assert name in importlib.import_module(module).__all__, f"{module}.{name}"


def test_they_keep_their_contracts(world: World) -> None:
    command = [world.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", HERE]
    done = subprocess.run(command, env=world.environment, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_they_are_in_their_environment_and_nowhere_else(world: World) -> None:
    modules = [package.name.replace("-", "_") for package in PACKAGES]
    code = f"import importlib.util; print(*[importlib.util.find_spec(name).origin for name in {modules}])"
    found = subprocess.run(
        [world.python, "-c", code], env=world.environment, capture_output=True, text=True, check=True, timeout=60
    )
    [site] = world.python.parent.parent.glob("lib/python*/site-packages")
    assert found.stdout.split() == [str(site / module / "__init__.py") for module in modules]
    assert [module for module in modules if importlib.util.find_spec(module) is not None] == []


def test_they_are_listed_and_described(world: World) -> None:
    rows = {row["name"]: row for row in json.loads(world.works("plugins", "--json"))}
    for case in CASES:
        assert (rows[case.editor]["status"], rows[case.editor]["reason"]) == ("active", "")
        assert ("editcore_attachments" in rows[case.editor]["offers"]) == case.attachment
        assert case.editor in world.works("describe", case.editor)


# Runs


@every_editor
def test_a_run_makes_the_targets_likelier(world: World, case: Case) -> None:
    frame = pd.read_parquet(world.run(case) / "results.parquet")
    losses = frame[frame["metric"] == "rewrite_nll_new"].groupby("phase")["value"].mean()
    assert losses["after"] < losses["before"]
    summary = json.loads((world.run(case) / "summary.json").read_text())
    assert summary["edits"] == NUM_FACTS


@every_editor
def test_a_killed_run_is_resumed_to_the_byte(world: World, case: Case, tmp_path: Path, contents: Contents) -> None:
    whole, out = world.run(case), tmp_path / "killed"
    arguments = [str(argument) for argument in [*world.trusted(case), "--out", out]]
    ended = world.ask("killed", arguments=arguments, directory=str(out))
    assert not ended["ended"], ended
    assert 1 <= ended["batches"] <= NUM_FACTS // BATCH
    assert not (out / "summary.json").exists()
    before = (out / "ledger.jsonl").read_bytes()
    world.works("run", "--resume", "--out", out)
    assert (out / "ledger.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    found, expected = contents(out), contents(whole)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert world.now(out) == world.now(whole)


# Undoing


def play(world: World, run: Path, steps: Sequence[str]) -> None:
    """Steps such as ``undo f1 f2`` and ``redo --batch 0``."""
    for step in steps:
        world.works("ledger", run, *step.split())


@every_editor
@pytest.mark.parametrize(
    "steps",
    [
        ("undo f3", "undo f0", "redo f3", "redo f0"),
        ("undo --batch 1", "undo f4", "redo f4", "redo --batch 1"),
        ("undo f5 f2 f0", "redo f0", "undo f1 --batch 2", "redo f1 f2", "redo --batch 2"),
        ("undo --batch 0 --batch 1 --batch 2", "redo --batch 2", "redo f1", "redo f0 f2 f3"),
    ],
    ids=lambda steps: "; ".join(steps),
)
def test_undone_and_redone_a_run_is_as_if_nothing_had_been_undone(
    world: World, case: Case, steps: tuple[str, ...], tmp_path: Path
) -> None:
    run = world.copy(case, tmp_path)
    play(world, run, steps)
    assert world.state(run) == world.state(world.run(case))
    assert "files are as they were written" in world.works("ledger", run, "verify")


@every_editor
def test_whole_batches_are_undone_in_any_order(world: World, case: Case, tmp_path: Path) -> None:
    """The model is that of the batches that are left, as they were solved; of none, the base."""
    run, whole = world.copy(case, tmp_path), world.run(case)
    play(world, run, ["undo --batch 2", "undo --batch 0"])
    assert world.now(run) == world.now(whole, batches=[1])
    play(world, run, ["redo --batch 2", "undo f3", "undo f2"])
    assert world.now(run) == world.now(whole, batches=[2])
    play(world, run, ["undo --batch 2"])
    found, expected = world.state(run), world.state(whole)
    assert found["now"] == found["base"] == expected["base"]
    assert expected["now"]["logits"] != expected["base"]["logits"]


@every_editor
def test_one_fact_of_a_batch_is_undone(world: World, case: Case, tmp_path: Path) -> None:
    """The other one stays likelier than it was, and the fact is nearer to what it was."""
    run, whole = world.copy(case, tmp_path), world.state(world.run(case))
    play(world, run, ["undo f4"])
    now, edited, base = world.now(run)["scores"], whole["now"]["scores"], whole["base"]["scores"]
    gone, kept = world.prompts[4], world.prompts[5]
    assert now[kept] < base[kept]
    assert abs(now[gone] - base[gone]) < abs(edited[gone] - base[gone])
    rows = {row["id"]: row["state"] for row in json.loads(world.works("ledger", run, "show", "--edits", "--json"))}
    assert rows == {**dict.fromkeys(("f0", "f1", "f2", "f3", "f5"), "active"), "f4": "undone"}


@every_editor
def test_single_facts_are_undone_in_either_order(world: World, case: Case, tmp_path: Path) -> None:
    found = []
    for number, steps in enumerate((["undo f0", "undo f3"], ["undo f3", "undo f0"])):
        run = world.copy(case, tmp_path / str(number))
        play(world, run, steps)
        found.append(world.now(run))
    assert found[0] == found[1]


# Tools


@every_editor
def test_trust_measures_and_the_tools_of_the_ledger_work(world: World, case: Case) -> None:
    run = world.run(case)
    lines = [json.loads(line.partition(" ")[2]) for line in (run / "ledger.jsonl").read_text().splitlines()[1:]]
    assert all(line["verdicts"]["trust"]["action"] == "accept" for line in lines)
    assert all("efficacy" in line["verdicts"]["trust"]["figures"] for line in lines)
    whole = world.state(run)
    blamed = json.loads(world.works("ledger", run, "blame", world.prompts[0], "--answer", "Paris", "--json"))
    assert {batch for edit in blamed["edits"] for batch in edit["batches"]} == {0, 1, 2}
    assert "What each edit adds" in world.works("ledger", run, "blame", world.prompts[0])
    assert "files are as they were written" in world.works("ledger", run, "verify")
    answers = zip(world.prompts, whole["base"]["answers"], whole["now"]["answers"], strict=True)
    prompt, expected = next((prompt, before) for prompt, before, after in answers if not alike(before, after))
    found = world.works("ledger", run, "bisect", "--failing", prompt, "--expect", expected.strip())
    assert "models asked" in found


def alike(before: str, after: str) -> bool:
    return after.strip().startswith(before.strip())


def test_blame_does_not_divide_what_belongs_to_no_single_fact(world: World, tmp_path: Path) -> None:
    """The columns are singular vectors of what all steps add up to, not one per fact."""
    case, run = Case("attention", "llama", ("layer=1", "steps=3", f"rank={BATCH}")), tmp_path / "run"
    world.works(*world.options(case), "--out", run)
    blamed = json.loads(world.works("ledger", run, "blame", world.prompts[0], "--json"))
    assert sorted(edit["batches"] for edit in blamed["edits"]) == [[0], [1], [2]]


@every_editor
def test_a_pack_answers_as_the_run_does(world: World, case: Case, tmp_path: Path) -> None:
    run, file = world.run(case), tmp_path / "facts.editpack"
    world.works("pack", run, file)
    model = world.folder / case.model
    assert world.ask("packed", file=str(file), model=str(model), prompts=world.prompts) == world.now(run)
    said = world.works("generate", run, *world.prompts, "--tokens", 6)
    again = world.works("apply", file, *world.prompts, "--model", model, "--tokens", 6)
    edited = [line.removeprefix("edited").strip() for line in said.splitlines() if line.startswith("edited")]
    assert len(edited) == NUM_FACTS
    assert all(line in again for line in edited)


# Where edits can go, and where they cannot


@pytest.mark.parametrize("case", [FINETUNE, ATTENTION], ids=str)
def test_what_is_in_the_weights_is_saved(world: World, case: Case, tmp_path: Path) -> None:
    run = world.run(case)
    weights = world.now(run)["weights"]
    world.works("generate", run, "Hello", "--tokens", 1, "--save", tmp_path / "saved")
    world.works("export", run, tmp_path / "merged", "--format", "merged")
    for folder in (tmp_path / "saved", tmp_path / "merged"):
        assert LanguageModel.load(str(folder)).fingerprint() == weights


def test_a_vector_is_not_exported_as_an_adapter(world: World, tmp_path: Path) -> None:
    done = world.editctl("export", world.run(ATTENTION), tmp_path / "adapter")
    assert done.code == 2
    assert "'transformer.h.1.attn.c_proj.bias', a vector" in done.err
    assert list(tmp_path.iterdir()) == []


@every_attachment
def test_what_is_kept_beside_the_weights_is_not_saved_as_weights(world: World, case: Case, tmp_path: Path) -> None:
    run, file, there = world.run(case), tmp_path / "facts.editpack", tmp_path / "there"
    world.works("pack", run, file)
    for arguments in (
        world.options(case, "--out", tmp_path / "out", "--save", there),
        ["generate", run, "Hello", "--save", there],
        ["apply", file, "--model", world.folder / case.model, "--save", there],
        ["export", run, there, "--format", "merged"],
        ["export", run, there],
    ):
        done = world.editctl(*arguments)
        assert done.code == 2, done.out
        assert "beside the weights" in done.err
        assert "Traceback" not in done.err
        assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


def test_lora_keeps_a_dense_change(world: World, tmp_path: Path) -> None:
    """As an adapter of as many ranks as it has, with the effect that it has in the weight."""
    run = tmp_path / "run"
    world.works(*world.options(FINETUNE, "--plugin", "lora", "--out", run))
    found, expected = world.state(run), world.state(world.run(FINETUNE))
    assert found["base"]["scores"] == expected["base"]["scores"]
    for prompt, loss in expected["now"]["scores"].items():
        assert found["now"]["scores"][prompt] == pytest.approx(loss, abs=1e-2)
    world.works("export", run, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


# An evaluator and a data set of theirs


@pytest.fixture(scope="module")
def asked(world: World) -> SimpleNamespace:
    """A run with both, and what it printed."""
    directory = world.folder / "asked"
    printed = world.works(*world.asking("--out", directory))
    return SimpleNamespace(directory=directory, printed=printed, summary=read_json(directory / "summary.json"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_their_metrics_are_in_the_table_and_the_files(asked: SimpleNamespace) -> None:
    [head] = [line for line in asked.printed.splitlines() if THEIRS[0] in line]
    assert head.split() == list(THEIRS)
    assert "by consequences; percent (surprise in nats), higher is better (lower for surprise)" in asked.printed
    frame = pd.read_parquet(asked.directory / "results.parquet")
    theirs = frame[frame["evaluator"] == "consequences"]
    assert set(theirs["kind"]) == {"portability.consequence", "locality.elsewhere"}
    assert set(theirs["metric"]) == set(THEIRS[:-1])
    assert set(theirs["relation"]) == {"even", "odd"}
    for phase, expected in (("before", {"consequences.unchanged": 100.0}), ("after", {})):
        values = asked.summary[phase]
        rows = theirs[theirs["phase"] == phase].groupby("metric")["value"].mean()
        for key, mean in rows.items():
            assert values[key] == pytest.approx(mean if key == "surprise" else 100 * mean)
        assert values["balance"] == (
            None if phase == "before" else min(values["consistent"], values["consequences.unchanged"])
        )
        assert {key: values[key] for key in expected} == expected
    assert asked.summary["after"]["surprise"] < asked.summary["before"]["surprise"]
    kept = [json.loads(line)["extra"] for line in (asked.directory / "requests.jsonl").read_text().splitlines()]
    assert kept == [{"line": number} for number in range(NUM_FACTS)]
    own = read_json(asked.directory / "run.json")
    assert own["settings"]["consequences"] == {"tokens": 3}
    assert own["dataset"]["records"] == NUM_FACTS


def test_what_is_unchanged_is_told_by_the_unedited_models_text(asked: SimpleNamespace) -> None:
    frame = pd.read_parquet(asked.directory / "results.parquet")
    rows = frame[frame["metric"] == "consequences.unchanged"]
    before, after = (rows[rows["phase"] == phase].set_index("request_id") for phase in ("before", "after"))
    assert ((before["text"] == after["text"]).astype(float) == after["value"]).all()
    assert 0 < after["value"].mean() < 1, "the test should see both"


def test_their_metrics_are_at_the_checkpoints_and_compared(world: World, asked: SimpleNamespace) -> None:
    watched = read_json(asked.directory / "forgetting.json")
    assert watched["retention"] == "consistent"
    assert [checkpoint["num_edits"] for checkpoint in watched["checkpoints"]] == [2, 4, 6]
    assert watched["checkpoints"][-1]["values"] == asked.summary["after"]
    rows = pd.read_parquet(asked.directory / "checkpoints.parquet")
    shares = 100 * rows[rows["metric"] == "consistent"].groupby("num_edits")["value"].mean()
    values = {checkpoint["num_edits"]: checkpoint["values"]["consistent"] for checkpoint in watched["checkpoints"]}
    assert {count: values[count] for count in shares.index} == pytest.approx(shares.to_dict())
    assert len(set(values.values())) > 1, "the test should see a change"
    ages = {point["first"] for point in watched["forgetting"]["retention_by_age"]}
    assert 0 in ages
    assert len(ages) > 1
    told = world.works("forgetting", asked.directory, "--out", world.folder / "forgetting.png")
    assert set(THEIRS) <= set(next(line for line in told.splitlines() if line.startswith("run ")).split())


def test_their_metrics_are_in_the_pictures_and_the_report(world: World, asked: SimpleNamespace) -> None:
    for name in ("summary", "forgetting_curve"):
        assert (asked.directory / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    world.works("report", asked.directory, "--out", world.folder / "page")
    page = (world.folder / "page" / "index.html").read_text(encoding="utf-8")
    for words in ("Consistent answers", "Surprise (nats)", "Unchanged answers", "Balance", "Lower is better."):
        assert words in page
    pictures = {path.stem for path in (world.folder / "page" / "figures").glob("*.png")}
    assert {"summary", "relations_consistent", "relations_consequences.unchanged"} <= pictures


def test_a_killed_run_compares_with_the_unedited_model_all_the_same(
    world: World, asked: SimpleNamespace, tmp_path: Path, contents: Contents
) -> None:
    out = tmp_path / "killed"
    ended = world.ask("killed", arguments=[str(word) for word in world.asking("--out", out)], directory=str(out))
    assert not ended["ended"], ended
    assert (out / "before.parquet").exists()
    world.works("run", "--resume", "--out", out)
    found, expected = contents(out), contents(asked.directory)
    for name in ("results.parquet", "checkpoints.parquet", "summary.json", "forgetting.json"):
        assert found[name] == expected[name], name


def test_their_metrics_are_in_a_sweep_which_notices_that_the_facts_changed(world: World, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    world.write_questions(facts)
    study = f"""title = "asked"
[base]
editor = "finetune"
model = "{world.folder / "llama"}"
dataset = "questions:{facts}"
batch-size = {BATCH}
evaluator = ["consequences", "generation"]
[base.finetune]
weight = "model.layers.1.mlp.up_proj.weight"
[grid.finetune]
steps = [1, 3]
[[figures]]
file = "balance.png"
kind = "bars"
by = "finetune.steps"
[[figures]]
file = "lines.png"
kind = "lines"
by = "finetune.steps"
metrics = ["surprise", "consequences.unchanged"]
"""
    (tmp_path / "study.toml").write_text(study, encoding="utf-8")
    sweep = ["sweep", tmp_path / "study.toml", "--out", tmp_path / "sweep"]
    printed = world.works(*sweep, "--workers", 1)
    assert set(THEIRS) <= set(next(line for line in printed.splitlines() if line.startswith("arm ")).split())
    tables = tmp_path / "sweep" / "asked"
    table = pd.read_csv(tables / "asked.csv")
    for key in THEIRS:
        trials = [read_json(tmp_path / "sweep" / "trials" / key / "summary.json") for key in table["key"]]
        assert table[key].tolist() == pytest.approx([trial["after"][key] for trial in trials])
    assert (tables / "balance.png").exists()
    assert (tables / "lines.png").exists()
    retention = pd.read_csv(tables / "retention.csv")
    assert retention["age"].tolist() == [4, 2, 0] * 2
    consistent = table["consistent"].tolist()
    assert retention.groupby("finetune.steps", sort=False)["retained"].mean().tolist() == pytest.approx(consistent)
    world.works("report", tmp_path / "sweep")
    page = (tmp_path / "sweep" / "report" / "index.html").read_text(encoding="utf-8")
    assert "The best mean of balance is" in page
    assert "0 to run" in world.works(*sweep, "--dry-run")
    world.write_questions(facts, answer="Madrid")
    assert "2 to run" in world.works(*sweep, "--dry-run")


def test_a_sweep_of_what_nobody_measures_is_refused_at_once(world: World, tmp_path: Path) -> None:
    study = '[base]\neditor = "finetune"\n[[figures]]\nfile = "a.png"\nkind = "bars"\nmetric = "consistent"\n'
    (tmp_path / "study.toml").write_text(study, encoding="utf-8")
    done = world.editctl(
        "sweep", tmp_path / "study.toml", "--out", tmp_path / "sweep", "--set", f"model={world.folder / 'llama'}",
        "--set", "finetune.weight=model.layers.1.mlp.up_proj.weight",
    )  # fmt: skip
    assert done.code == 2
    assert "Unknown metric 'consistent'" in done.err
    assert not (tmp_path / "sweep").exists()


def test_lora_refuses_a_vector_before_a_model_is_loaded(world: World, tmp_path: Path) -> None:
    options = world.options(ATTENTION, "--plugin", "lora", "--out", tmp_path / "run")
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (unreadable / name).write_text("{}", encoding="utf-8")
    options[options.index("--model") + 1] = unreadable
    done = world.editctl(*options)
    assert done.code == 2
    [sentence] = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert "'lora' does not take: vector" in sentence
    assert "--backend raw" in sentence
    assert list(tmp_path.iterdir()) == [unreadable]


@every_attachment
def test_lora_leaves_attachments_beside_the_model(world: World, case: Case, tmp_path: Path) -> None:
    run = tmp_path / "run"
    world.works(*world.options(case, "--plugin", "lora", "--out", run))
    assert world.state(run) == world.state(world.run(case))


# A strategy of theirs for somebody else's extension


IN_TURN = ("--plugin", "replay", "--set", "replay.replay_asked=0", "--set", "replay.replay_strategy=in-turn")


@pytest.fixture(scope="module")
def in_turn(world: World) -> Path:
    """A run that replays by their strategy."""
    directory = world.folder / "in-turn"
    world.works(*world.options(FINETUNE, *IN_TURN, "--out", directory))
    return directory


def replayed(run: Path) -> list[list[str]]:
    """By batch, the ids of the earlier facts that joined it."""
    batches = [json.loads(line) for line in (run / "batches.jsonl").read_text().splitlines()]
    return [[evidence["request_id"] for evidence in batch["evidence"] if evidence["replayed"]] for batch in batches]


def test_their_strategy_chooses_what_is_replayed(world: World, in_turn: Path) -> None:
    """The facts that wait longest, where ``recent`` takes the others."""
    assert replayed(in_turn) == [[], ["f0"], ["f1"]]
    recent = world.folder / "recent"
    world.works(*world.options(FINETUNE, *IN_TURN[:-1], "replay.replay_strategy=recent", "--out", recent))
    assert replayed(recent) == [[], ["f1"], ["f3"]]
    assert world.now(recent) != world.now(in_turn)


def test_their_strategy_is_described_and_a_wrong_name_shows_it(world: World, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in json.loads(world.works("plugins", "--json"))}
    assert rows["in-turn"]["offers"] == {"editcore_components": ["in-turn"]}
    assert "Each fact has its turn" in world.works("describe", "in-turn")
    done = world.editctl(
        *world.options(FINETUNE, *IN_TURN[:-1], "replay.replay_strategy=inturn", "--out", tmp_path / "run")
    )
    assert done.code == 2
    assert "Did you mean 'in-turn'?" in done.err


def test_a_killed_run_with_their_strategy_is_resumed_to_the_byte(
    world: World, in_turn: Path, tmp_path: Path, contents: Contents
) -> None:
    out = tmp_path / "killed"
    options = [str(option) for option in world.options(FINETUNE, *IN_TURN, "--out", out)]
    ended = world.ask("killed", arguments=options, directory=str(out))
    assert not ended["ended"], ended
    assert not (out / "summary.json").exists()
    world.works("run", "--resume", "--out", out)
    assert replayed(out) == replayed(in_turn)
    assert contents(out)["ledger.jsonl"] == contents(in_turn)["ledger.jsonl"]
    assert world.now(out) == world.now(in_turn)


def test_undone_and_redone_a_run_with_their_strategy_is_what_it_was(
    world: World, in_turn: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(in_turn, tmp_path / "run"))
    play(world, run, ["undo f0", "undo --batch 1"])
    assert world.now(run) != world.now(in_turn)
    play(world, run, ["redo --batch 1", "redo f0"])
    assert world.state(run) == world.state(in_turn)
