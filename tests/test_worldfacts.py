"""The committed ``worldfacts`` file, checked against the fact tables read here on their own."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "make_worldfacts.py"
FACTS = ROOT / "tools" / "worldfacts" / "facts"
DATA = ROOT / "packages" / "editcore" / "src" / "editcore" / "datasets" / "worldfacts.jsonl"

Record = dict[str, Any]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def objects_of() -> dict[tuple[str, str], set[str]]:
    """Every object the tables give for a (relation, subject)."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in FACTS.glob("*.toml"):
        for target, subjects in tomllib.loads(path.read_text(encoding="utf-8"))["facts"].items():
            for subject in subjects:
                found.setdefault((path.stem, subject), set()).add(target)
    return found


def subject_in(prompt: str, template: str) -> str:
    """What fills the template's ``{}`` in ``prompt``."""
    before, after = template.split("{}")
    assert prompt.startswith(before), (prompt, template)
    assert prompt.endswith(after), (prompt, template)
    return prompt[len(before) : len(prompt) - len(after)]


def relation_of(record: Record) -> str:
    relation = record["requested_rewrite"]["relation_id"]
    assert isinstance(relation, str)
    return relation


def test_schema(records: list[Record]) -> None:
    for record in records:
        assert list(record) == [
            "case_id",
            "question",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "generation_prompts",
        ]
        rewrite = record["requested_rewrite"]
        assert list(rewrite) == ["prompt", "relation_id", "target_new", "target_true", "subject"]
        assert list(rewrite["target_new"]) == list(rewrite["target_true"]) == ["str"]
        assert rewrite["prompt"].count("{}") == 1
        assert record["question"].count("{}") == 1
        assert record["question"].endswith("?")
        texts = [
            record["question"],
            rewrite["prompt"],
            rewrite["relation_id"],
            rewrite["target_new"]["str"],
            rewrite["target_true"]["str"],
            rewrite["subject"],
            *record["paraphrase_prompts"],
            *record["neighborhood_prompts"],
            *record["generation_prompts"],
        ]
        for text in texts:
            assert isinstance(text, str), record
            assert text, record
            assert text == text.strip(), (text, record)
        for text in texts[2:]:
            assert "{" not in text, (text, record)


def test_case_ids_count_up(records: list[Record]) -> None:
    assert [record["case_id"] for record in records] == list(range(len(records)))


def test_counts(records: list[Record]) -> None:
    assert len(records) >= 400
    per_relation = Counter(map(relation_of, records))
    assert len(per_relation) >= 16
    assert max(per_relation.values()) <= 0.10 * len(records)
    for record in records:
        for kind, count in (("paraphrase", 2), ("neighborhood", 10)):
            prompts = record[f"{kind}_prompts"]
            assert len(set(prompts)) == len(prompts) == count
        generation = record["generation_prompts"]
        assert 3 <= len(set(generation)) == len(generation)


def test_the_first_forty_records_cover_many_relations(records: list[Record]) -> None:
    head = {relation_of(record) for record in records[:40]}
    assert len(head) >= 16


def test_no_subject_and_prompt_twice(records: list[Record]) -> None:
    rewrites = [record["requested_rewrite"] for record in records]
    pairs = Counter((rewrite["subject"], rewrite["prompt"]) for rewrite in rewrites)
    assert [pair for pair, count in pairs.items() if count > 1] == []


def test_prompts_name_the_subject_and_no_answer(records: list[Record]) -> None:
    for record in records:
        rewrite = record["requested_rewrite"]
        answers = (rewrite["target_true"]["str"], rewrite["target_new"]["str"])
        own = [*record["paraphrase_prompts"], *record["generation_prompts"]]
        for prompt in own:
            assert rewrite["subject"] in prompt
        main = rewrite["prompt"].format(rewrite["subject"])
        for prompt in (main, *own, *record["neighborhood_prompts"]):
            for answer in answers:
                assert answer.casefold() not in prompt.casefold(), (prompt, answer)


def test_a_neighbour_never_names_the_edited_subject(records: list[Record]) -> None:
    for record in records:
        subject = record["requested_rewrite"]["subject"].casefold()
        for prompt in record["neighborhood_prompts"]:
            assert subject not in prompt.casefold(), (subject, prompt)


def test_neighbours_share_the_true_object(records: list[Record], objects_of: dict[tuple[str, str], set[str]]) -> None:
    for record in records:
        rewrite = record["requested_rewrite"]
        true = rewrite["target_true"]["str"]
        for prompt in record["neighborhood_prompts"]:
            neighbour = subject_in(prompt, rewrite["prompt"])
            assert objects_of[relation_of(record), neighbour] == {true}, (neighbour, true)


def test_no_neighbour_is_edited_elsewhere(records: list[Record]) -> None:
    edited = {(relation_of(r), r["requested_rewrite"]["subject"]) for r in records}
    for record in records:
        template = record["requested_rewrite"]["prompt"]
        for prompt in record["neighborhood_prompts"]:
            assert (relation_of(record), subject_in(prompt, template)) not in edited, prompt


def test_targets_are_true_and_false_by_the_tables(
    records: list[Record], objects_of: dict[tuple[str, str], set[str]]
) -> None:
    for record in records:
        rewrite = record["requested_rewrite"]
        true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        by_table = objects_of[relation_of(record), rewrite["subject"]]
        assert by_table == {true}
        assert new not in by_table
        relation = relation_of(record)
        assert any(new in ts for (name, _), ts in objects_of.items() if name == relation)


def test_new_targets_are_balanced(records: list[Record]) -> None:
    new: dict[str, Counter[str]] = {}
    for record in records:
        target = record["requested_rewrite"]["target_new"]["str"]
        new.setdefault(relation_of(record), Counter())[target] += 1
    for relation, counts in new.items():
        assert max(counts.values()) - min(counts.values()) <= 3, (relation, counts)


def test_the_committed_file_is_what_the_tool_builds() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_check_notices_a_changed_file(tmp_path: Path) -> None:
    changed = tmp_path / "worldfacts.jsonl"
    changed.write_text(DATA.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    command = [sys.executable, str(TOOL), "--check", "--output", str(changed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "make_worldfacts.py" in done.stderr


def test_the_tool_needs_no_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); "
        "import make_worldfacts; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
