"""The probes of a flat record: paraphrases, neighbours, portability, locality, ..."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from editcore.datasets.fields import Fields, accepted_answers, as_object
from editcore.interfaces.values import Probe

__all__ = ["of_flat_record", "of_kind"]


def of_kind(kind: str, prompts: Sequence[str], answer: str | None) -> Iterator[Probe]:
    """A probe for each prompt, all with the same answer or none."""
    for prompt in prompts:
        yield Probe(kind=kind, prompt=prompt, answers=() if answer is None else (answer,))


def of_flat_record(fields: Fields, target_new: str, target_true: str | None) -> Iterator[Probe]:
    """Every probe of a flat record, kind by kind."""
    yield from of_kind("paraphrase", _paraphrases(fields), target_new)
    yield from of_kind("paraphrase.personas", fields.texts("personas"), target_new)
    yield from of_kind("neighborhood", fields.texts("neighborhood_prompts"), target_true)
    yield from _neighbours(fields, target_true)
    yield from _portability(fields)
    yield from _multihop(fields)
    yield from _locality(fields)
    yield from _unrelated(fields)
    yield from of_kind("generation", fields.texts("generation_prompts") + fields.texts("queries"), None)
    yield from _as_written_by_us(fields)


def _as_written_by_us(fields: Fields) -> Iterator[Probe]:
    """``probes``: objects with ``kind``, ``prompt`` and ``answers``."""
    for part in fields.objects("probes"):
        yield Probe(kind=part.text("kind"), prompt=part.prompt("prompt"), answers=accepted_answers(part.get("answers")))


def _paraphrases(fields: Fields) -> tuple[str, ...]:
    """``paraphrase_prompts``, ``rephrase``, and ``rephrase_prompt`` if that is a paraphrase.

    In the flattened CounterFact most rephrase prompts are generation prompts, after which the object need not come.
    They count only if ``rephrase_kind`` says ``paraphrase``. EasyEdit's own CounterFact file has rephrase prompts of
    the same origin, without that field. It differs from WikiBigEdit and zsRE, whose rephrase prompts are genuine, in
    its neighbours, whose answer is the edited fact's true object.
    """
    if "rephrase_kind" in fields:
        genuine = fields["rephrase_kind"] == "paraphrase"
    else:
        true, elsewhere = (accepted_answers(fields.raw.get(name)) for name in ("ground_truth", "locality_ground_truth"))
        genuine = not set(true) & set(elsewhere)
    names = ("paraphrase_prompts", *(["rephrase_prompt"] if genuine else []), "rephrase")
    return tuple(text for name in names for text in fields.texts(name))


def _neighbours(fields: Fields, target_true: str | None) -> Iterator[Probe]:
    """``locality_prompt``: a neighbourhood prompt if its answer is the edited fact's true object, ``locality``
    otherwise."""
    prompts = fields.texts("locality_prompt")
    answers = accepted_answers(fields.get("locality_ground_truth")) if prompts else ()
    same = not answers or (target_true is not None and target_true in answers)
    for prompt in prompts:
        if same:
            yield Probe(kind="neighborhood", prompt=prompt, answers=answers or accepted_answers(target_true))
        else:
            yield Probe(kind="locality", prompt=prompt, answers=answers)


def _portability(fields: Fields) -> Iterator[Probe]:
    """KnowEdit's lists of questions by kind, or EasyEdit's one new question."""
    if not isinstance(fields.raw.get("portability"), dict):
        return
    portability = as_object(fields["portability"], "portability")
    if "New Question" in portability:
        question = portability.optional_prompt("New Question")
        if question is not None:
            answers = accepted_answers(portability.get("New Answer"))
            yield Probe(kind="portability.reasoning", prompt=question, answers=answers)
        return
    yield from _by_kind("portability", portability)


def _multihop(fields: Fields) -> Iterator[Probe]:
    """``mhop`` with ``mhop_ans``: a question that needs one more step after the edited fact."""
    for prompt in fields.texts("mhop"):
        yield Probe(kind="multihop", prompt=prompt, answers=accepted_answers(fields.get("mhop_ans")))


def _locality(fields: Fields) -> Iterator[Probe]:
    """KnowEdit's lists by kind, or QAEdit's list of questions about other things.

    KnowEdit's questions are not neighbourhood prompts, because they ask about the edited subject. If their answer is
    the true object, they ask the edited fact itself in other words (84 of 84 in its zsRE, 146 of 146 in
    wiki_counterfact).
    """
    locality = fields.raw.get("locality")
    if isinstance(locality, dict):
        yield from _by_kind("locality", fields["locality"])
    elif isinstance(locality, list):
        for part in fields.objects("locality"):
            yield from _unrelated(part)
            yield from _questions("locality", part)


def _by_kind(kind: str, lists: Mapping[str, Any]) -> Iterator[Probe]:
    for name, questions in lists.items():
        special = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        for place, question in enumerate(questions if isinstance(questions, list) else [questions]):
            yield from _questions(f"{kind}.{special}", as_object(question, f"{kind}.{name}[{place}]"))


def _questions(kind: str, part: Fields) -> Iterator[Probe]:
    """``prompt`` with its answer; or a list of prompts with a list of their answers, as in EasyEdit's input."""
    answer_field = part.first("ground_truth", "target", "answer")
    prompts = part.texts("prompt")
    found = part[answer_field] if answer_field is not None and prompts else None
    listed = isinstance(part.raw.get("prompt"), list) and isinstance(found, list) and len(found) == len(prompts)
    answers = found if listed and isinstance(found, list) else [found] * len(prompts)
    for prompt, own in zip(prompts, answers, strict=True):
        yield Probe(kind=kind, prompt=prompt, answers=accepted_answers(own))


def _unrelated(fields: Fields) -> Iterator[Probe]:
    """``loc`` with ``loc_ans``: a question about something else, of the kind ``locality``."""
    for prompt in fields.texts("loc"):
        yield Probe(kind="locality", prompt=prompt, answers=accepted_answers(fields.get("loc_ans")))
