"""The shapes in which facts are published, recognised by their fields.

| format | recognised by |
|---|---|
| CounterFact, multi_counterfact, MQuAKE | ``requested_rewrite`` (an object, or in MQuAKE a list of them) |
| zsRE | ``src`` |
| plain, EasyEdit's CounterFact, KnowEdit | ``target_new`` or ``labels``, beside ``prompt`` or ``text`` |
| FastEdit | ``prompt`` and ``target`` |

A prompt has a ``{}`` where the subject goes, or the subject itself, which then becomes the ``{}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from editcore.interfaces.errors import RequestError
from editcore.interfaces.values import EditRequest, FactRecord

__all__ = ["parse_record"]

Fields = Mapping[str, Any]


def parse_record(fields: Fields) -> list[FactRecord]:
    """The facts of one published record: one, or several for MQuAKE's chains of edits.

    Raises:
        RequestError: the format is not recognised, a field is missing or has the wrong type, the subject is not in the
            prompt, or a target is empty.
    """
    if "requested_rewrite" in fields:
        return _counterfact(fields)
    if "src" in fields:
        return [_zsre(fields)]
    if "target" in fields and "target_new" not in fields:
        return [_fastedit(fields)]
    if {"target_new", "labels"} & fields.keys() or {"prompt", "text"} & fields.keys():
        return [_plain(fields)]
    found = ", ".join(fields) or "none"
    raise RequestError(
        f"This is no edit in a known format; its fields are: {found}. An edit has subject, prompt and target_new, "
        "or is a CounterFact, zsRE, KnowEdit or FastEdit record."
    )


def _counterfact(fields: Fields) -> list[FactRecord]:
    rewrites = fields["requested_rewrite"]
    case_id = _identity(fields)
    if isinstance(rewrites, list):  # MQuAKE: edits that one multi-hop question needs
        return [
            _rewrite(_object(rewrite, f"requested_rewrite[{index}]"), {}, f"{case_id}-{index}" if case_id else "")
            for index, rewrite in enumerate(rewrites)
        ]
    return [_rewrite(_object(rewrites, "requested_rewrite"), fields, case_id)]


def _rewrite(rewrite: Fields, evaluation: Fields, case_id: str) -> FactRecord:
    return FactRecord(
        request=_request(
            subject=_text(rewrite, "subject"),
            prompt=_text(rewrite, "prompt"),
            target_new=_answer(rewrite, "target_new"),
            target_true=_optional_answer(rewrite, "target_true"),
            id=case_id,
        ),
        relation=_optional_text(rewrite, "relation_id"),
        paraphrase_prompts=_texts(evaluation, "paraphrase_prompts"),
        neighborhood_prompts=_texts(evaluation, "neighborhood_prompts"),
        generation_prompts=_texts(evaluation, "generation_prompts"),
    )


def _zsre(fields: Fields) -> FactRecord:
    """zsRE as MEND published it.

    The edit writes ``alt``, a wrong answer, as EasyEdit does, and ``answers[0]`` is the true one. The ROME and MEMIT
    code teaches ``answers[0]`` instead, which the model may know already: numbers from the two do not compare. Without
    ``alt`` there is only ``answers[0]`` to teach. ``loc`` asks about something else and is no neighbourhood prompt.
    """
    counterfactual = fields.get("alt") not in (None, "")
    return FactRecord(
        request=_request(
            subject=_text(fields, "subject"),
            prompt=_text(fields, "src"),
            target_new=_answer(fields, "alt" if counterfactual else "answers"),
            target_true=_optional_answer(fields, "answers") if counterfactual else None,
            id=_identity(fields),
        ),
        paraphrase_prompts=_texts(fields, "rephrase"),
    )


def _fastedit(fields: Fields) -> FactRecord:
    """FastEdit: ``prompt`` with ``{}``, ``subject``, ``target`` and ``queries`` to try the edited model with."""
    return FactRecord(
        request=_request(
            subject=_text(fields, "subject"),
            prompt=_text(fields, "prompt"),
            target_new=_answer(fields, "target"),
            target_true=None,
            id=_identity(fields),
        ),
        generation_prompts=_texts(fields, "queries"),
    )


def _plain(fields: Fields) -> FactRecord:
    """Flat records: subject, prompt, target_new and what evaluation needs, under the names in use.

    The subject may be left out, for editors that need none. ``concept``, ``text``, ``labels`` (KnowEdit's WikiBio)
    stand for subject, prompt, target_new; ``ground_truth`` or ``answers`` for target_true; ``locality_prompt`` for a
    neighbourhood prompt if its answer is the true object.
    """
    true = next((name for name in ("target_true", "ground_truth", "answers") if fields.get(name)), "target_true")
    target_true = _optional_answer(fields, true)
    return FactRecord(
        request=_request(
            subject=_optional_text(fields, "subject" if "subject" in fields else "concept") or "",
            prompt=_text(fields, "prompt" if "prompt" in fields else "text", called="prompt"),
            target_new=_answer(fields, "target_new" if "target_new" in fields else "labels", called="target_new"),
            target_true=target_true,
            id=_identity(fields),
        ),
        relation=_optional_text(fields, "relation") or _optional_text(fields, "relation_id"),
        paraphrase_prompts=_texts(fields, "paraphrase_prompts") + _paraphrases(fields),
        neighborhood_prompts=_texts(fields, "neighborhood_prompts") + _neighbours(fields, target_true),
        generation_prompts=_texts(fields, "generation_prompts"),
    )


def _paraphrases(fields: Fields) -> tuple[str, ...]:
    """``rephrase_prompt``, if it is one.

    In the flattened CounterFact most rephrase prompts are generation prompts, after which the object need not come.
    They count only where ``rephrase_kind`` says ``paraphrase``, so EasyEdit's own file (which has
    ``locality_ground_truth`` and no ``rephrase_kind``) has none.
    """
    if "rephrase_kind" in fields:
        genuine = fields["rephrase_kind"] == "paraphrase"
    else:
        genuine = "locality_ground_truth" not in fields
    return _texts(fields, "rephrase_prompt") if genuine else ()


def _neighbours(fields: Fields, target_true: str | None) -> tuple[str, ...]:
    """``locality_prompt``, if its answer is the edited fact's true object.

    KnowEdit's ``locality`` lists are no neighbourhood: they ask about the edited subject, and where their answer is the
    true object they ask the edited fact itself in other words (84 of 84 in its zsRE, 146 of 146 in wiki_counterfact).
    """
    answer = _optional_answer(fields, "locality_ground_truth")
    return _texts(fields, "locality_prompt") if answer is None or answer == target_true else ()


def _request(*, subject: str, prompt: str, target_new: str, target_true: str | None, id: str) -> EditRequest:
    template = prompt if "{}" in prompt or not subject else _template(prompt, subject)
    return EditRequest.create(subject=subject, prompt=template, target_new=target_new, target_true=target_true, id=id)


def _template(text: str, subject: str) -> str:
    """``text`` with its last mention of the subject as ``{}``; one inside a longer word only if there is no other."""
    places = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)]
    start = places[-1] if places else text.rfind(subject)
    if start < 0:
        raise RequestError(
            f"The subject {subject!r} is not in the prompt {text!r}. Write {{}} where the subject goes, "
            "or spell the subject as in the prompt."
        )
    return text[:start] + "{}" + text[start + len(subject) :]


def _identity(fields: Fields) -> str:
    value = next((fields[name] for name in ("id", "case_id") if fields.get(name) not in (None, "")), "")
    return str(value)


def _object(value: Any, name: str) -> Fields:
    if not isinstance(value, dict):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected an object.")
    return value


def _text(fields: Fields, name: str, *, called: str = "") -> str:
    value = fields.get(name)
    if value is None:
        found = ", ".join(fields) or "none"
        raise RequestError(f"The field '{called or name}' is missing; the fields are: {found}.")
    if not isinstance(value, str):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected text.")
    if not value.strip():
        raise RequestError(f"The field '{name}' is empty.")
    return value.strip()


def _optional_text(fields: Fields, name: str) -> str | None:
    value = fields.get(name)
    return None if value is None or value == "" else _text(fields, name)


def _answer(fields: Fields, name: str, *, called: str = "") -> str:
    """An object: text, ``{"str": text}``, or the first of a list (of lists) of accepted answers."""
    value = fields.get(name)
    while isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("str")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return _text({**fields, name: value}, name, called=called)


def _optional_answer(fields: Fields, name: str) -> str | None:
    return _answer(fields, name) if fields.get(name) not in (None, "", [], [[]]) else None


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    """A list of texts, or one text; empty ones are dropped, and so are spaces at the end: a target brings its own."""
    value = fields.get(name)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected a list of texts.")
    return tuple(text.rstrip() for text in values if text.strip())


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} ({text if len(text) <= 40 else text[:37] + '...'})"
