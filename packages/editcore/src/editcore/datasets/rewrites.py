"""CounterFact and MQuAKE: one edit with its questions, or the edits of a chain with the questions about it."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import JsonValue

from editcore.datasets import probes
from editcore.datasets.fields import Fields, accepted_answers, as_object, identity_of, without_last_space
from editcore.datasets.form import Format
from editcore.datasets.subjects import with_placeholder
from editcore.interfaces.errors import RequestError
from editcore.interfaces.values import EditRequest, FactRecord, Probe

__all__ = ["COUNTERFACT", "MQUAKE"]


def _read_counterfact(fields: Fields) -> list[FactRecord]:
    rewrite = as_object(fields["requested_rewrite"], "requested_rewrite")
    record = _rewrite(rewrite, (), identity_of(fields))
    asked = (
        *_question(rewrite),
        *probes.of_kind("paraphrase", _published(fields.texts("paraphrase_prompts")), record.request.target_new),
        *probes.of_kind("neighborhood", _published(fields.texts("neighborhood_prompts")), record.request.target_true),
        *probes.of_kind("generation", _published(fields.texts("generation_prompts")), None),
    )
    template = fields.optional_text("question")  # of worldfacts: the edited prompt as a question, with {} in it
    extra = {"question": template} if template is not None and "{}" in template else {}
    return [record.model_copy(update={"probes": asked, "extra": extra})]


def _read_mquake(fields: Fields) -> list[FactRecord]:
    """A record for each edit of a chain. The questions about the chain belong to its last edit, after which the whole
    chain is written."""
    parts = fields.objects("requested_rewrite")
    case_id = identity_of(fields)
    if not parts:
        raise RequestError("The field 'requested_rewrite' is an empty list; it holds the edits of a chain.")
    records = [
        _rewrite(part, tuple(_question(part)), f"{case_id}-{index}" if case_id else "")
        for index, part in enumerate(parts)
    ]
    hops = tuple(_hops(fields, edited={*_edited_questions(parts, records)}))
    extra = {"chains": [chain]} if (chain := _chain(hops)) else {}
    last = records[-1]
    return [*records[:-1], last.model_copy(update={"probes": (*last.probes, *hops), "extra": extra})]


def _rewrite(rewrite: Fields, asked: tuple[Probe, ...], case_id: str) -> FactRecord:
    subject = rewrite.text("subject")
    prompt = without_last_space(rewrite.prompt("prompt"))
    target_new = rewrite.answer("target_new")
    target_true = rewrite.optional_answer("target_true")
    subject, template = with_placeholder(rewrite, subject, prompt)
    return FactRecord(
        request=EditRequest.create(
            subject=subject, prompt=template, target_new=target_new, target_true=target_true, id=case_id
        ),
        relation=rewrite.optional_text("relation_id"),
        probes=asked,
    )


def _question(rewrite: Fields) -> Iterator[Probe]:
    """The edit as a question, which MQuAKE and AKEW's CounterFact have."""
    if (question := rewrite.optional_prompt("question")) is not None:
        yield Probe(kind="paraphrase.question", prompt=question, answers=(rewrite.answer("target_new"),))


def _edited_questions(parts: list[Fields], records: list[FactRecord]) -> Iterator[str]:
    """The edits of a chain as questions and as statements, as its single hops have them."""
    for part, record in zip(parts, records, strict=True):
        yield record.request.text
        if (question := part.raw.get("question")) is not None:
            yield str(question)


def _hops(fields: Fields, *, edited: set[str]) -> Iterator[Probe]:
    """MQuAKE's multi-hop questions, and the single hops that lead to their answers."""
    answers = accepted_answers([fields.get("new_answer"), fields.get("new_answer_alias")])
    for question in _published(fields.texts("questions")):
        yield Probe(kind="multihop", prompt=question, answers=answers)
    for part in fields.objects("new_single_hops"):
        accepted = accepted_answers([part.get("answer"), part.get("answer_alias")])
        question, statement = part.text("question"), part.get("cloze")
        is_edited = question in edited or statement in edited
        yield Probe(
            kind="multihop.single.edited" if is_edited else "multihop.single.unedited",
            prompt=question,
            answers=accepted,
        )


def _chain(hops: tuple[Probe, ...]) -> dict[str, JsonValue]:
    """The questions and hops as one chain, as the records of other formats have theirs; empty without a question."""

    def asked(kind: str) -> list[JsonValue]:
        found = (probe for probe in hops if probe.kind == kind and probe.answers)
        return [{"prompt": probe.prompt, "answers": list(probe.answers)} for probe in found]

    questions = asked("multihop")
    conditions, edited = asked("multihop.single.unedited"), asked("multihop.single.edited")
    return {"kind": "multihop", "questions": questions, "conditions": conditions, "edited": edited} if questions else {}


def _published(prompts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(without_last_space, prompts))


COUNTERFACT = Format(
    title="CounterFact",
    claims=lambda fields: "requested_rewrite" in fields and not isinstance(fields.raw["requested_rewrite"], list),
    read=_read_counterfact,
)
MQUAKE = Format(
    title="MQuAKE", claims=lambda fields: isinstance(fields.raw.get("requested_rewrite"), list), read=_read_mquake
)
