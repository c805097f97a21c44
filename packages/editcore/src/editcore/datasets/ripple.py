"""RippleEdits: an edit as a sentence, and tests that count only if their conditions held before it.

A test has queries, of which one (``OR``) or all (``AND``) must be answered, and condition queries about facts that the
answers rest on. Every query also becomes a probe. The tests themselves are in the record's ``extra`` under ``chains``:
objects with ``kind``, ``needs`` (``any`` or ``all``), ``questions`` and ``conditions``, whose elements have ``prompt``
and ``answers``.

The file names subjects by Wikidata ids only. So the target is what follows the last " is " of the sentence, and the
subject is the longest text that the edited sentence shares with the queries about the same id, apart from the words of
the templates. Without such a query the record has no subject.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from editcore.datasets.fields import Fields, accepted_answers, as_object
from editcore.datasets.form import Format
from editcore.interfaces.errors import RequestError
from editcore.interfaces.values import EditRequest, FactRecord, Probe

__all__ = ["RIPPLEEDITS"]

_KINDS = {
    "Logical_Generalization": "portability.logical_generalization",
    "Subject_Aliasing": "portability.subject_aliasing",
    "Compositionality_I": "multihop.compositionality_i",
    "Compositionality_II": "multihop.compositionality_ii",
    "Relation_Specificity": "locality.relation_specificity",
    "Relation_Specifity": "locality.relation_specificity",
    "Forgetfulness": "locality.forgetfulness",
}
"""The kinds of the probes, by the names of the lists of tests. One of them is spelt in two ways."""

_OPENING = re.compile(r"the names? of the |the |was ", re.IGNORECASE)
_TEMPLATE_WORDS = frozenset(["of", "which", "is", "are", "in", "the", "was", "to", "by", "with"])


def _read(fields: Fields) -> list[FactRecord]:
    edit = as_object(fields["edit"], "edit")
    prompt, target = _parted(edit.text("prompt"))
    before = edit.first("original_fact", "previous_fact")
    true = None if before is None else _parted(as_object(edit[before], f"edit.{before}").text("prompt"))[1]
    chains = list(_chains(fields))
    subject = _subject(prompt, edit.get("subject_id"), fields)
    request = EditRequest.create(
        subject=subject,
        prompt=_with_place(prompt, subject),
        target_new=target,
        target_true=true,
        tags=accepted_answers(fields.get("example_type")),
    )
    asked = tuple(
        Probe(kind=chain["kind"], prompt=question["prompt"], answers=tuple(question["answers"]))
        for chain in chains
        for question in chain["questions"]
    )
    relation = edit.optional_text("relation")
    edit.read_all()  # the ids of Wikidata are not needed
    extra: Mapping[str, Any] = {"chains": chains} if chains else {}
    return [FactRecord(request=request, relation=relation, probes=asked, extra=extra)]


def _parted(sentence: str) -> tuple[str, str]:
    """The prompt and the object of a sentence such as ``The name of the mother of Ann is Eve.``"""
    prompt, found, target = sentence.removesuffix(".").rpartition(" is ")
    if not found:
        raise RequestError(f"The edit {sentence!r} has no ' is ', after which its object should be.")
    return f"{prompt} is", target


def _chains(fields: Fields) -> Iterator[dict[str, Any]]:
    for name, kind in _KINDS.items():
        for test in fields.objects(name):
            questions = _queries(test.objects("test_queries"))
            if questions:
                yield {
                    "kind": kind,
                    "needs": "all" if test.get("test_condition") == "AND" else "any",
                    "questions": questions,
                    "conditions": _queries(test.objects("condition_queries")),
                }


def _queries(found: Sequence[Fields]) -> list[dict[str, Any]]:
    """The queries that have a prompt and an answer."""
    queries = []
    for query in found:
        prompt = query.optional_text("prompt")
        answers: list[str] = []
        for answer in query.objects("answers"):
            answers += accepted_answers([answer.get("value"), answer.get("aliases")])
        if prompt and answers:
            queries.append({"prompt": prompt, "answers": list(dict.fromkeys(answers))})
        query.read_all()  # the ids and names of Wikidata are not needed
    return queries


def _subject(prompt: str, subject_id: object, fields: Fields) -> str:
    """The subject's name in the prompt; empty if no other query is about it."""
    others = {
        str(query["prompt"]).rstrip()
        for name in _KINDS
        for test in fields.raw.get(name) or ()
        for part in ("test_queries", "condition_queries")
        for query in test.get(part) or ()
        if query.get("subject_id") == subject_id and query.get("phrase") is None and query.get("prompt")
    } - {prompt}
    words = _inner(prompt)
    for other in sorted(others):
        words = _longest_common(words, _inner(other))
    while words and words[0].lower() in _TEMPLATE_WORDS:
        words = words[1:]
    while words and words[-1].lower() in _TEMPLATE_WORDS:
        words = words[:-1]
    name = " ".join(words)
    return name if others and name and prompt.count(name) == 1 else ""


def _inner(prompt: str) -> list[str]:
    """The words of a prompt between the opening of its template and its verb."""
    return _OPENING.sub("", prompt, count=1).removesuffix(" is").split()


def _longest_common(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The longest run of words that two texts share; the last one of several."""
    best: list[str] = []
    for start in range(len(first)):
        for begin in range(len(second)):
            length = 0
            while first[start + length : start + length + 1] == second[begin + length : begin + length + 1] != []:
                length += 1
            if length >= len(best):
                best = list(first[start : start + length])
    return best


def _with_place(prompt: str, subject: str) -> str:
    return prompt.replace(subject, "{}") if subject else prompt


RIPPLEEDITS = Format(
    title="RippleEdits",
    claims=lambda fields: isinstance(fields.raw.get("edit"), dict) and not fields.raw.keys().isdisjoint(_KINDS),
    read=_read,
)
