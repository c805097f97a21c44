"""The shapes in which facts are published, recognised by their fields.

| format | recognised by |
|---|---|
| CounterFact, multi_counterfact, MQuAKE | ``requested_rewrite`` (an object, or in MQuAKE a list of them) |
| zsRE | ``src`` |
| plain, EasyEdit's CounterFact, KnowEdit, WikiBigEdit | ``target_new`` or ``labels``, beside ``prompt`` or ``text`` |
| FastEdit, QAEdit | ``prompt`` and ``target`` |
| a run's ``requests.jsonl`` | ``request``, an object |

A prompt has a ``{}`` where the subject goes, or the subject itself, which then becomes the ``{}``.

Everything that a record asks becomes a probe, whose kind says what it tests. Fields that no format reads are counted by
name (:class:`Unread`), so that a caller can tell what was left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from editcore.interfaces.errors import RequestError
from editcore.interfaces.values import EditRequest, FactRecord, Probe, first_problem

__all__ = ["Unread", "parse_record"]

_NOTHING: tuple[Any, ...] = (None, "", [], {})

Unread = Counter[str]
"""How many records have a field that was not read, by the field's name."""


class _Fields(Mapping[str, Any]):
    """The fields of a record, which remembers those that were looked at."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def unread(self) -> list[str]:
        """Fields with something in them that nobody looked at."""
        return [name for name, value in self._fields.items() if name not in self.read and value not in _NOTHING]


def parse_record(fields: Mapping[str, Any], unread: Unread | None = None) -> list[FactRecord]:
    """The facts of one published record: one, or several for MQuAKE's chains of edits.

    Args:
        unread: is told the names of fields that no format reads.

    Raises:
        RequestError: the format is not recognised, a field is missing or has the wrong type, the subject is not in the
            prompt, or a target is empty.
    """
    watched = _Fields(fields)
    records = _parse(watched)
    if unread is not None:
        unread.update(watched.unread())
    return records


def _parse(fields: _Fields) -> list[FactRecord]:
    if isinstance(fields.get("request"), Mapping):
        return [_of_run(fields)]
    if "requested_rewrite" in fields:
        return _counterfact(fields)
    if "src" in fields:
        return [_zsre(fields)]
    if "target" in fields and "target_new" not in fields:
        return [_target(fields)]
    if {"target_new", "labels"} & fields.keys() or {"prompt", "text"} & fields.keys():
        return [_plain(fields)]
    found = ", ".join(fields) or "none"
    raise RequestError(
        f"This is no edit in a known format; its fields are: {found}. An edit has prompt, target_new and, for most "
        "editors, subject, or is a CounterFact, zsRE, KnowEdit, MQuAKE, WikiBigEdit, QAEdit or FastEdit record."
    )


def _of_run(fields: _Fields) -> FactRecord:
    """A line of a run's ``requests.jsonl``, which is a record as we write it."""
    try:
        return FactRecord.model_validate({name: fields[name] for name in fields})
    except ValidationError as error:
        raise RequestError(f"This is no record of a run. {first_problem(error)}.") from error


def _counterfact(fields: _Fields) -> list[FactRecord]:
    rewrites = fields["requested_rewrite"]
    case_id = _identity(fields)
    if isinstance(rewrites, list):  # MQuAKE: edits that one multi-hop question needs
        parts = _objects(fields, "requested_rewrite")
        if not parts:
            raise RequestError("The field 'requested_rewrite' is an empty list; it holds the edits of a chain.")
        records = [
            _rewrite(part, tuple(_question(part)), f"{case_id}-{index}" if case_id else "")
            for index, part in enumerate(parts)
        ]
        # The chain is asked of its last edit, after which all of them have been written.
        return [*records[:-1], records[-1].model_copy(update={"probes": (*records[-1].probes, *_hops(fields))})]
    rewrite = _object(rewrites, "requested_rewrite")
    request = _rewrite(rewrite, (), case_id).request
    probes = (
        *_probes("paraphrase", _texts(fields, "paraphrase_prompts"), request.target_new),
        *_probes("neighborhood", _texts(fields, "neighborhood_prompts"), request.target_true),
        *_probes("generation", _texts(fields, "generation_prompts"), None),
    )
    return [_rewrite(rewrite, probes, case_id)]


def _rewrite(rewrite: Mapping[str, Any], probes: tuple[Probe, ...], case_id: str) -> FactRecord:
    return FactRecord(
        request=_request(
            subject=_text(rewrite, "subject"),
            prompt=_text(rewrite, "prompt"),
            target_new=_answer(rewrite, "target_new"),
            target_true=_optional_answer(rewrite, "target_true"),
            id=case_id,
        ),
        relation=_optional_text(rewrite, "relation_id"),
        probes=probes,
    )


def _question(rewrite: Mapping[str, Any]) -> Iterator[Probe]:
    """MQuAKE asks each edit as a question, too."""
    if (question := _optional_text(rewrite, "question")) is not None:
        yield Probe(kind="paraphrase.question", prompt=question, answers=(_answer(rewrite, "target_new"),))


def _hops(fields: _Fields) -> Iterator[Probe]:
    """MQuAKE's multi-hop questions, and the single hops on the way to their answer, edited and unedited ones."""
    answers = _answers([fields.get("new_answer"), fields.get("new_answer_alias")])
    for question in _texts(fields, "questions"):
        yield Probe(kind="multihop", prompt=question, answers=answers)
    for part in _objects(fields, "new_single_hops"):
        accepted = _answers([part.get("answer"), part.get("answer_alias")])
        yield Probe(kind="multihop.single", prompt=_text(part, "question"), answers=accepted)


def _zsre(fields: _Fields) -> FactRecord:
    """zsRE as MEND published it.

    The edit writes ``alt``, a wrong answer, as EasyEdit does, and ``answers[0]`` is the true one. The ROME and MEMIT
    code teaches ``answers[0]`` instead, which the model may know already: numbers from the two do not compare. Without
    ``alt`` there is only ``answers[0]`` to teach. ``loc`` asks about something else, with ``loc_ans`` as its answer: it
    is ``locality`` and no neighbourhood.
    """
    counterfactual = fields.get("alt") not in (None, "")
    target_new = _answer(fields, "alt" if counterfactual else "answers")
    return FactRecord(
        request=_request(
            subject=_text(fields, "subject"),
            prompt=_text(fields, "src"),
            target_new=target_new,
            target_true=_optional_answer(fields, "answers") if counterfactual else None,
            id=_identity(fields),
        ),
        probes=(*_probes("paraphrase", _texts(fields, "rephrase"), target_new), *_elsewhere(fields)),
    )


def _target(fields: _Fields) -> FactRecord:
    """FastEdit and QAEdit: ``prompt`` and ``target``.

    FastEdit has ``queries`` to try the edited model with. QAEdit has a ``rephrase`` and a list of ``locality``
    questions (``loc``, ``loc_ans``) about other things.
    """
    target_new = _answer(fields, "target")
    return FactRecord(
        request=_request(
            subject=_optional_text(fields, "subject") or "",
            prompt=_text(fields, "prompt"),
            target_new=target_new,
            target_true=None,
            id=_identity(fields),
        ),
        probes=(
            *_probes("paraphrase", _texts(fields, "rephrase"), target_new),
            *_locality(fields),
            *_probes("generation", _texts(fields, "queries"), None),
        ),
    )


def _plain(fields: _Fields) -> FactRecord:
    """Flat records: subject, prompt, target_new and what evaluation needs, under the names in use.

    The subject may be left out, for editors that need none. ``concept``, ``text``, ``labels`` (KnowEdit's WikiBio)
    stand for subject, prompt, target_new; ``ground_truth`` or ``answers`` for target_true; ``locality_prompt`` for a
    neighbourhood prompt if its answer is the true object, and for ``locality`` otherwise.
    """
    true = next((name for name in ("target_true", "ground_truth", "answers") if fields.get(name)), "target_true")
    target_true = _optional_answer(fields, true)
    target_new = _answer(fields, "target_new" if "target_new" in fields else "labels", called="target_new")
    return FactRecord(
        request=_request(
            subject=_optional_text(fields, "subject" if "subject" in fields else "concept") or "",
            prompt=_text(fields, "prompt" if "prompt" in fields else "text", called="prompt"),
            target_new=target_new,
            target_true=target_true,
            id=_identity(fields),
        ),
        relation=_optional_text(fields, "relation") or _optional_text(fields, "relation_id"),
        probes=(
            *_probes("paraphrase", _texts(fields, "paraphrase_prompts") + _paraphrases(fields), target_new),
            *_probes("neighborhood", _texts(fields, "neighborhood_prompts"), target_true),
            *_neighbours(fields, target_true),
            *_portability(fields),
            *_locality(fields),
            *_elsewhere(fields),
            *_probes("generation", _texts(fields, "generation_prompts"), None),
            *_given(fields),
        ),
    )


def _probes(kind: str, prompts: tuple[str, ...], answer: str | None) -> Iterator[Probe]:
    for prompt in prompts:
        yield Probe(kind=kind, prompt=prompt, answers=() if answer is None else (answer,))


def _given(fields: _Fields) -> Iterator[Probe]:
    """``probes`` as we write them: objects with ``kind``, ``prompt`` and ``answers``."""
    for part in _objects(fields, "probes"):
        yield Probe(kind=_text(part, "kind"), prompt=_text(part, "prompt"), answers=_answers(part.get("answers")))


def _paraphrases(fields: _Fields) -> tuple[str, ...]:
    """``rephrase_prompt``, if it is one.

    In the flattened CounterFact most rephrase prompts are generation prompts, after which the object need not come.
    They count only where ``rephrase_kind`` says ``paraphrase``. EasyEdit's own CounterFact file says nothing of its
    rephrase prompts, which are of the same origin; it is told from WikiBigEdit, whose rephrase prompts are genuine, by
    its ``ground_truth``: WikiBigEdit's facts are new and have none.
    """
    if "rephrase_kind" in fields:
        genuine = fields["rephrase_kind"] == "paraphrase"
    else:
        genuine = "locality_ground_truth" not in fields or not fields.get("ground_truth")
    return _texts(fields, "rephrase_prompt") if genuine else ()


def _neighbours(fields: _Fields, target_true: str | None) -> Iterator[Probe]:
    """``locality_prompt``: a neighbourhood prompt if its answer is the edited fact's true object."""
    answers = _answers(fields.get("locality_ground_truth"))
    same = not answers or (target_true is not None and target_true in answers)
    for prompt in _texts(fields, "locality_prompt"):
        if same:
            yield Probe(kind="neighborhood", prompt=prompt, answers=answers or _answers(target_true))
        else:
            yield Probe(kind="locality", prompt=prompt, answers=answers)


def _portability(fields: _Fields) -> Iterator[Probe]:
    """KnowEdit's lists of questions by kind, or EasyEdit's one new question."""
    found = fields.get("portability")
    if not isinstance(found, Mapping):
        return
    if "New Question" in found:
        question = _optional_text(found, "New Question")
        if question is not None:
            yield Probe(kind="portability.reasoning", prompt=question, answers=_answers(found.get("New Answer")))
        return
    yield from _by_kind("portability", found)


def _locality(fields: _Fields) -> Iterator[Probe]:
    """KnowEdit's lists by kind, or QAEdit's list of questions about other things.

    KnowEdit's are no neighbourhood: they ask about the edited subject, and where their answer is the true object they
    ask the edited fact itself in other words (84 of 84 in its zsRE, 146 of 146 in wiki_counterfact).
    """
    found = fields.get("locality")
    if isinstance(found, Mapping):
        yield from _by_kind("locality", found)
    elif isinstance(found, list):
        for part in _objects(fields, "locality"):
            yield from _elsewhere(part)


def _by_kind(kind: str, lists: Mapping[str, Any]) -> Iterator[Probe]:
    for name, questions in lists.items():
        special = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        for place, one in enumerate(questions if isinstance(questions, list) else [questions]):
            part = _object(one, f"{kind}.{name}[{place}]")
            if (prompt := _optional_text(part, "prompt")) is not None:
                yield Probe(kind=f"{kind}.{special}", prompt=prompt, answers=_answers(part.get("ground_truth")))


def _elsewhere(fields: Mapping[str, Any]) -> Iterator[Probe]:
    """``loc`` with ``loc_ans``: a question about something else."""
    for prompt in _texts(fields, "loc"):
        yield Probe(kind="locality", prompt=prompt, answers=_answers(fields.get("loc_ans")))


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


def _identity(fields: Mapping[str, Any]) -> str:
    value = next((fields[name] for name in ("id", "case_id") if fields.get(name) not in (None, "")), "")
    return str(value)


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected an object.")
    return value


def _objects(fields: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected a list of objects.")
    return [_object(one, f"{name}[{place}]") for place, one in enumerate(value)]


def _text(fields: Mapping[str, Any], name: str, *, called: str = "") -> str:
    return _as_text(fields.get(name), fields, name, called=called)


def _as_text(value: Any, fields: Mapping[str, Any], name: str, *, called: str = "") -> str:
    if value is None:
        found = ", ".join(fields) or "none"
        raise RequestError(f"The field '{called or name}' is missing; the fields are: {found}.")
    if not isinstance(value, str):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected text.")
    if not value.strip():
        raise RequestError(f"The field '{name}' is empty.")
    return value.strip()


def _optional_text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return None if value is None or value == "" else _text(fields, name)


def _answer(fields: Mapping[str, Any], name: str, *, called: str = "") -> str:
    """An object: text, ``{"str": text}``, or the first of a list (of lists) of accepted answers."""
    value = fields.get(name)
    while isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("str")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return _as_text(value, fields, name, called=called)


def _optional_answer(fields: Mapping[str, Any], name: str) -> str | None:
    return _answer(fields, name) if fields.get(name) not in (None, "", [], [[]]) else None


def _answers(value: Any) -> tuple[str, ...]:
    """Every accepted answer of text, ``{"str": text}``, a number, or lists of them; each once, in their order."""
    if isinstance(value, dict):
        value = value.get("str")
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(answer for part in value for answer in _answers(part)))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return (value.strip(),) if isinstance(value, str) and value.strip() else ()


def _texts(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
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
