"""UnKE and HalluEditBench: the edit is a question with its answer, and further questions about it."""

from __future__ import annotations

from collections.abc import Iterator

from editcore.datasets import probes
from editcore.datasets.fields import Fields, accepted_answers, identity_of
from editcore.datasets.form import Format
from editcore.datasets.subjects import with_placeholder
from editcore.interfaces.errors import RequestError
from editcore.interfaces.values import EditRequest, FactRecord, Probe

__all__ = ["HALLUEDITBENCH", "UNKE"]

_HOPS = range(2, 7)
"""HalluEditBench asks questions of two to six hops."""


def _read_unke(fields: Fields) -> list[FactRecord]:
    """UnKE's long answer to a question. It names no subject. EditEverything has no paraphrase and no sub-questions."""
    answer = fields.answer("answer")
    request = EditRequest.create(
        prompt=fields.prompt("question"),
        target_new=answer,
        id=identity_of(fields),
    )
    asked = (*probes.of_kind("paraphrase", fields.texts("para_question"), answer), *_sub_questions(fields))
    return [FactRecord(request=request, relation=fields.optional_text("category"), probes=asked)]


def _sub_questions(fields: Fields) -> Iterator[Probe]:
    questions, answers = fields.texts("sub_question"), fields.texts("sub_answer")
    if len(questions) != len(answers):
        raise RequestError(
            f"There are {len(questions)} texts in 'sub_question' and {len(answers)} in 'sub_answer'; expected as many."
        )
    for question, answer in zip(questions, answers, strict=True):
        yield Probe(kind="portability.sub_question", prompt=question, answers=(answer,))


def _read_halluedit(fields: Fields) -> list[FactRecord]:
    """A row of HalluEditBench. What its models said (``output_...``) is left out: it is no answer of the model at hand.

    Departure: the choices stand after the question in one line, and the answer is the letter or the object.
    """
    subject, question, target = fields.text("subject"), fields.prompt("question"), fields.answer("object")
    spelling, template = with_placeholder(fields, subject, question)
    asked = [
        *probes.of_kind("paraphrase", fields.texts("paraphrased_question"), target),
        *probes.of_kind("generalization.yes", fields.texts("yes_question"), "Yes"),
        *probes.of_kind("generalization.no", fields.texts("no_question"), "No"),
    ]
    letters = accepted_answers(fields.get("multiple_choice_labels"))
    for choices in fields.texts("multiple_choice_with_letters"):
        prompt = f"{question} {choices}"
        asked.append(Probe(kind="generalization.multiple_choice", prompt=prompt, answers=(*letters, target)))
    asked += probes.of_kind("portability.reversed", fields.texts("reversed_relation_question"), subject)
    asked += probes.of_kind("locality", fields.texts("locality_question"), None)
    for hops in _HOPS:
        for prompt in fields.texts(f"question_{hops}hop"):
            answers = accepted_answers(fields.get(f"answer_{hops}hop"))
            asked.append(Probe(kind=f"multihop.{hops}_hops", prompt=prompt, answers=answers))
    request = EditRequest.create(
        subject=spelling,
        prompt=template,
        target_new=target,
        id=identity_of(fields),
        tags=accepted_answers(fields.get("topic")),
    )
    return [FactRecord(request=request, relation=fields.optional_text("relation"), probes=tuple(asked))]


UNKE = Format(
    title="UnKE",
    claims=lambda fields: (
        {"question", "answer"} <= fields.raw.keys() and fields.raw.keys().isdisjoint(("prompt", "target_new", "object"))
    ),
    read=_read_unke,
)
HALLUEDITBENCH = Format(
    title="HalluEditBench",
    claims=lambda fields: {"subject", "relation", "object", "question"} <= fields.raw.keys(),
    read=_read_halluedit,
)
