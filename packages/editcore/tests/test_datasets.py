"""Records from every format, and a sentence with file and line for everything that is wrong with one."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from editcore import (
    ComponentSpec,
    DatasetError,
    DatasetSpec,
    EditRequest,
    FactRecord,
    HParamsError,
    PluginError,
    Plugins,
    Probe,
    RequestError,
    UnknownNameError,
)
from editcore.datasets import (
    Selection,
    check_records,
    check_requests,
    content_hash,
    dataset_settings,
    is_path,
    load_records,
    load_worldfacts,
    parse_record,
    short_name,
)
from editcore.datasets.fields import Unread
from editcore.evaluation import chains_of
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"

COUNTERFACT = {
    "case_id": 18,
    "pararel_idx": 3603,
    "requested_rewrite": {
        "prompt": "{}, created by",
        "relation_id": "P176",
        "target_new": {"str": "Honda", "id": "Q9584"},
        "target_true": {"str": "Porsche", "id": "Q40993"},
        "subject": "Porsche 911",
    },
    "paraphrase_prompts": ["Porsche 911 is developed by", "Porsche 911, developed by"],
    "neighborhood_prompts": ["Porsche 550, developed by "],
    "attribute_prompts": ["Honda 70, produced by"],
    "generation_prompts": ["Porsche 911 is sold by"],
}
PLAIN = {"subject": "Rome", "prompt": "{} is the capital of", "target_new": "France", "target_true": "Italy"}


class Registry:
    """Data sets by name, without any plugin."""

    def __init__(self, **targets: str) -> None:
        self._specs = {name: DatasetSpec(name, target=target, summary="") for name, target in targets.items()}

    def datasets(self) -> Mapping[str, DatasetSpec]:
        return self._specs

    def dataset(self, name: str) -> DatasetSpec:
        if name not in self._specs:
            raise UnknownNameError("data set", name, self._specs)
        return self._specs[name]

    def components(self, kind: str) -> Mapping[str, ComponentSpec]:
        return {}


REGISTRY = Registry(worldfacts="editcore.datasets:load_worldfacts")


def load(path: Path | str, *, notes: list[str] | None = None, **selected: Any) -> list[FactRecord]:
    return load_records(path, plugins=REGISTRY, notes=notes, selection=Selection(**selected))


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def only(fields: Mapping[str, Any]) -> FactRecord:
    (record,) = parse_record(fields)
    return record


def prompts(record: FactRecord, kind: str) -> tuple[str, ...]:
    return tuple(probe.prompt for probe in record.of_kind(kind))


def test_counterfact() -> None:
    record = only(COUNTERFACT)
    assert record.request == EditRequest(
        subject="Porsche 911", prompt="{}, created by", target_new="Honda", target_true="Porsche", id="18"
    )
    assert record.relation == "P176"
    assert record.probes == (
        Probe(kind="paraphrase", prompt="Porsche 911 is developed by", answers=("Honda",)),
        Probe(kind="paraphrase", prompt="Porsche 911, developed by", answers=("Honda",)),
        Probe(kind="neighborhood", prompt="Porsche 550, developed by", answers=("Porsche",)),  # no space at the end
        Probe(kind="generation", prompt="Porsche 911 is sold by"),
    )


def test_mquake_gives_one_record_per_edit_and_asks_the_chain_of_the_last() -> None:
    rewrite: Any = COUNTERFACT["requested_rewrite"]
    first, last = parse_record(
        {
            "case_id": 7,
            "requested_rewrite": [{**rewrite, "question": "Who makes the Porsche 911?"}, rewrite],
            "questions": ["Who founded the maker of the Porsche 911?", "Whose is it?"],
            "new_answer": "Soichiro Honda",
            "new_answer_alias": ["Honda Soichiro", "Soichiro Honda"],
            "new_single_hops": [
                {"question": "Who makes the Porsche 911?", "answer": "Honda", "answer_alias": ["Honda Motor"]},
                {"question": "Made by?", "cloze": "Porsche 911, created by", "answer": "Honda"},
                {"question": "Who founded Honda?", "cloze": "Honda was founded by", "answer": "Soichiro Honda"},
            ],
        }
    )
    assert [first.request.id, last.request.id] == ["7-0", "7-1"]
    assert first.probes == (Probe(kind="paraphrase.question", prompt="Who makes the Porsche 911?", answers=("Honda",)),)
    answers = ("Soichiro Honda", "Honda Soichiro")
    assert last.probes == (
        Probe(kind="multihop", prompt="Who founded the maker of the Porsche 911?", answers=answers),
        Probe(kind="multihop", prompt="Whose is it?", answers=answers),
        Probe(kind="multihop.single.edited", prompt="Who makes the Porsche 911?", answers=("Honda", "Honda Motor")),
        Probe(kind="multihop.single.edited", prompt="Made by?", answers=("Honda",)),
        Probe(kind="multihop.single.unedited", prompt="Who founded Honda?", answers=("Soichiro Honda",)),
    )
    assert last.of_kind("multihop") == last.probes
    assert last.of_kind("multi") == ()
    assert first.extra == {}
    (chain,) = chains_of(last)
    assert chain == chains_of(last.model_copy(update={"extra": {}}))[0]  # what the probes say by themselves


def test_a_fact_that_several_chains_write_keeps_the_questions_of_all() -> None:
    def edits(case: int, *targets: str) -> list[FactRecord]:
        rewrites = [
            {"prompt": "{} is led by", "subject": f"City {number}", "target_new": {"str": target}, "question": "Who?"}
            for number, target in enumerate(targets)
        ]
        question = f"Who leads in case {case}?"
        return parse_record(
            {"case_id": case, "requested_rewrite": rewrites, "questions": [question], "new_answer": targets[-1]}
        )

    records = [*edits(1, "Ann", "Bob"), *edits(2, "Eve", "Bob"), *edits(3, "Cid", "Bob", "Dan"), *edits(4, "Cid")]
    kept, notes = check_records(records)
    asked = {record.request.text: [chain.questions[0].prompt for chain in chains_of(record)] for record in kept}
    assert asked == {  # the edit of City 1 comes last in case 3, which asks nothing of it itself
        "City 0 is led by": ["Who leads in case 4?"],
        "City 1 is led by": ["Who leads in case 1?", "Who leads in case 2?"],
        "City 2 is led by": ["Who leads in case 3?"],
    }
    assert len(notes) == 2
    assert check_records(kept) == (kept, [])
    contradicting = [*edits(1, "Ann"), *edits(2, "Eve")]
    assert [len(chains_of(record)) for record in check_records(contradicting)[0]] == [1]


def test_plain_with_and_without_braces() -> None:
    filled = {**PLAIN, "prompt": "Rome is the capital of"}
    assert only(PLAIN) == only(filled)
    assert only({**PLAIN, "relation": "capital"}).relation == "capital"
    assert only({**PLAIN, "prompt": "In Romeo's Rome, Rome, unlike Romeo, is in"}).request.prompt == (
        "In Romeo's Rome, {}, unlike Romeo, is in"
    )
    assert only({**PLAIN, "prompt": "The Romes"}).request.prompt == "The {}s"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"rephrase_kind": "paraphrase"}, ("Rome lies in",)),
        ({"rephrase_kind": "generation"}, ()),
        ({}, ("Rome lies in",)),
        # EasyEdit's CounterFact, whose rephrase prompts are openings, and WikiBigEdit, which has no true answers
        ({"locality_prompt": "Milan is in", "locality_ground_truth": "Italy", "ground_truth": "Italy"}, ()),
        ({"locality_prompt": "Milan is in", "locality_ground_truth": "Italy"}, ("Rome lies in",)),
        # zsRE in the same shape, whose neighbours ask about something else
        ({"locality_prompt": "Who sang", "locality_ground_truth": "Bo", "ground_truth": "Italy"}, ("Rome lies in",)),
    ],
)
def test_a_rephrase_prompt_counts_only_where_it_is_a_paraphrase(extra: dict[str, str], expected: tuple[str]) -> None:
    assert prompts(only({**PLAIN, "rephrase_prompt": "Rome lies in", **extra}), "paraphrase") == expected


def test_a_locality_prompt_is_a_neighbour_only_with_the_true_object() -> None:
    fields = {**PLAIN, "locality_prompt": "Milan is in"}
    neighbour = Probe(kind="neighborhood", prompt="Milan is in", answers=("Italy",))
    assert only(fields).probes == (neighbour,)
    assert only({**fields, "locality_ground_truth": "Italy"}).probes == (neighbour,)
    assert only({**fields, "locality_ground_truth": "Spain"}).probes == (
        Probe(kind="locality", prompt="Milan is in", answers=("Spain",)),
    )


def test_zsre_writes_the_counterfactual_answer() -> None:
    fields = {
        "subject": "Watts Humphrey", "src": "What university did Watts Humphrey attend?", "pred": "Trinity College",
        "rephrase": "Where did Watts Humphrey study?", "alt": "University of Michigan",
        "answers": ["Illinois Institute of Technology"], "loc": "nq question: who played desmond", "loc_ans": "Carter",
        "cond": "a >> b || c",
    }  # fmt: skip
    record = only(fields)
    assert record.request.prompt == "What university did {} attend?"
    assert record.request.target_new == "University of Michigan"
    assert record.request.target_true == "Illinois Institute of Technology"
    assert record.probes == (
        Probe(kind="paraphrase", prompt="Where did Watts Humphrey study?", answers=("University of Michigan",)),
        Probe(kind="locality", prompt="nq question: who played desmond", answers=("Carter",)),
    )
    taught = only({key: value for key, value in fields.items() if key != "alt"})
    assert taught.request.target_new == "Illinois Institute of Technology"
    assert taught.request.target_true is None


def test_knowedit() -> None:
    record = only(
        {
            "subject": "Rome",
            "prompt": "The country of Rome is",
            "target_new": "France",
            "ground_truth": [["Italy"]],
            "portability": {"Reasoning": [{"prompt": "p", "ground_truth": "g"}]},
            "locality": {
                "Relation_Specificity": [
                    {"prompt": "The country that Rome is in is", "ground_truth": [["Italy"], ["IT", "Italy"]]},
                    {"prompt": "The mayor of Rome is", "ground_truth": "someone"},
                ]
            },
        }
    )
    assert record.request.target_true == "Italy"
    assert record.probes == (
        Probe(kind="portability.reasoning", prompt="p", answers=("g",)),
        Probe(kind="locality.relation_specificity", prompt="The country that Rome is in is", answers=("Italy", "IT")),
        Probe(kind="locality.relation_specificity", prompt="The mayor of Rome is", answers=("someone",)),
    )
    bio = only({"concept": "Ada", "text": "This is a passage about Ada.", "labels": "Ada was a poet.", "locality": {}})
    assert bio.request.prompt == "This is a passage about {}."
    assert bio.request.target_new == "Ada was a poet."


def test_fastedit() -> None:
    record = only({"prompt": "{} is in", "subject": "Rome", "target": "France", "queries": ["Where is Rome?"]})
    assert record.request.target_new == "France"
    assert record.probes == (Probe(kind="generation", prompt="Where is Rome?"),)


def test_qaedit() -> None:
    record = only(
        {
            "subject": "Rome", "prompt": "Where is Rome?", "target": "France", "rephrase": "Rome lies where?",
            "locality": [{"loc": "who wrote it", "loc_ans": ["Carter", "J. Carter"]}],
        }
    )  # fmt: skip
    assert record.request.prompt == "Where is {}?"
    assert record.probes == (
        Probe(kind="paraphrase", prompt="Rome lies where?", answers=("France",)),
        Probe(kind="locality", prompt="who wrote it", answers=("Carter", "J. Carter")),
    )


@pytest.mark.parametrize("target", ["target", "target_new"])
def test_neighbours_may_be_prompts_with_targets(target: str) -> None:
    unread = Unread()
    neighbours = [
        {"prompt": "Who wrote it?", "target": "Carter", "source": "NQ"},
        {"prompt": "Who sang it?", "ground_truth": ["Bo", "Bo B."]},
        {"question": "Who?"},
    ]
    fields = {"subject": "Rome", "prompt": "Where is Rome?", target: "France", "rephrase": "Rome lies where?"}
    (record,) = parse_record({**fields, "locality": neighbours}, unread)
    assert record.probes == (
        Probe(kind="paraphrase", prompt="Rome lies where?", answers=("France",)),
        Probe(kind="locality", prompt="Who wrote it?", answers=("Carter",)),
        Probe(kind="locality", prompt="Who sang it?", answers=("Bo", "Bo B.")),
    )
    assert unread == {"locality.source": 1, "locality.question": 1}


def test_wikibigedit_as_it_was_published() -> None:
    unread = Unread()
    fields = {
        "tag": "new", "subject": "Rome", "update": "In which country is Rome?", "ans": "France",
        "rephrase": "Rome belongs to which country?", "personas": "Yo, where's Rome at?", "mhop": "Who rules it?",
        "mhop_ans": "A president", "loc": "In which country is Oslo?", "loc_ans": "Norway", "relation_id": "P17",
    }  # fmt: skip
    (record,) = parse_record(fields, unread)
    assert record.request == EditRequest(subject="Rome", prompt="In which country is {}?", target_new="France")
    assert record.relation == "P17"
    assert record.probes == (
        Probe(kind="paraphrase", prompt="Rome belongs to which country?", answers=("France",)),
        Probe(kind="paraphrase.personas", prompt="Yo, where's Rome at?", answers=("France",)),
        Probe(kind="multihop", prompt="Who rules it?", answers=("A president",)),
        Probe(kind="locality", prompt="In which country is Oslo?", answers=("Norway",)),
    )
    assert unread == {"tag": 1}


def test_questions_may_come_as_lists_beside_their_answers() -> None:
    lists = {"prompt": ["Its mayor is", "Its river is"], "ground_truth": ["Bo", ["Po", "Padus"]]}
    record = only({**PLAIN, "portability": {"Reasoning": lists}, "locality": {"Other": {"prompt": "Oslo is in"}}})
    assert record.probes == (
        Probe(kind="portability.reasoning", prompt="Its mayor is", answers=("Bo",)),
        Probe(kind="portability.reasoning", prompt="Its river is", answers=("Po", "Padus")),
        Probe(kind="locality.other", prompt="Oslo is in"),
    )


@pytest.mark.parametrize(
    ("subject", "prompt", "there"),
    [
        ("rome", "Where is Rome?", "Rome"),
        ("Zu\u0308rich", "In Z\xfcrich is", "Z\xfcrich"),
        ("Z\xfcrich", "In Zu\u0308rich is", "Zu\u0308rich"),
        ("New York", "The new  york\xa0mayor is", "new  york"),
        ("\uff32ome", "Where is Rome?", "Rome"),
        ("\u1112\u1161\u11ab", "\ud55c\uc774", "\ud55c"),  # Hangul, which has no spaces before endings
        ("STRASSE", "Die Stra\xdfe ist", "Stra\xdfe"),
    ],
)
def test_a_subject_is_found_in_another_spelling_and_told(subject: str, prompt: str, there: str, tmp_path: Path) -> None:
    fields = {"subject": subject, "prompt": prompt, "target_new": "x"}
    path, notes = write(tmp_path / "f.jsonl", PLAIN, fields), []
    record = load(path, notes=notes)[1]
    assert (record.request.subject, record.request.text) == (there, prompt)
    (note,) = notes
    assert note.startswith(f"{path}: 1 subject is spelt otherwise than in the prompt, by case, Unicode form or spaces")
    assert "line 2 (" in note
    assert repr(there) in note
    with pytest.raises(DatasetError, match=r"line 2: The subject .* is not in the prompt"):
        load(path, strict=True)
    with pytest.raises(RequestError, match="is not in the prompt"):
        parse_record(fields)


def test_a_respelt_subject_of_counterfact_is_told_once() -> None:
    rewrite = {**COUNTERFACT["requested_rewrite"], "prompt": "PORSCHE 911, created by"}  # type: ignore[dict-item]
    respelt: list[tuple[str, str]] = []
    [record] = parse_record({**COUNTERFACT, "requested_rewrite": rewrite}, respelt=respelt)
    assert record.request.subject == "PORSCHE 911"
    assert respelt == [("Porsche 911", "PORSCHE 911")]


@pytest.mark.parametrize(
    ("subject", "prompt"), [("Ada", "Canada is"), ("cafe", "The caf\xe9 is"), ("e", "Cafe\u0301 I")]
)
def test_another_spelling_is_no_part_of_another_word(subject: str, prompt: str) -> None:
    with pytest.raises(RequestError, match="is not in the prompt"):
        parse_record({"subject": f"{subject.upper()}", "prompt": prompt, "target_new": "x"}, respelt=[])


def unlike(number: int) -> dict[str, str]:
    return {**PLAIN, "prompt": f"City {number} is in"}


def test_what_cannot_be_edited_is_left_out_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    lines = [json.dumps(unlike(number)) for number in range(11)]
    path.write_text("\n".join([json.dumps(PLAIN), "{", "[1", *lines, json.dumps({**PLAIN, "id": "last"})]))
    notes: list[str] = []
    assert [request.id for request in (record.request for record in load(path, notes=notes))][1:] == ["last"]
    (note,) = notes
    assert note.startswith(f"{path}: 13 records cannot be used and are left out. Line 2: This is not JSON (")
    assert "line 4: The subject 'Rome' is not in the prompt 'City 0 is in'; write {}" in note
    assert "'City 7 is in'" in note
    assert "'City 8 is in'" not in note
    assert note.endswith("; and 3 more.")
    with pytest.raises(DatasetError) as caught:
        load(path, strict=True)
    assert str(caught.value).startswith(f"{path}: 13 records cannot be used. Line 2: ")
    assert str(caught.value).endswith("; and 3 more.")


def test_equal_faults_are_named_together(tmp_path: Path) -> None:
    path, notes = write(tmp_path / "f.jsonl", {"a": 1}, PLAIN, {"a": 2}), []
    load(path, notes=notes)
    assert notes[0].startswith(f"{path}: 2 records cannot be used and are left out. Lines 1, 3: This is not an edit")


def test_what_is_left_out_is_logged_where_nobody_takes_notes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(write(tmp_path / "f.jsonl", PLAIN, {"a": 2}))
    assert "1 record cannot be used and is left out. Line 2:" in caplog.text


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_nothing_behind_the_records_that_are_asked_for_is_looked_at(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"facts{suffix}"
    good = [{**PLAIN, "id": str(number)} for number in range(3)]
    if suffix == ".csv":
        rows = ["id,subject,prompt,target_new", "x,Rome,Paris is in,y", *(f"{n},Rome,Rome is in,x" for n in range(3))]
        path.write_bytes("\n".join(rows).encode() + b"\n\xff,1,2,3,4\n")
    else:
        texts = [json.dumps(record) for record in ({**PLAIN, "prompt": "Paris is in"}, *good)]
        text = "\n".join(texts) if suffix == ".jsonl" else f"[{','.join(texts)},"
        path.write_bytes(text.encode() + b'\n{"broken: \xff')
    notes: list[str] = []
    assert [record.request.id for record in load(path, first=3, notes=notes)] == ["0", "1", "2"]
    assert len(notes) == 1
    assert "1 record cannot be used and is left out" in notes[0]
    with pytest.raises(DatasetError, match=r"line [12]: The subject 'Rome' is not in the prompt 'Paris is in'"):
        load(path, first=1, strict=True)


def test_a_strict_reader_looks_at_no_more_records_than_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", {"a": 1}, {"a": 2}, PLAIN)
    with pytest.raises(DatasetError, match="line 1: This is not an edit"):
        load(path, first=1, strict=True)


def test_a_file_of_which_nothing_can_be_edited_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", {"a": 1}, {**PLAIN, "target_new": ""})
    message = (
        r"none of its 2 records can be used\. Line 1: This is not an edit .*; line 2: The field 'target_new' is empty"
    )
    with pytest.raises(DatasetError, match=message):
        load(path)


def test_a_request_may_be_refused_by_the_reader(tmp_path: Path) -> None:
    def refuse(request: EditRequest) -> str | None:
        return None if request.subject else "It names no subject."

    without = {"prompt": "It rains in", "target_new": "spring", "colour": "grey"}
    path, notes = write(tmp_path / "f.jsonl", without, PLAIN), []
    assert load(path, refuse=refuse, notes=notes) == [only(PLAIN)]
    assert notes == [f"{path}: 1 record cannot be used and is left out. Line 1: It names no subject."]
    with pytest.raises(DatasetError, match=r"line 1: It names no subject\."):
        load(path, refuse=refuse, strict=True)
    everything = load("worldfacts")
    name, notes = everything[1].request.id, []
    some = load(
        "worldfacts", refuse=lambda request: "Not this one." if request.id == name else None, first=2, notes=notes
    )
    assert some == [everything[0], everything[2]]
    assert notes == ["The data set 'worldfacts': 1 record cannot be used and is left out. Record 2: Not this one."]


def test_probes_as_we_write_them() -> None:
    given = [{"kind": "consistency", "prompt": "Is Rome in France?", "answers": ["Yes"]}]
    assert only({**PLAIN, "probes": given}).probes == (
        Probe(kind="consistency", prompt="Is Rome in France?", answers=("Yes",)),
    )
    for bad, message in (("text", "'probes' is str"), ([1], r"'probes\[0\]' is int"), ([{"kind": "a"}], "'prompt'")):
        with pytest.raises(RequestError, match=message):
            parse_record({**PLAIN, "probes": bad})


OF_A_RUN = FactRecord(
    request=EditRequest(subject="Rome", prompt="{} is in", target_new="France", id="case-7-2", tags=("a", "b")),
    relation="P17",
    probes=(Probe(kind="portability.reasoning", prompt="p", answers=("x", "y")), Probe(kind="generation", prompt="q")),
    extra={"hops": [1, {"weight": 0.5}], "none": None},
)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_the_records_of_a_run_are_read_as_they_are(tmp_path: Path, suffix: str) -> None:
    bare = FactRecord(request=EditRequest(prompt="It rains in", target_new="spring"))
    lines = [record.model_dump_json() for record in (OF_A_RUN, bare)]
    path = tmp_path / f"requests{suffix}"
    path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]", encoding="utf-8")
    notes: list[str] = []
    found = load_records(path, plugins=REGISTRY, notes=notes)
    assert found == [OF_A_RUN, bare]
    assert content_hash(found) == content_hash([OF_A_RUN, bare])
    assert notes == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe": []}, "This is not a record of a run. probe: Extra inputs are not permitted."),
        ({"relation": 17}, "relation: Input should be a valid string"),
        ({"extra": [1]}, "extra: Input should be a valid dictionary"),
        ({"request": {}}, "request.prompt: Field required"),
        ({"request": {"prompt": "{} is", "target_new": "x"}}, "request: the prompt '{} is' has a place for a subject"),
        ({"request": {"prompt": "It is", "target_new": "x", "id": 7}}, "request.id: Input should be a valid string"),
        ({"probes": [{"kind": "Paraphrase", "prompt": "p"}]}, "probes.0.kind: String should match pattern"),
    ],
)
def test_a_record_of_a_run_that_is_wrong_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        parse_record({**json.loads(OF_A_RUN.model_dump_json()), **change})


def test_a_text_called_request_makes_no_record_of_a_run() -> None:
    assert only({**PLAIN, "request": "please"}).request.target_new == "France"


@pytest.mark.parametrize("extra", [{"a": float("nan")}, {"a": [{"b": float("inf")}]}, {"a": {1, 2}}, {1: "a"}])
def test_what_is_beside_the_fact_is_json(extra: Any) -> None:
    with pytest.raises(ValidationError, match="extra"):
        FactRecord(request=OF_A_RUN.request, extra=extra)


def test_records_may_be_kept_in_a_set() -> None:
    again = FactRecord.model_validate_json(OF_A_RUN.model_dump_json())
    assert {OF_A_RUN, again, OF_A_RUN.model_copy(update={"extra": {}})} == {
        OF_A_RUN,
        OF_A_RUN.model_copy(update={"extra": {}}),
    }


def test_the_hash_is_of_what_the_records_hold_and_of_their_order() -> None:
    rain = FactRecord(request=EditRequest(prompt="It rains in", target_new="spring"))
    changed = [
        [OF_A_RUN],
        [rain, OF_A_RUN],
        [OF_A_RUN.model_copy(update={"extra": {"hops": [2]}}), rain],
        [OF_A_RUN.model_copy(update={"probes": ()}), rain],
        [OF_A_RUN.model_copy(update={"request": OF_A_RUN.request.model_copy(update={"id": "8"})}), rain],
    ]
    hashes = {content_hash(records) for records in ([OF_A_RUN, rain], *changed)}
    assert len(hashes) == 1 + len(changed)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
    turned = {"none": None, "hops": [1, {"weight": 0.5}]}
    assert content_hash([OF_A_RUN.model_copy(update={"extra": turned})]) == content_hash([OF_A_RUN])


def test_fields_that_no_format_reads_are_counted_and_told(tmp_path: Path) -> None:
    unread = Unread()
    for fields in (COUNTERFACT, {**PLAIN, "colour": "red"}, {**PLAIN, "colour": "", "size": 3}):
        parse_record(fields, unread)
    assert unread == {"pararel_idx": 1, "attribute_prompts": 1, "colour": 1, "size": 1}
    path, notes = write(tmp_path / "facts.jsonl", {**PLAIN, "colour": "red"}, {**PLAIN, "colour": "blue"}), []
    load_records(path, plugins=REGISTRY, notes=notes)
    assert notes == [f"{path}: fields that are not used: colour (in 2)."]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"facts{suffix}"
    second = {**PLAIN, "subject": "Zürich", "target_true": ""}
    if ".jsonl" in suffix:
        text = "\n".join(json.dumps(fields, ensure_ascii=False) for fields in (PLAIN, second)) + "\n\n"
    elif ".json" in suffix:
        text = "\ufeff" + json.dumps([PLAIN, second], indent=1)
    else:
        text = "subject,prompt,target_new,target_true\nRome,{} is the capital of,France,Italy\n"
        text += 'Zürich,"{} is the capital of",France,\n'
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if suffix.endswith(".gz") else data)
    first, zurich = load(str(path))
    assert first == only(PLAIN)
    assert zurich.request.subject == "Zürich"
    assert zurich.request.target_true is None


def test_worldfacts_by_name() -> None:
    records = load("worldfacts")
    assert records == load_worldfacts()
    assert len(records) >= 400
    assert len({record.request.id for record in records}) == len(records)
    assert check_records(records)[1] == []


def test_ids_are_unique(tmp_path: Path) -> None:
    numbered = {**PLAIN, "case_id": 4}
    records = load(
        write(tmp_path / "f.jsonl", numbered, {**numbered, "target_new": "Spain"}, PLAIN, PLAIN, {**PLAIN, "id": "4-2"})
    )
    ids = [record.request.id for record in records]
    assert len(set(ids)) == 5
    assert ids[:2] == ["4", "4-2"]


@pytest.mark.parametrize("more", [{}, {"subject": ""}, {"subject": None}])
def test_a_flat_record_may_have_no_subject(tmp_path: Path, more: dict[str, object]) -> None:
    [record] = load(write(tmp_path / "f.jsonl", {"prompt": "It rains in", "target_new": "spring", **more}))
    request = record.request
    assert (request.subject, request.prompt, request.text) == ("", "It rains in", "It rains in")


BROKEN: list[tuple[object, str]] = [
    ({**PLAIN, "target_new": " "}, "The field 'target_new' is empty."),
    ({**PLAIN, "target_new": None}, "The field 'target_new' is empty."),
    (
        {"subject": "Rome", "prompt": "{} is in", "colour": "x"},
        "There is no target; with 'prompt' it should be in target_new, target or labels; the fields with "
        "something in them are: subject, prompt, colour.",
    ),
    (
        {"src": "Where is Rome?", "subject": "Rome"},
        "There is no target; with 'src' it should be in alt or answers",
    ),
    ({"update": "Where is Rome?", "object": "x"}, "There is no target; with 'update' it should be in ans; "),
    ({"text": "Rome", "target": "x"}, "There is no target; with 'text' it should be in labels or target_new; "),
    (
        {"target_new": "x", "subject": ""},
        "There is no prompt; it should be in prompt, src, update or text; the fields with ",
    ),
    (
        {"requested_rewrite": {"prompt": "{} is", "subject": "a", "target_new": {"id": "Q1"}}},
        r"The field 'target_new' has no text: it is dict \({'id': 'Q1'}\).",
    ),
    ({"prompt": "{} is in", "target_new": "x"}, "the prompt '{} is in' has a place for a subject, {}, and no subject"),
    ({**PLAIN, "subject": 5}, r"The field 'subject' is int \(5\); expected text."),
    ({**PLAIN, "prompt": "Paris is in"}, "The subject 'Rome' is not in the prompt 'Paris is in'; write {} where"),
    ({**PLAIN, "prompt": "{} and {} are in"}, "must contain {} exactly once"),
    ({**PLAIN, "paraphrase_prompts": [1]}, "The field 'paraphrase_prompts' is list"),
    (
        {"known_id": 0, "attribute": "x"},
        "This is not an edit in a known format; the fields with something in them are: known_id, attribute",
    ),
    ({"requested_rewrite": "x"}, "The field 'requested_rewrite' is str"),
    ({"requested_rewrite": {"prompt": "{} is"}}, "The field 'subject' is missing"),
    ([PLAIN], "A record must be an object, found list"),
    ({**PLAIN, "locality_prompt": 5}, r"The field 'locality_prompt' is int \(5\); expected a list of texts."),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_a_broken_record_is_named_by_file_and_line(tmp_path: Path, record: object, message: str) -> None:
    message = message.replace("{}", r"\{\}")
    path = write(tmp_path / "facts.jsonl", PLAIN, record)
    with pytest.raises(DatasetError, match=rf"facts\.jsonl, line 2: .*{message}"):
        load(path, strict=True)
    array = tmp_path / "facts.json"
    array.write_text(f"[\n{json.dumps(PLAIN)}\n\n,\n{json.dumps(record, indent=2)}\n]")
    with pytest.raises(DatasetError, match=rf"facts\.json, line 5: .*{message}"):
        load(array, strict=True)
    for file, line in ((path, 2), (array, 5)):
        notes: list[str] = []
        assert load(file, notes=notes) == [only(PLAIN)]
        assert re.search(rf"^{file}: 1 record cannot be used and is left out\. Line {line}: .*{message}", notes[0])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "f.jsonl",
            b'{"a": 1}\n{"subject": \n',
            "f.jsonl: none of its 2 records can be used. Line 1: This is not an edit",
        ),
        (
            "f.jsonl",
            json.dumps(PLAIN).encode() + b'\n\n{"subject": \n',
            r"f.jsonl, line 3: This is not JSON \(Expecting",
        ),
        ("f.jsonl", b"1" * 5000, "f.jsonl, line 1: This is not JSON"),
        ("f.jsonl", b"[" * 100_000, r"f.jsonl, line 1: This is not JSON \(nested too deeply"),
        ("f.json", b"[" * 100_000, r"f.json, line 1: this is not JSON"),
        ("f.json", b'[\n{"subject" 1}]', r"f.json, line 2: this is not JSON \(Expecting ':' delimiter, column 12"),
        ("f.json", b'{"subject": 1}', "f.json, line 1: a .json file must be an array"),
        ("f.json", b"[" + json.dumps(PLAIN).encode() + b"\n x", "f.json, line 2: .*a comma or ] is missing"),
        ("f.json", b"[" + json.dumps(PLAIN).encode() + b"\n", "f.json, line 2: .*a comma or ] is missing"),
        ("f.json", b"[" + json.dumps(PLAIN).encode() + b",\n", "f.json, line 2: this is not JSON"),
        ("f.csv", b"subject,prompt,target_new\nRome,{} is,x,y\n", "f.csv, line 2: It has more cells than"),
        ("f.csv", b'subject,prompt\n"Rome" x,{} is\n', "f.csv, line 2: this is not CSV"),
        ("f.jsonl", b"\n", "f.jsonl: there are no records in it."),
        ("f.jsonl", json.dumps(PLAIN).encode() + b'\n"\xff"', "f.jsonl, line 2: This is not UTF-8 text"),
        ("f.jsonl.gz", b"{}", "this is not a complete gzip file"),
        ("f.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "this is not a complete gzip file"),
        ("f.txt", b"", "files of type '.txt' are not read. Use .jsonl, .json, .csv, .tsv, .md"),
        ("f.tsv", b"Rome\t{} is\n", "f.tsv, line 1: It has 2 cells; a row has 3 or 4: subject, prompt, target_new"),
        ("f.tsv", b"subject\tprompt\ttarget_new\nRome\t{} is\tx\ty\n", "f.tsv, line 2: It has 4 cells; its first row"),
        ("f.tsv", b'Rome;{} is;x\nOslo;"a"b;y\n', "f.tsv, line 2: this is not a table"),
        ("f.md", b"| Rome | {} is | x |\n| Oslo | Paris is | y |\n", "f.md, line 2: The subject 'Oslo' is not in the"),
        ("f.tsv", b"Rome\t{} is\tx\nOslo\t{} is\t\xff\n", "f.tsv, line 2: This is not UTF-8 text"),
        ("f.pkl", b"\x80\x04N.", "files of type '.pkl' are not read"),
    ],
)
def test_a_broken_file_has_a_sentence(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DatasetError, match=message):
        load(tmp_path / name, strict=True)


_PASTED = {
    "tabs": "Rome\tRome is in\tItaly\tFrance\n\nOslo\t{} is in\tNorway\n",
    "tabs and names": "Subject\tPrompt\tTarget new\tTarget true\t\nRome\t{} is in\tItaly\tFrance\t\n"
    "Oslo\t{} is in\tNorway",
    "semicolons": "\ufeffRome;{} is in;Italy;France\r\nOslo;{} is in;Norway;\r\n",
    "commas": "Rome,{} is in,Italy,France\nOslo,{} is in,Norway\n",
    "other order": "prompt;target-new;subject;target-true\n{} is in;Italy;Rome;France\n{} is in;Norway;Oslo;\n",
    "markdown": "| subject | prompt | target_new | target_true |\n|:--|---|---|--:|\n"
    "| Rome | {} is in | Italy | France |\n| Oslo | {} is in | Norway | |\n",
    "markdown without names": "| Rome | {} is in | Italy | France |\n| Oslo | {} is in | Norway |\n",
    "markdown without edges": "subject | prompt | target_new | target_true\n--- | --- | --- | ---\n"
    "Rome | {} is in | Italy | France\nOslo | {} is in | Norway",
    "JSON lines": '{"subject": "Rome", "prompt": "{} is in", "target_new": "Italy", "target_true": "France"}\n'
    '{"subject": "Oslo", "prompt": "{} is in", "target_new": "Norway"}',
    "JSON": '[{"subject": "Rome", "prompt": "{} is in", "target_new": "Italy", "target_true": "France"},'
    '{"subject": "Oslo", "prompt": "{} is in", "target_new": "Norway"}]',
}


@pytest.mark.parametrize("pasted", _PASTED.values(), ids=_PASTED)
def test_facts_are_pasted_as_they_come(pasted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(pasted.encode())))
    found = [record.request for record in load(Path("-"))]
    assert [(request.subject, request.prompt, request.target_new, request.target_true) for request in found] == [
        ("Rome", "{} is in", "Italy", "France"),
        ("Oslo", "{} is in", "Norway", None),
    ]


def test_a_quote_in_a_pasted_cell_is_a_quote(tmp_path: Path) -> None:
    (tmp_path / "f.tsv").write_text('Tolkien\t"The Hobbit" was written by {}\tin\tOxford\nRome\t{} is in\t"a\tb"\n')
    (tmp_path / "g.md").write_text("| Rome | a \\| b: {} is in | Italy |\n")
    hobbit, _ = load(tmp_path / "f.tsv")
    assert hobbit.request.prompt == '"The Hobbit" was written by {}'
    assert load(tmp_path / "g.md")[0].request.prompt == "a | b: {} is in"


def test_a_csv_file_may_have_semicolons(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("subject;prompt;target_new\nRome;{} is, since 753,;Italy\n")
    assert load(tmp_path / "f.csv")[0].request.prompt == "{} is, since 753,"


def test_what_is_wrong_with_a_pasted_row_names_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Rome\t{} is in\tItaly\nOslo\t{} is\n")))
    with pytest.raises(DatasetError, match="standard input, line 2: It has 2 cells"):
        load(Path("-"), strict=True)


def test_a_small_archive_of_a_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editcore.datasets.files.MAX_BYTES", 1 << 20)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b" " * (2 << 20)))
    with pytest.raises(DatasetError, match="more than 1 MiB of text"):
        load(tmp_path / "f.jsonl.gz")


def test_names_and_files_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown data set 'worldfact'.*Did you mean 'worldfacts'\?"):
        load("worldfact")
    with pytest.raises(DatasetError, match=r"There is no file worldfact\.jsonl\. .*Did you mean 'worldfacts'\?"):
        load("worldfact.jsonl")
    with pytest.raises(DatasetError, match="is a folder"):
        load(tmp_path)


# Data sets of packages


@pytest.fixture
def offered(toys: Any) -> Plugins:
    """With the data sets of the toys."""
    return Plugins.load()


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write(tmp_path / "three.jsonl", *({**PLAIN, "id": name} for name in "abc"))


def test_an_argument_sets_one_hyperparameter_and_sections_the_others(offered: Plugins, three: Path) -> None:
    records = load_records(f"toy-facts:{three}", plugins=offered)
    assert [record.request.id for record in records] == ["a", "b", "c"]
    assert [record.extra for record in records] == [
        {"hops": [number, {"weight": 0.5}], "label": "plain"} for number in range(3)
    ]
    settings = {"toy-facts": {"most": 2, "label": "x"}, "other": {"most": 1}}
    records = load_records(f"toy-facts:{three}", plugins=offered, settings=settings)
    assert [record.extra["label"] for record in records] == ["x", "x"]
    assert load_records("toy-facts", plugins=offered, settings={"toy-facts": {"file": str(three), "most": 2}}) != []
    # A number stays a number, and a text that looks like one a text.
    few = dataset_settings("toy-few:2", {"toy-few": {"file": str(three)}}, plugins=offered)
    assert few is not None
    assert few.model_dump() == {"file": str(three), "most": 2, "label": "plain"}
    numbered = dataset_settings("toy-facts:2024", {}, plugins=offered)
    assert numbered is not None
    assert numbered.model_dump()["file"] == "2024"
    assert dataset_settings("worldfacts", {}, plugins=offered) is None
    assert dataset_settings(str(three), {}, plugins=offered) is None


def test_an_argument_and_its_setting_may_say_the_same(offered: Plugins, three: Path) -> None:
    settings = {"toy-few": {"file": str(three), "most": 2}}
    assert len(load_records("toy-few:2", plugins=offered, settings=settings)) == 2


@pytest.mark.parametrize(
    ("dataset", "given", "message"),
    [
        ("worldfacts:dev", {}, "The data set 'worldfacts' takes no argument; found 'worldfacts:dev'."),
        ("toy-facts", {}, "toy-facts: file is required (text)"),
        ("toy-facts:f", {"labl": "x"}, "toy-facts: unknown setting 'labl'. It has: file, label, most."),
        ("toy-few:many", {"file": "f"}, 'toy-few: most = "many" has the wrong type. Expected: int'),
        (
            "toy-few:2",
            {"file": "f", "most": 3},
            "The data set is 'toy-few:2', and toy-few.most is set to 3; leave one of the two out.",
        ),
    ],
)
def test_wrong_settings_of_a_data_set(offered: Plugins, dataset: str, given: dict[str, object], message: str) -> None:
    settings = {dataset.partition(":")[0]: given}
    with pytest.raises(HParamsError, match=re.escape(message)):
        load_records(dataset, plugins=offered, settings=settings)


def test_an_unknown_data_set_with_an_argument_is_named(offered: Plugins) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown data set 'toy-fact'.*Did you mean 'toy-facts'\?"):
        load_records("toy-fact:dev", plugins=offered)
    with pytest.raises(DatasetError, match=r"There is no file toy-fact:some/dev\.json\. .*Did you mean 'toy-facts'\?"):
        load_records("toy-fact:some/dev.json", plugins=offered)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("worldfacts", False),
        ("worldfact:dev", False),
        ("toy-facts:some/where.jsonl", False),
        ("toy-fact:some/where.jsonl", True),
        ("facts.jsonl", True),
        ("some/toy-facts:dev", True),
    ],
)
def test_a_registered_name_before_a_colon_makes_a_data_set(offered: Plugins, name: str, path: bool) -> None:
    assert is_path(name, offered) is path


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("worldfacts", "worldfacts"),
        ("some/where/facts.v2.jsonl", "facts.v2.jsonl"),
        ("toy-facts:dev", "toy-facts:dev"),
        ("toy-facts:some/where", "toy-facts:some/where"),
        ("./odd:names/facts.jsonl", "facts.jsonl"),
    ],
)
def test_the_short_name_is_for_titles(name: str, short: str) -> None:
    assert short_name(name) == short


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (
            "toy-subclassed",
            DatasetError,
            "The data set 'toy-subclassed' returned something other than a FactRecord (Labelled); fields of its own "
            "belong in a FactRecord's 'extra'.",
        ),
        ("toy-dicts", DatasetError, "The data set 'toy-dicts' returned something other than a FactRecord (dict); "),
        ("toy-nothing", DatasetError, "The data set 'toy-nothing': there are no records in it."),
        ("toy-broken", PluginError, "The data set 'toy-broken' cannot be loaded: ZeroDivisionError: no luck."),
    ],
)
def test_a_data_set_that_does_not_return_records(
    offered: Plugins, dataset: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        load_records(dataset, plugins=offered)


def test_an_argument_needs_hyperparameters() -> None:
    with pytest.raises(ValueError, match="'a' has the argument 'split' and no hyperparameters"):
        DatasetSpec("a", target="b:c", argument="split", summary="")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["subject", "prompt", "target_new", "requested_rewrite", "src", "alt", "answers", "target",
                         "locality", "rephrase_prompt", "paraphrase_prompts", "ground_truth", "case_id", "labels",
                         "portability", "probes", "loc", "loc_ans", "new_single_hops", "questions", "new_answer",
                         "request", "relation", "extra", "update", "ans", "mhop", "mhop_ans", "rephrase", "text"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=4),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["str", "prompt", "target", "a"]), inner),
            max_leaves=6,
        ),
    )
)  # fmt: skip
def test_nothing_but_a_sentence_comes_of_nonsense(fields: dict[str, object]) -> None:
    with contextlib.suppress(RequestError):
        assert all(isinstance(record, FactRecord) for record in parse_record(fields, Unread(), respelt=[]))


def request(subject: str, target: str, *, id: str = "") -> EditRequest:
    return EditRequest(subject=subject, prompt="{} is in", target_new=target, id=id)


def test_contradicting_requests_are_reported_and_the_last_wins() -> None:
    asked = [request("Rome", "France", id="1"), request("Oslo", "Peru", id="2"), request("Rome", "Spain", id="3")]
    kept, notes = check_requests(asked)
    assert kept == asked[1:]
    assert notes == [
        "2 requests contradict each other about 'Rome is in' (subject 'Rome'): 'France' (1), 'Spain' (3). "
        "The last is kept: 'Spain'."
    ]


def test_repeated_requests_collapse() -> None:
    asked = [request("Rome", "France", id="1"), request("Rome", "France", id="2")]
    kept, notes = check_requests(asked)
    assert kept == [asked[1]]
    assert notes == ["2 requests ask the same of 'Rome is in' (subject 'Rome'): 'France'. One is kept."]
    assert check_requests(kept) == (kept, [])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), max_size=12), st.integers())
def test_kept_requests_are_the_last_of_each_fact(pairs: list[tuple[str, str]], seed: int) -> None:
    asked = [request(subject, target, id=str(index)) for index, (subject, target) in enumerate(pairs)]
    random.Random(seed).shuffle(asked)
    kept, notes = check_requests(asked)
    last = {entry.fact_key: entry for entry in asked}
    assert {entry.fact_key: entry for entry in kept} == last
    assert kept == [entry for entry in asked if last[entry.fact_key] is entry]
    repeated = [key for key in last if sum(entry.fact_key == key for entry in asked) > 1]
    assert len(notes) == len(repeated)


def test_loading_needs_no_torch() -> None:
    code = (
        "import sys; from editcore.datasets import load_worldfacts; load_worldfacts(); "
        "print([name for name in ('torch', 'pandas', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "records", "kinds", "contradicting", "facts"),
    [
        ("counterfact_dev", 819, {"paraphrase": 819 * 2, "neighborhood": 819 * 10, "generation": 819 * 10}, 1, 818),
        ("counterfact_flat_dev", 10_960, {"paraphrase": 1_898, "neighborhood": 10_960}, 83, 10_843),
        ("zsre_mend_dev", 500, {"paraphrase": 500, "portability.reasoning": 500, "locality": 500}, 0, 500),
        (
            "zsre_knowedit_dev",
            300,
            {
                "paraphrase": 300,
                "portability.reasoning": 167,
                "portability.subject_aliasing": 69,
                "portability.logical_generalization": 64,
                "locality.relation_specificity": 600,
            },
            1,
            299,
        ),
        (
            "knowedit_wiki_counterfact_dev",
            300,
            {
                "portability.reasoning": 116,
                "portability.subject_aliasing": 299,
                "portability.logical_generalization": 64,
                "locality.relation_specificity": 274,
                "locality.forgetfulness": 161,
            },
            0,
            300,
        ),
        (
            "knowedit_wiki_recent_dev",
            300,
            {
                "portability.reasoning": 216,
                "portability.subject_aliasing": 25,
                "portability.logical_generalization": 102,
                "locality.relation_specificity": 900,
                "locality.forgetfulness": 164,
            },
            0,
            300,
        ),
        ("mquake_dev", 800, {"paraphrase.question": 800, "multihop": 600, "multihop.single.edited": 800}, 0, None),
        ("qaedit_dev", 500, {"paraphrase": 500, "locality": 2_500}, 0, 500),
        ("wikibigedit_dev", 750, {"paraphrase": 750, "locality": 750}, 0, 750),
    ],
)
def test_the_published_files(
    name: str, records: int, kinds: dict[str, int], contradicting: int, facts: int | None
) -> None:
    path = SHARED / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the development data is not here: {path.name}")
    found = load(path)
    assert len(found) == records
    assert Counter(probe.kind for record in found for probe in record.probes) == kinds
    assert len({record.request.id for record in found}) == records
    kept, notes = check_records(found)
    assert sum("contradict" in note for note in notes) == contradicting
    if facts is not None:
        assert len(kept) == facts


@pytest.mark.parametrize("name", ["known_facts", "counterfact_portability_dev"])
def test_published_files_that_hold_no_edits(name: str) -> None:
    path = SHARED / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the development data is not here: {path.name}")
    with pytest.raises(DatasetError, match=rf"{name}\.jsonl\.gz: none of its [0-9,]+ records can be used\. Lines 1, "):
        load(path)
