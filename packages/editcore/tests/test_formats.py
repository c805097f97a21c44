"""Formats of question sets and of tests with conditions, conventions that users are told, and formats of plugins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from editcore import ComponentSpec, EditRequest, FactRecord, PluginError, Plugins, Probe, RequestError
from editcore.datasets import Fields, Format, load_records, parse_record
from editcore.datasets.fields import Unread
from editcore.datasets.formats import BUILT_IN, FORMAT, formats_of
from editcore.plugins import resolve

UNKE = {
    "id": 3,
    "question": "What does Ada do?",
    "para_question": "What is Ada's job?",
    "answer": "Ada writes poems. She has done so for a decade.",
    "sub_question": ["What does Ada write?", "For how long?"],
    "sub_answer": ["Poems.", "A decade."],
}
HALLU = {
    "topic": "places_city", "subject": "Rome", "relation": "country", "object": "France",
    "question": "What is the country of Rome?", "output_some_model": "Italy", "eval_some_model": "0.0",
    "multiple_choices": "['France', 'Italy']", "paraphrased_question": "In which country is Rome?",
    "multiple_choice_with_letters": "A. Italy B. France", "multiple_choice_labels": "B",
    "yes_question": "Is Rome in France?", "no_question": "Is Rome in Italy?", "locality_question": "Where is Oslo?",
    "reversed_relation_question": "What is in France?", "question_2hop": "Who rules it?", "answer_2hop": "A president",
    "question_6hop": "And after six?", "answer_6hop": "Who knows",
}  # fmt: skip


def query(prompt: str, *answers: str, about: str = "Q1", **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt, "answers": [{"value": answers[0], "aliases": list(answers[1:])}], "query_type": "regular",
        "subject_id": about, "relation": "MOTHER", "target_ids": ["Q9"], "phrase": None, **more,
    }  # fmt: skip


RIPPLE = {
    "example_type": "counter_fact",
    "edit": {
        "prompt": "The name of the mother of Ann of Kent is Eve Day.", "subject_id": "Q1", "relation": "MOTHER",
        "target_id": "Q2",
        "original_fact": {"prompt": "The name of the mother of Ann of Kent is Joan.", "subject_id": "Q1"},
    },
    "Relation_Specificity": [
        {"test_queries": [query("The name of the father of Ann of Kent is", "Bob")], "test_condition": "OR"}
    ],
    "Compositionality_I": [
        {
            "test_queries": [
                query("The name of the country which the mother of Ann of Kent is a citizen of is", "Peru", phrase="x"),
                query("The name of the land of the mother of Ann of Kent is", "Peru", "Perú", phrase="y"),
            ],
            "test_condition": "AND",
            "condition_queries": [query("The name of the country of citizenship of Eve Day is", "Peru", about="Q2")],
        }
    ],
    "Forgetfulness": [],
}  # fmt: skip


def only(fields: Mapping[str, Any]) -> FactRecord:
    (record,) = parse_record(fields)
    return record


def test_unke_asks_for_long_answers_and_names_no_subject() -> None:
    record = only(UNKE)
    assert record.request == EditRequest(prompt=UNKE["question"], target_new=UNKE["answer"], id="3")
    assert record.probes == (
        Probe(kind="paraphrase", prompt="What is Ada's job?", answers=(str(UNKE["answer"]),)),
        Probe(kind="portability.sub_question", prompt="What does Ada write?", answers=("Poems.",)),
        Probe(kind="portability.sub_question", prompt="For how long?", answers=("A decade.",)),
    )
    everything = only({"id": 1, "question": "1 + 1?", "answer": "It is 2.", "category": "maths"})
    assert (everything.relation, everything.probes) == ("maths", ())
    with pytest.raises(RequestError, match="There are 2 texts in 'sub_question' and 1 in 'sub_answer'"):
        parse_record({**UNKE, "sub_answer": ["Poems."]})


def test_hallueditbench_has_ten_kinds_of_questions() -> None:
    unread = Unread()
    (record,) = parse_record(HALLU, unread)
    assert record.request == EditRequest(
        subject="Rome", prompt="What is the country of {}?", target_new="France", tags=("places_city",)
    )
    assert record.relation == "country"
    assert [(probe.kind, probe.prompt, probe.answers) for probe in record.probes] == [
        ("paraphrase", "In which country is Rome?", ("France",)),
        ("generalization.yes", "Is Rome in France?", ("Yes",)),
        ("generalization.no", "Is Rome in Italy?", ("No",)),
        ("generalization.multiple_choice", "What is the country of Rome? A. Italy B. France", ("B", "France")),
        ("portability.reversed", "What is in France?", ("Rome",)),
        ("locality", "Where is Oslo?", ()),
        ("multihop.2_hops", "Who rules it?", ("A president",)),
        ("multihop.6_hops", "And after six?", ("Who knows",)),
    ]
    assert unread == {"output_some_model": 1, "eval_some_model": 1, "multiple_choices": 1}


def test_rippleedits_finds_subject_and_object_in_its_sentences() -> None:
    unread = Unread()
    (record,) = parse_record(RIPPLE, unread)
    assert record.request.subject == "Ann of Kent"
    assert record.request.prompt == "The name of the mother of {} is"
    assert (record.request.target_new, record.request.target_true) == ("Eve Day", "Joan")
    assert (record.relation, record.request.tags) == ("MOTHER", ("counter_fact",))
    assert [(probe.kind, probe.answers) for probe in record.probes] == [
        ("multihop.compositionality_i", ("Peru",)),
        ("multihop.compositionality_i", ("Peru", "Perú")),
        ("locality.relation_specificity", ("Bob",)),
    ]
    chain, other_chain = record.extra["chains"]  # type: ignore[misc]
    assert (chain["needs"], other_chain["needs"]) == ("all", "any")  # type: ignore[index, call-overload]
    assert chain["conditions"] == [  # type: ignore[index, call-overload]
        {"prompt": "The name of the country of citizenship of Eve Day is", "answers": ["Peru"]}
    ]
    assert not unread


def test_rippleedits_without_another_question_about_its_subject_names_none() -> None:
    record = only({**RIPPLE, "Relation_Specificity": []})
    assert (record.request.subject, record.request.text) == ("", "The name of the mother of Ann of Kent is")
    with pytest.raises(RequestError, match="has no ' is '"):
        parse_record({**RIPPLE, "edit": {"prompt": "Ann of Kent was born to Eve."}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "Rome is in", "subject": "Rome", "attribute": "Italy"}, "This is a true fact for tracing"),
        (
            {"case_id": 1, "subject": "Rome", "portability": {}},
            "These are further questions about a CounterFact record",
        ),
    ],
)
def test_records_that_are_no_edits_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_record(fields)


ZSRE = {"subject": "Ada", "src": "Where did Ada study?", "answers": ["Kent"], "loc": "q", "loc_ans": "a"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({**ZSRE, "alt": "Yale"}, "the edit writes the counterfactual answer"),
        ({**ZSRE, "src": None, "prompt": "Where did Ada study?", "target_new": "Yale"}, "the counterfactual answer"),
        (ZSRE, "the edit writes answers[0], the true answer"),
        ({"subject": "Ada", "prompt": "Ada is", "target_new": "x", "locality": {}}, "ask the edited fact itself"),
        ({"subject": "Ada", "prompt": "Ada is", "target_new": "x"}, None),
    ],
)
def test_conventions_of_a_format_are_told_once(tmp_path: Path, fields: dict[str, Any], told: str | None) -> None:
    line = json.dumps({name: value for name, value in fields.items() if value is not None})
    path, notes = tmp_path / "f.jsonl", list[str]()
    path.write_text(f"{line}\n{line}\n", encoding="utf-8")
    load_records(path, plugins=Plugins.load(), notes=notes)
    conventions = [note for note in notes if "fields that are not used" not in note]
    assert [told in note for note in conventions if told] == [True] * bool(told)
    assert len(conventions) == bool(told)


# Formats of plugins


def _read_triples(fields: Fields) -> list[FactRecord]:
    subject, target = fields.text("s"), fields.text("o")
    return [FactRecord(request=EditRequest.create(subject=subject, prompt="{} is in", target_new=target))]


TRIPLES = Format(title="triples", claims=lambda fields: {"s", "o"} <= fields.raw.keys(), read=_read_triples)
NO_FORMAT = {"title": "nothing"}


class Components:
    def __init__(self, target: str) -> None:
        self._spec = ComponentSpec("triples", f"{__name__}:{target}", kind=FORMAT, summary="")

    def components(self, kind: str) -> Mapping[str, ComponentSpec]:
        return {"triples": self._spec} if kind == FORMAT else {}


def test_a_format_of_a_plugin_is_asked_first() -> None:
    formats = formats_of(Components("TRIPLES"))
    assert formats == (TRIPLES, *BUILT_IN)
    line = {"s": "Rome", "o": "France", "prompt": "Rome is in", "target_new": "Italy"}
    assert [record.request.target_new for record in parse_record(line, formats=formats)] == ["France"]
    assert only(line).request.target_new == "Italy"


def test_what_is_no_format_is_refused() -> None:
    with pytest.raises(PluginError, match="The format 'triples' is of type dict; expected a Format"):
        formats_of(Components("NO_FORMAT"))


def test_every_format_of_editcore_is_announced_in_its_order() -> None:
    announced = [resolve(spec.target) for spec in Plugins.load().components(FORMAT).values()]
    assert tuple(announced) == BUILT_IN
