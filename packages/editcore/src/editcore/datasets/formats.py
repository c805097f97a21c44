"""The formats in which facts are published, recognised by their fields.

| format | prompt | what to write |
|---|---|---|
| CounterFact, multi_counterfact, MQuAKE | ``requested_rewrite`` (an object, or in MQuAKE a list of them) | in it |
| plain, EasyEdit's CounterFact, KnowEdit, WikiBigEdit as EasyEdit has it | ``prompt`` | ``target_new`` |
| FastEdit, QAEdit | ``prompt`` | ``target`` |
| zsRE | ``src`` | ``alt``, or else ``answers`` |
| WikiBigEdit as it was published | ``update`` | ``ans`` |
| KnowEdit's WikiBio | ``text`` | ``labels`` |
| a run's ``requests.jsonl`` | ``request``, an object | in it |

A prompt has a ``{}`` where the subject goes, or the subject itself, which then becomes the ``{}``. White space at its
ends is part of it. One exception: in CounterFact, MQuAKE and zsRE, a space at the end of a prompt is the space before
the answer, and is dropped.

Every question of a record becomes a probe, whose kind says what it tests. Fields that no format reads are counted by
name (:class:`Unread`), also fields inside others (``requested_rewrite.fact_new``), so that a caller can report what was
left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from editcore.datasets import probes
from editcore.datasets.fields import Fields, Unread, accepted_answers, as_object, join_of, listed
from editcore.datasets.subjects import mention_of
from editcore.interfaces.errors import RequestError
from editcore.interfaces.values import EditRequest, FactRecord, Probe, first_problem

__all__ = ["parse_record", "without_last_space"]

_TARGETS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("target_new", "target", "labels"),
    "src": ("alt", "answers"),
    "update": ("ans",),
    "text": ("labels", "target_new"),
}
"""For each field that may hold a flat record's prompt, the fields that may hold its target. The first one that is not
empty counts."""
_TRUE = ("target_true", "ground_truth", "answers")
"""Fields that may hold a flat record's true object."""


def parse_record(
    fields: Mapping[str, Any], unread: Unread | None = None, *, respelt: list[tuple[str, str]] | None = None
) -> list[FactRecord]:
    """The facts of one published record: one, or several for MQuAKE's chains of edits.

    Args:
        unread: a counter to which the fields that no format reads are added.
        respelt: a list to which each subject is added that differs from its spelling in the prompt only by case,
            Unicode form or spaces, together with that spelling. The request then has the spelling of the prompt. Left
            out, such a subject is not found.

    Raises:
        RequestError: the format is not recognised, a field is missing or has the wrong type, the subject is not in the
            prompt, or a target is empty.
    """
    respelt_here: list[tuple[str, str]] | None = None if respelt is None else []
    remembered = Fields(fields, respelt_here)
    records = _parse(remembered)
    if unread is not None:
        unread.update(list(remembered.unread()))
    if respelt is not None and respelt_here is not None:
        respelt += respelt_here
    return records


def _parse(fields: Fields) -> list[FactRecord]:
    if isinstance(fields.raw.get("request"), Mapping):
        return [_from_run(fields)]
    if "requested_rewrite" in fields:
        return _from_counterfact(fields)
    if not fields.raw.keys().isdisjoint((*_TARGETS, "target_new", "labels")):
        return [_from_flat(fields)]
    raise RequestError(
        f"This is not an edit in a known format; {fields.described()}. An edit has prompt, target_new and, for most "
        "editors, subject, or is a CounterFact, zsRE, KnowEdit, MQuAKE, WikiBigEdit, QAEdit or FastEdit record."
    )


def _from_run(fields: Fields) -> FactRecord:
    """A line of a run's ``requests.jsonl``, which is a record in editcore's own form."""
    try:
        return FactRecord.model_validate(fields.read_all())
    except ValidationError as error:
        raise RequestError(f"This is not a record of a run. {first_problem(error)}.") from error


def _from_counterfact(fields: Fields) -> list[FactRecord]:
    rewrites = fields["requested_rewrite"]
    case_id = _identity(fields)
    if isinstance(rewrites, list):  # MQuAKE: edits that one multi-hop question needs
        parts = fields.objects("requested_rewrite")
        if not parts:
            raise RequestError("The field 'requested_rewrite' is an empty list; it holds the edits of a chain.")
        records = [
            _rewrite(part, tuple(_question(part)), f"{case_id}-{index}" if case_id else "")
            for index, part in enumerate(parts)
        ]
        # The questions about the chain belong to its last edit, after which the whole chain is written.
        return [*records[:-1], records[-1].model_copy(update={"probes": (*records[-1].probes, *_hops(fields))})]
    rewrite = as_object(rewrites, "requested_rewrite")
    record = _rewrite(rewrite, (), case_id)
    asked = (
        *_question(rewrite),
        *probes.of_kind("paraphrase", _published(fields.texts("paraphrase_prompts")), record.request.target_new),
        *probes.of_kind("neighborhood", _published(fields.texts("neighborhood_prompts")), record.request.target_true),
        *probes.of_kind("generation", _published(fields.texts("generation_prompts")), None),
    )
    return [record.model_copy(update={"probes": asked})]


def _rewrite(rewrite: Fields, asked: tuple[Probe, ...], case_id: str) -> FactRecord:
    subject = rewrite.text("subject")
    prompt = without_last_space(rewrite.prompt("prompt"))
    target_new = rewrite.answer("target_new")
    target_true = rewrite.optional_answer("target_true")
    subject, template = _with_placeholder(rewrite, subject, prompt)
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


def _hops(fields: Fields) -> Iterator[Probe]:
    """MQuAKE's multi-hop questions, and the single hops that lead to their answers, edited or not."""
    answers = accepted_answers([fields.get("new_answer"), fields.get("new_answer_alias")])
    for question in _published(fields.texts("questions")):
        yield Probe(kind="multihop", prompt=question, answers=answers)
    for part in fields.objects("new_single_hops"):
        accepted = accepted_answers([part.get("answer"), part.get("answer_alias")])
        yield Probe(kind="multihop.single", prompt=part.text("question"), answers=accepted)


def _from_flat(fields: Fields) -> FactRecord:
    """A flat record: subject, prompt, target and probes, under any of the published field names.

    The subject may be left out, for editors that need none.

    For zsRE as MEND published it (``src``), the edit writes ``alt``, a wrong answer, as in EasyEdit; ``answers[0]`` is
    the true one. The ROME and MEMIT code writes ``answers[0]`` instead, which the model may know already, so numbers
    from the two cannot be compared. Without ``alt``, the edit writes ``answers[0]``.
    """
    prompt_field = fields.first(*_TARGETS)
    if prompt_field is None:
        raise RequestError(f"There is no prompt; it should be in {listed(_TARGETS)}; {fields.described()}.")
    target_field = fields.first(*_TARGETS[prompt_field])
    if target_field is None:
        raise RequestError(
            f"There is no target; with '{prompt_field}' it should be in {listed(_TARGETS[prompt_field])}; "
            f"{fields.described()}."
        )
    target_new = fields.answer(target_field)
    true_field = fields.first(*(name for name in _TRUE if name != target_field))
    target_true = None if true_field is None else fields.optional_answer(true_field)
    subject_field = fields.first("subject", "concept")
    subject = "" if subject_field is None else fields.optional_text(subject_field) or ""
    prompt = fields.prompt(prompt_field)
    if prompt_field == "src":  # zsRE
        prompt = without_last_space(prompt)
    identity, join = _identity(fields), join_of(fields)
    subject, template = _with_placeholder(fields, subject, prompt)
    return FactRecord(
        request=EditRequest.create(
            subject=subject, prompt=template, target_new=target_new, target_true=target_true, join=join, id=identity
        ),
        relation=fields.optional_text("relation") or fields.optional_text("relation_id"),
        probes=tuple(probes.of_flat_record(fields, target_new, target_true)),
    )


def _with_placeholder(fields: Fields, subject: str, prompt: str) -> tuple[str, str]:
    """The subject as the prompt spells it, and the prompt with ``{}`` in its place.

    Raises:
        RequestError: the subject is not in the prompt.
    """
    if not subject or "{}" in prompt:
        return subject, prompt
    start, end = mention_of(subject, prompt, respell=fields.respelt is not None)
    spelling = prompt[start:end]
    if fields.respelt is not None and spelling != subject:
        fields.respelt.append((subject, spelling))
    return spelling, f"{prompt[:start]}{{}}{prompt[end:]}"


def _identity(fields: Mapping[str, Any]) -> str:
    value = next((fields[name] for name in ("id", "case_id") if fields.get(name) not in (None, "")), "")
    return str(value)


def without_last_space(prompt: str) -> str:
    """A prompt of CounterFact, zsRE or ``known_1000`` without the space at its end, which is the space before the
    answer."""
    return prompt.rstrip(" ")


def _published(prompts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(without_last_space, prompts))
