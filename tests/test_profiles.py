"""The committed ``profiles`` file against its tables, read here on their own, and its settings in runs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from editcore import FactRecord
from editcore.datasets import ProfilesHParams, check_records, load_profiles

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "make_profiles.py"
TABLES = ROOT / "tools" / "profiles"
DATA = ROOT / "packages" / "editcore" / "src" / "editcore" / "datasets" / "profiles.jsonl"

Tables = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def records() -> list[FactRecord]:
    return load_profiles(ProfilesHParams(facts_per_subject=5))


@pytest.fixture(scope="module")
def tables() -> Tables:
    return {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in (TABLES / "facts").glob("*.toml")}


def subject_of(record: FactRecord) -> str:
    return record.request.subject


def prompts_of(record: FactRecord, kind: str) -> list[str]:
    return [probe.prompt for probe in record.of_kind(kind)]


def by_subject(records: list[FactRecord]) -> dict[str, list[FactRecord]]:
    found: dict[str, list[FactRecord]] = {}
    for record in records:
        found.setdefault(subject_of(record), []).append(record)
    return found


def object_in(tables: Tables, relation: str, subject: str) -> str | None:
    """The object under which a table lists the subject."""
    objects = [target for target, subjects in tables[relation]["facts"].items() if subject in subjects]
    assert len(objects) <= 1, (relation, subject)
    return objects[0] if objects else None


def test_counts(records: list[FactRecord]) -> None:
    subjects = by_subject(records)
    assert len(subjects) == 40
    assert {len(facts) for facts in subjects.values()} == {5}
    kinds = Counter(facts[0].request.tags for facts in subjects.values())
    assert kinds == {
        ("company", "invented"): 14,
        ("person", "invented"): 14,
        ("company", "known"): 6,
        ("person", "known"): 6,
    }
    for facts in subjects.values():
        assert len({fact.relation for fact in facts}) == 5
        assert len({fact.request.tags for fact in facts}) == 1


def test_any_part_of_the_file_has_subjects_of_each_group(records: list[FactRecord]) -> None:
    groups = [facts[0].request.tags for facts in by_subject(records).values()]
    for first in range(len(groups) - 7):
        assert len(set(groups[first : first + 8])) == 4, first


def test_no_two_records_are_of_one_fact(records: list[FactRecord]) -> None:
    kept, notes = check_records(records)
    assert (len(kept), notes) == (len(records), [])


def test_objects_of_one_subject_are_all_different(records: list[FactRecord]) -> None:
    for subject, facts in by_subject(records).items():
        objects = [target for fact in facts for target in (fact.request.target_new, fact.request.target_true)]
        assert len(set(objects)) == 10, (subject, objects)


def test_objects_are_those_of_the_tables(records: list[FactRecord], tables: Tables) -> None:
    for record in records:
        request = record.request
        assert record.relation is not None
        objects = tables[record.relation]["facts"]
        assert request.target_new in objects
        assert request.target_true in objects
        listed = object_in(tables, record.relation, request.subject)
        assert listed == (request.target_true if "known" in request.tags else None), request


def test_objects_are_used_about_equally_often(records: list[FactRecord], tables: Tables) -> None:
    for relation, table in tables.items():
        own = [record for record in records if record.relation == relation]
        new = Counter(record.request.target_new for record in own)
        true = Counter(record.request.target_true for record in own if "invented" in record.request.tags)
        for used in (new, *([true] if true else [])):
            counts = [used[target] for target in table["facts"]]
            assert max(counts) - min(counts) <= 2, (relation, used)


@pytest.mark.parametrize("facts_per_subject", [1, 2, 3, 4, 5])
def test_two_thirds_of_the_prompts_begin_with_the_subject(facts_per_subject: int) -> None:
    chosen = load_profiles(ProfilesHParams(facts_per_subject=facts_per_subject))
    at_the_start = sum(record.request.prompt.startswith("{}") for record in chosen)
    assert 0.6 < at_the_start / len(chosen) < 0.73


@pytest.mark.parametrize(("facts_per_subject", "relations"), [(1, 10), (2, 11), (3, 11), (4, 11), (5, 11)])
def test_few_facts_are_of_all_relations_too(facts_per_subject: int, relations: int) -> None:
    chosen = load_profiles(ProfilesHParams(facts_per_subject=facts_per_subject))
    assert len({record.relation for record in chosen}) == relations


def test_the_other_prompts_stand_inside_a_text(records: list[FactRecord]) -> None:
    for record in records:
        before, _, after = record.request.prompt.partition("{}")
        assert after.startswith((" ", ",")), record.request.prompt
        assert before == "" or before.endswith(" "), record.request.prompt


def test_paraphrases_have_the_subject_at_the_start_and_in_the_middle(records: list[FactRecord]) -> None:
    for record in records:
        first, middle = prompts_of(record, "paraphrase")
        subject = subject_of(record)
        assert first.startswith(subject)
        assert f" {subject}" in middle
        assert not middle.endswith(subject)
        assert record.request.text not in (first, middle)
        assert all(probe.answers == (record.request.target_new,) for probe in record.of_kind("paraphrase"))


def test_no_prompt_contains_an_object(records: list[FactRecord]) -> None:
    for record in records:
        for prompt in (record.request.text, *(probe.prompt for probe in record.probes)):
            for target in (record.request.target_new, record.request.target_true):
                assert target is not None
                assert target.casefold() not in prompt.casefold(), (prompt, target)


def test_neighbours_have_the_true_object_and_are_never_edited(records: list[FactRecord], tables: Tables) -> None:
    edited = {subject_of(record).casefold() for record in records}
    for record in records:
        neighbours = record.of_kind("neighborhood")
        assert len({probe.prompt for probe in neighbours}) == len(neighbours) == 6
        before, after = record.request.prompt.split("{}")
        for probe in neighbours:
            assert probe.prompt.startswith(before)
            assert probe.prompt.endswith(after)
            name = probe.prompt[len(before) : len(probe.prompt) - len(after)]
            assert record.relation is not None
            assert object_in(tables, record.relation, name) == record.request.target_true
            assert probe.answers == (record.request.target_true,)
            assert name.casefold() not in edited


def test_the_same_subject_is_asked_what_no_fact_edits(records: list[FactRecord]) -> None:
    for subject, facts in by_subject(records).items():
        asked = {tuple(prompts_of(fact, "locality.same_subject")) for fact in facts}
        assert len(asked) == 1
        (prompts,) = asked
        assert len(set(prompts)) == 3
        assert all(subject in prompt for prompt in prompts)
        edited = {prompt for fact in facts for prompt in (fact.request.text, *prompts_of(fact, "paraphrase"))}
        assert edited.isdisjoint(prompts)
        assert all(not probe.answers for fact in facts for probe in fact.of_kind("locality"))


def test_an_object_follows_its_prompt_as_any_other_does(records: list[FactRecord]) -> None:
    for record in records:
        for target in (record.request.target_new, record.request.target_true):
            assert target is not None
            assert 1 <= len(target.split()) <= 3
            assert target.split()[0].casefold() not in ("a", "an", "the")
            for prompt in (record.request.text, *prompts_of(record, "paraphrase")):
                if prompt.endswith(" a"):
                    assert target[0] not in "aeiou", (prompt, target)
                assert not prompt.endswith(" an")


def test_invented_names_have_several_words_or_syllables_and_no_bearer_in_the_tables(
    records: list[FactRecord], tables: Tables
) -> None:
    real = {name for table in tables.values() for subjects in table["facts"].values() for name in subjects}
    for record in records:
        if "invented" in record.request.tags:
            assert subject_of(record) not in real
            assert len(subject_of(record)) >= 8


# The order


def test_subjects_follow_each_other() -> None:
    chosen = load_profiles(ProfilesHParams(facts_per_subject=2))
    groups = [(subject, len(list(facts))) for subject, facts in groupby(chosen, key=subject_of)]
    assert len(groups) == len(dict(groups)) == 40
    assert {count for _, count in groups} == {2}


def test_rounds_have_each_subject_once() -> None:
    chosen = load_profiles(ProfilesHParams(facts_per_subject=3, order="rounds"))
    names = list(dict.fromkeys(map(subject_of, chosen)))
    assert [subject_of(record) for record in chosen] == names * 3


@pytest.mark.parametrize(("facts_per_subject", "gap"), [(2, 2), (3, 4), (5, 10)])
def test_shuffled_facts_of_a_subject_are_far_apart(facts_per_subject: int, gap: int) -> None:
    chosen = load_profiles(ProfilesHParams(facts_per_subject=facts_per_subject, order="shuffled"))
    places: dict[str, list[int]] = {}
    for place, record in enumerate(chosen):
        places.setdefault(subject_of(record), []).append(place)
    between = [later - earlier - 1 for found in places.values() for earlier, later in pairwise(found)]
    assert min(between) >= gap
    assert sum(between) / len(between) > 25


def test_the_order_changes_nothing_else() -> None:
    def texts(**settings: Any) -> list[str]:
        return sorted(record.model_dump_json() for record in load_profiles(ProfilesHParams(**settings)))

    assert texts(order="subjects") == texts(order="rounds") == texts(order="shuffled") == texts()
    assert set(texts()) < set(texts(facts_per_subject=4))


# The script


def test_the_committed_file_is_what_the_tool_builds() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tables, to be changed."""
    copy = tmp_path / "profiles"
    (copy / "facts").mkdir(parents=True)
    for path in (TABLES / "subjects.toml", *(TABLES / "facts").glob("*.toml")):
        (copy / path.relative_to(TABLES)).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("subjects.toml", '"Quorvane"', '"Londoner Works"', "the subject 'Londoner Works' gives away 'London'"),
        ("subjects.toml", '"Quorvane"', '"Siemens"', "lists 'Siemens': True; subjects.toml says known: False"),
        ("subjects.toml", '"Quorvane"', '"Zephrane Labs"', "'Zephrane Labs' is listed more than once"),
        ("facts/company-city.toml", '"HSBC", "Barclays", "Burberry"', '"HSBC"', "'London' has 6 subjects"),
        ("facts/company-city.toml", '"Nikon", "Sony", "Hitachi", ', "", "'Tokyo' needs 6 subjects that are not edited"),
        ("facts/person-profession.toml", '"poet" =', '"the poet" =', "begins with an article"),
        ("facts/company-city.toml", '"Tokyo" =', '"tokyo" =', "begin with a capital letter and some do not"),
        ("facts/company-city.toml", '"{} has its', '"At {} it has its', "has its subject in the wrong place"),
        ("facts/person-profession.toml", '"poet" =', '"author" =', "does not fit every object"),
    ],
)
def test_the_tool_refuses_tables_that_break_a_rule(folder: Path, file: str, old: str, new: str, message: str) -> None:
    path = folder / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    command = [sys.executable, str(TOOL), "--facts", str(folder / "facts"), "--output", str(folder / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (folder / "out.jsonl").exists()


# In a run

Call = Callable[..., SimpleNamespace]


@pytest.fixture
def command(tiny_folder: Path, tiny_corpus: Path) -> list[object]:
    """A run of six facts in two batches, without a data set."""
    return [
        "run", "--editor", "emmet", "--model", tiny_folder, "--corpus", tiny_corpus, "--corpus-tokens", 2000,
        "--edits", 6, "--batch-size", 3, "--set", "layers=[1]", "--set", "v_num_grad_steps=2",
        "--set", "context_count=2", "--set", "context_length=3", "--set", "generation.elsewhere=9",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "subjects"),
    [
        (("--dataset", "profiles"), [3, 3]),
        (("--dataset", "profiles:2"), [2, 2, 2]),
        (("--dataset", "profiles", "--set", "profiles.facts_per_subject=5"), [5, 1]),
        (("--dataset", "profiles", "--set", "profiles.order=rounds"), [1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_run_edits_the_facts_that_are_asked_for(
    editctl: Call, command: list[object], tmp_path: Path, options: tuple[str, ...], subjects: list[int]
) -> None:
    done = editctl(*command, *options, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    lines = (tmp_path / "run" / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    edited = [FactRecord.model_validate_json(line) for line in lines]
    assert [len(list(facts)) for _, facts in groupby(edited, key=subject_of)] == subjects
    assert all({"company", "person"} & set(record.request.tags) for record in edited)


def test_the_other_questions_about_a_subject_count_as_unchanged(
    editctl: Call, command: list[object], tmp_path: Path
) -> None:
    assert editctl(*command, "--dataset", "profiles", "--out", tmp_path / "run").code == 0
    frame = pd.read_parquet(tmp_path / "run" / "results.parquet")
    unchanged = frame[(frame["metric"] == "unchanged") & (frame["phase"] == "after")]
    assert Counter(unchanged["kind"]) == {"neighborhood": 6 * 6, "locality.same_subject": 6 * 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "profiles:6"), "facts_per_subject"),
        (("--dataset", "profiles", "--set", "profiles.order=backwards"), "order"),
    ],
)
def test_a_wrong_setting_is_refused(
    editctl: Call, command: list[object], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = editctl(*command, *options, "--out", tmp_path / "run")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "run").exists()
