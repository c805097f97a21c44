"""The committed capability items against their tables, read here on their own; and what the evaluator counts."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from editcore import DatasetError, EditRequest, EvaluationContext, FactRecord, Observation
from editcore.datasets import load_profiles, load_worldfacts
from editcore.datasets.subjects import mentions
from editcore.evaluation import CapabilityEvaluator, CapabilityHParams, CapabilityItem, capability_items

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "make_capability.py"
TABLES = tomllib.loads((ROOT / "tools" / "capability" / "tables.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def items() -> list[CapabilityItem]:
    return capability_items()


def solve(kind: str, question: str) -> str:
    """The right answer to the last line or lines of a prompt."""
    match kind:
        case "arithmetic":
            first, sign, second = question.removesuffix(" =").split()
            return str(
                {"+": int(first) + int(second), "-": int(first) - int(second), "*": int(first) * int(second)}[sign]
            )
        case "copying":
            return question.removeprefix("Input: ").removesuffix("\nOutput:")
        case "instructions":
            instruction, _, asked = question.removesuffix("\nAnswer:").partition(": ")
            known: Mapping[str, Any] = {
                "Write the first word": lambda text: text.split(", ")[0],
                "Write the last word": lambda text: text.split(", ")[-1],
                "Write the word in capital letters": str.upper,
                "Write the plural": TABLES["plurals"].__getitem__,
                "Write the opposite": TABLES["opposites"].__getitem__,
            }
            return str(known[instruction](asked))
    answers = [
        right
        for relation in TABLES["facts"]
        for subject, right in relation["objects"].items()
        if relation["prompt"].replace("{}", subject) == question
    ]
    assert len(answers) == 1
    return str(answers[0])


def test_there_are_enough_items_of_every_kind_and_none_comes_twice(items: list[CapabilityItem]) -> None:
    counts = Counter(item.kind for item in items)
    assert sum(counts.values()) >= 300
    assert set(counts) == {"arithmetic", "copying", "instructions", "facts"}
    assert min(counts.values()) >= 60
    assert len({item.prompt for item in items}) == len(items)


def test_every_item_and_every_item_that_it_shows_is_right(items: list[CapabilityItem]) -> None:
    for item in items:
        two_lines = item.kind in ("copying", "instructions")
        lines = item.prompt.split("\n")
        parts = ["\n".join(lines[place : place + 2]) for place in range(0, len(lines), 2)] if two_lines else lines
        *shown, question = parts
        assert len(shown) == 3
        assert solve(item.kind, question) == item.answer
        for part in shown:
            found = [end for end in range(len(part)) if part[end] == " " and _is_solved(item.kind, part, end)]
            assert found, part
            assert not part.startswith(question)


def _is_solved(kind: str, part: str, end: int) -> bool:
    try:
        return solve(kind, part[:end]) == part[end + 1 :]
    except (AssertionError, KeyError, ValueError):
        return False


def test_no_item_asks_for_a_fact_that_our_data_sets_edit(items: list[CapabilityItem]) -> None:
    asked = [item.prompt.split("\n")[-1] for item in items if item.kind == "facts"]
    edited = {record.request.text for record in (*load_worldfacts(), *load_profiles())}
    assert not edited & set(asked)
    subjects = {record.request.subject for record in (*load_worldfacts(), *load_profiles())}
    assert sum(any(mentions(prompt, subject) for subject in subjects) for prompt in asked) < len(asked) / 10


def test_the_committed_items_are_what_the_script_writes() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The evaluator


class Solver:
    """Answers as it was told to."""

    def __init__(self, said: Mapping[str, str]) -> None:
        self.said = said

    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]:
        assert options["raw"], "tasks are not put into a chat"
        return [self.said.get(prompt, " no") for prompt in prompts]


def tasks(path: Path, *items: tuple[str, str, str]) -> CapabilityHParams:
    lines = [json.dumps(dict(zip(("kind", "prompt", "answer"), item, strict=True))) for item in items]
    path.write_text("\n".join(lines), encoding="utf-8")
    return CapabilityHParams(items=str(path))


def records(*subjects: str) -> list[FactRecord]:
    return [
        FactRecord(request=EditRequest(subject=name, prompt="{} is in", target_new="Rome", id=name))
        for name in subjects
    ]


ITEMS = (
    ("arithmetic", "1 + 1 =", "2"),
    ("arithmetic", "2 + 2 =", "4"),
    ("facts", "Kent is", "old"),
    ("copying", "Input: A b\nOutput:", "A b"),
    ("other", "What?", "That"),
)


def ask(
    evaluator: CapabilityEvaluator, said: Mapping[str, str], unedited: Sequence[Observation] | None = None
) -> list[Observation]:
    model: Any = Solver(said)
    return evaluator.evaluate(model, records("Ada", "Bob"), EvaluationContext(unedited=unedited))


def test_what_counts_is_what_is_lost_of_what_was_solved(tmp_path: Path) -> None:
    evaluator = CapabilityEvaluator(tasks(tmp_path / "t.jsonl", *ITEMS))
    before = ask(
        evaluator,
        {
            "1 + 1 =": " 2\n3",
            "2 + 2 =": " 40",
            "Kent is": " old.",
            "Input: A b\nOutput:": " a b",
            "What?": "\n That\nis",
        },
    )
    assert [(observation.metric, observation.prompt, observation.value) for observation in before] == [
        ("capability_solved", "1 + 1 =", 1), ("capability_solved", "2 + 2 =", 0), ("capability_solved", "Kent is", 1),
        ("capability_solved", "Input: A b\nOutput:", 0), ("capability_solved", "What?", 1),
    ]  # fmt: skip
    assert [observation.request_id for observation in before] == ["Ada", "Bob", "Ada", "Bob", "Ada"]
    after = ask(evaluator, {"1 + 1 =": " 3", "2 + 2 =": " 4", "Kent is": " old", "What?": " That"}, before)
    kept = [observation for observation in after if observation.metric != "capability_solved"]
    assert {(observation.metric, observation.prompt): observation.value for observation in kept} == {
        ("capability_kept", "1 + 1 ="): 0, ("arithmetic_kept", "1 + 1 ="): 0,
        ("capability_kept", "Kent is"): 1, ("facts_kept", "Kent is"): 1,
        ("capability_kept", "What?"): 1,
    }  # fmt: skip


def test_tasks_about_edited_subjects_are_not_asked(tmp_path: Path) -> None:
    evaluator = CapabilityEvaluator(tasks(tmp_path / "t.jsonl", *ITEMS))
    model: Any = Solver({})
    for subject, asked in (("kent", 4), ("Ken", 5), ("", 5)):
        found = evaluator.evaluate(model, records(subject) if subject else _subjectless(), EvaluationContext())
        assert len(found) == asked


def _subjectless() -> list[FactRecord]:
    return [FactRecord(request=EditRequest(prompt="It rains in", target_new="spring"))]


def test_a_sample_is_spread_over_the_tasks(tmp_path: Path) -> None:
    hparams = tasks(tmp_path / "t.jsonl", *ITEMS).model_copy(update={"sample": 2})
    assert [observation.prompt for observation in ask(CapabilityEvaluator(hparams), {})] == [
        "2 + 2 =",
        "Input: A b\nOutput:",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "a", "prompt": "p", "answer": "x"}\n{', "line 2: this is not JSON"),
        ('{"kind": "a", "prompt": "p"}', r"line 1: this is no task\. answer: Field required"),
        ("", "there are no tasks in it"),
    ],
)
def test_a_file_that_has_no_tasks_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        capability_items(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=message):  # before a model is loaded
        CapabilityHParams(items=str(tmp_path / "t.jsonl"))
    with pytest.raises(DatasetError, match="cannot be read"):
        capability_items(tmp_path / "gone.jsonl")
