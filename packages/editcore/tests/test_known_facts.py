"""True facts, for tracing: from ROME's format and from records of edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from editcore import DatasetError, Plugins, UnknownNameError
from editcore.datasets import KnownFact, load_known_facts

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
KNOWN = {
    "known_id": 1,
    "subject": "Beats Music",
    "attribute": "Apple",
    "template": "{} is owned by",
    "prediction": " Apple, which",
    "prompt": "Beats Music is owned by ",
}
PLAIN = {"subject": "Rome", "prompt": "{} is the capital of", "target_new": "France", "target_true": "Italy"}


UNTRUE = {name: value for name, value in PLAIN.items() if name != "target_true"}


def load(path: Path | str, **more: Any) -> list[KnownFact]:
    return load_known_facts(path, plugins=Plugins.load(), **more)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_both_formats_may_share_a_file(tmp_path: Path) -> None:
    assert load(write(tmp_path / "facts.jsonl", KNOWN, PLAIN)) == [
        KnownFact("Beats Music", "Beats Music is owned by", "Apple"),
        KnownFact("Rome", "Rome is the capital of", "Italy"),
    ]


@pytest.mark.parametrize("dataset", [False, True])
@pytest.mark.usefixtures("toys")
def test_what_has_no_true_fact_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dataset: bool
) -> None:
    name = str(write(tmp_path / "facts.jsonl", PLAIN, UNTRUE))
    name, place = (f"toy-facts:{name}", "Record 2") if dataset else (name, "Line 2")
    notes: list[str] = []
    assert load(name, notes=notes) == [KnownFact("Rome", "Rome is the capital of", "Italy")]
    [note] = notes
    assert f": 1 record cannot be used and is left out. {place}: There is no true fact in it" in note
    assert caplog.text == ""
    load(name)
    assert note in caplog.text
    with pytest.raises(DatasetError, match=f"{place.lower()}: There is no true fact in it"):
        load(name, strict=True)


def test_a_data_set_gives_what_was_true_before() -> None:
    facts = load("worldfacts")
    assert facts[0] == KnownFact("Cebu", "The island of Cebu belongs to", "the Philippines")
    assert len(facts) > 400


@pytest.mark.usefixtures("toys")
def test_a_data_set_may_have_an_argument(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.jsonl", PLAIN)
    assert load(f"toy-facts:{path}") == [KnownFact("Rome", "Rome is the capital of", "Italy")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**KNOWN, "attribute": " "}, "line 1: The field 'attribute' must be a text, found ' '."),
        ({**KNOWN, "prompt": "It is owned by"}, "line 1: The subject 'Beats Music' is not in the prompt"),
        ({"attribute": "Apple"}, "line 1: The field 'subject' must be a text, found None."),
        ([], "line 1: A record must be an object, found list."),
        ({"case": 1}, "line 1: This is not an edit in a known format"),
        ({**PLAIN, "target_true": None}, "line 1: There is no true fact in it"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "facts.jsonl", record)
    with pytest.raises(DatasetError) as caught:
        load(path)
    assert message in str(caught.value)


def test_what_is_not_there() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'worldfacts'"):
        load("wordfacts")
    with pytest.raises(DatasetError, match=r"There is no file none\.json"):
        load("none.json")


def test_the_published_file() -> None:
    path = SHARED / "known_facts.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the development data is not here: {path.name}")
    facts = load(path)
    assert len(facts) == 1209
    assert all(fact.subject in fact.prompt for fact in facts)
