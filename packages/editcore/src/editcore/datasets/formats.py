"""The shapes in which facts are published, recognised by their fields.

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
ends is part of it, but for a space at the end in CounterFact, MQuAKE and zsRE, which stands for the one of the answer.

Everything that a record asks becomes a probe, whose kind says what it tests. Fields that no format reads are counted by
name (:class:`Unread`), also those inside of others (``requested_rewrite.fact_new``), so that a caller can tell what was
left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from editcore.interfaces.errors import RequestError
from editcore.interfaces.values import EditRequest, FactRecord, Probe, first_problem

__all__ = ["Unread", "join_of", "parse_record", "without_last_space"]

_NOTHING: tuple[Any, ...] = (None, "", [], {})

_TARGETS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("target_new", "target", "labels"),
    "src": ("alt", "answers"),
    "update": ("ans",),
    "text": ("labels", "target_new"),
}
"""By the field that has a flat record's prompt, the fields that may have what to write; the first filled one has it."""
_TRUE = ("target_true", "ground_truth", "answers")
"""Fields that may have a flat record's true object."""

_MOST_FIELDS = 20
"""Fields of a record that a message names; a table may have hundreds."""

Unread = Counter[str]
"""How many records have a field that was not read, by the field's name; ``OUTER.INNER`` for one inside another."""


class _Fields(Mapping[str, Any]):
    """The fields of a record, or of an object in it, which remember those that were looked at."""

    def __init__(self, raw: Mapping[str, Any], respelt: list[tuple[str, str]] | None) -> None:
        self.raw = raw
        self.respelt = respelt
        """Takes subjects that are spelt otherwise than in their prompt, each with the spelling there; ``None`` where
        that is an error."""
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = self._watched(self.raw[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __contains__(self, name: object) -> bool:
        return name in self.raw

    def _watched(self, value: Any) -> Any:
        if isinstance(value, dict):
            return _Fields(value, self.respelt)
        return [self._watched(one) for one in value] if isinstance(value, list) else value

    def filled(self) -> list[str]:
        """The fields with something in them."""
        return [name for name, value in self.raw.items() if value not in _NOTHING]

    def taken(self) -> dict[str, Any]:
        """All of them, which then count as read with whatever is in them."""
        self._read = dict.fromkeys(self.raw)
        return dict(self.raw)

    def first(self, *names: str) -> str | None:
        """The first of these fields with something in it; else the first that is there."""
        return next((name for name in names if self.raw.get(name) not in _NOTHING), None) or next(
            (name for name in names if name in self.raw), None
        )

    def unread(self) -> dict[str, None]:
        """Fields with something in them that nobody looked at."""
        found: dict[str, None] = {}
        for name in self.filled():
            if name not in self._read:
                found[name] = None
            else:
                found |= {f"{name}.{inner}": None for part in _parts(self._read[name]) for inner in part.unread()}
        return found


def _parts(value: Any) -> Iterator[_Fields]:
    """The objects in what a field holds."""
    if isinstance(value, _Fields):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _parts(one)


def parse_record(
    fields: Mapping[str, Any], unread: Unread | None = None, *, respelt: list[tuple[str, str]] | None = None
) -> list[FactRecord]:
    """The facts of one published record: one, or several for MQuAKE's chains of edits.

    Args:
        unread: is told the names of fields that no format reads.
        respelt: gets each subject that differs from its prompt's spelling by case, Unicode form or spaces only, with
            that spelling, which the request then has. Left out, such a subject is not found.

    Raises:
        RequestError: the format is not recognised, a field is missing or has the wrong type, the subject is not in the
            prompt, or a target is empty.
    """
    met: list[tuple[str, str]] | None = None if respelt is None else []
    watched = _Fields(fields, met)
    records = _parse(watched)
    if unread is not None:
        unread.update(list(watched.unread()))
    if respelt is not None and met is not None:
        respelt += met
    return records


def _parse(fields: _Fields) -> list[FactRecord]:
    if isinstance(fields.raw.get("request"), Mapping):
        return [_of_run(fields)]
    if "requested_rewrite" in fields:
        return _counterfact(fields)
    if not fields.raw.keys().isdisjoint((*_TARGETS, "target_new", "labels")):
        return [_flat(fields)]
    raise RequestError(
        f"This is no edit in a known format; {_found(fields)}. An edit has prompt, target_new and, for most editors, "
        "subject, or is a CounterFact, zsRE, KnowEdit, MQuAKE, WikiBigEdit, QAEdit or FastEdit record."
    )


def _of_run(fields: _Fields) -> FactRecord:
    """A line of a run's ``requests.jsonl``, which is a record as we write it."""
    try:
        return FactRecord.model_validate(fields.taken())
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
        *_question(rewrite),
        *_probes("paraphrase", _published(_texts(fields, "paraphrase_prompts")), request.target_new),
        *_probes("neighborhood", _published(_texts(fields, "neighborhood_prompts")), request.target_true),
        *_probes("generation", _published(_texts(fields, "generation_prompts")), None),
    )
    return [_rewrite(rewrite, probes, case_id)]


def _rewrite(rewrite: _Fields, probes: tuple[Probe, ...], case_id: str) -> FactRecord:
    return FactRecord(
        request=_request(
            rewrite,
            subject=_text(rewrite, "subject"),
            prompt=without_last_space(_prompt(rewrite, "prompt")),
            target_new=_answer(rewrite, "target_new"),
            target_true=_optional_answer(rewrite, "target_true"),
            id=case_id,
        ),
        relation=_optional_text(rewrite, "relation_id"),
        probes=probes,
    )


def _question(rewrite: _Fields) -> Iterator[Probe]:
    """MQuAKE asks each edit as a question, too; so does AKEW's CounterFact."""
    if (question := _optional_prompt(rewrite, "question")) is not None:
        yield Probe(kind="paraphrase.question", prompt=question, answers=(_answer(rewrite, "target_new"),))


def _hops(fields: _Fields) -> Iterator[Probe]:
    """MQuAKE's multi-hop questions, and the single hops on the way to their answer, edited and unedited ones."""
    answers = _answers([fields.get("new_answer"), fields.get("new_answer_alias")])
    for question in _published(_texts(fields, "questions")):
        yield Probe(kind="multihop", prompt=question, answers=answers)
    for part in _objects(fields, "new_single_hops"):
        accepted = _answers([part.get("answer"), part.get("answer_alias")])
        yield Probe(kind="multihop.single", prompt=_text(part, "question"), answers=accepted)


def _flat(fields: _Fields) -> FactRecord:
    """Flat records: subject, prompt, what to write and what evaluation needs, under the names in use.

    The subject may be left out, for editors that need none. A ``locality_prompt`` is a neighbourhood prompt if its
    answer is the true object, and ``locality`` otherwise.

    zsRE as MEND published it (``src``): the edit writes ``alt``, a wrong answer, as EasyEdit does, and ``answers[0]``
    is the true one. The ROME and MEMIT code teaches ``answers[0]`` instead, which the model may know already: numbers
    from the two do not compare. Without ``alt`` there is only ``answers[0]`` to teach. ``loc`` asks about something
    else, with ``loc_ans`` as its answer: it is ``locality`` and no neighbourhood.
    """
    prompt = fields.first(*_TARGETS)
    if prompt is None:
        raise RequestError(f"There is no prompt; it would be in {_either(_TARGETS)}; {_found(fields)}.")
    target = fields.first(*_TARGETS[prompt])
    if target is None:
        raise RequestError(
            f"There is nothing to write; beside '{prompt}' it would be in {_either(_TARGETS[prompt])}; "
            f"{_found(fields)}."
        )
    target_new = _answer(fields, target)
    true = fields.first(*(name for name in _TRUE if name != target))
    target_true = None if true is None else _optional_answer(fields, true)
    subject = fields.first("subject", "concept")
    return FactRecord(
        request=_request(
            fields,
            subject="" if subject is None else _optional_text(fields, subject) or "",
            prompt=_published_at(prompt, _prompt(fields, prompt)),
            target_new=target_new,
            target_true=target_true,
            id=_identity(fields),
            join=join_of(fields),
        ),
        relation=_optional_text(fields, "relation") or _optional_text(fields, "relation_id"),
        probes=(
            *_probes("paraphrase", _paraphrases(fields), target_new),
            *_probes("paraphrase.personas", _texts(fields, "personas"), target_new),
            *_probes("neighborhood", _texts(fields, "neighborhood_prompts"), target_true),
            *_neighbours(fields, target_true),
            *_portability(fields),
            *_further(fields),
            *_locality(fields),
            *_elsewhere(fields),
            *_probes("generation", _texts(fields, "generation_prompts") + _texts(fields, "queries"), None),
            *_given(fields),
        ),
    )


def _probes(kind: str, prompts: tuple[str, ...], answer: str | None) -> Iterator[Probe]:
    for prompt in prompts:
        yield Probe(kind=kind, prompt=prompt, answers=() if answer is None else (answer,))


def _given(fields: _Fields) -> Iterator[Probe]:
    """``probes`` as we write them: objects with ``kind``, ``prompt`` and ``answers``."""
    for part in _objects(fields, "probes"):
        yield Probe(kind=_text(part, "kind"), prompt=_prompt(part, "prompt"), answers=_answers(part.get("answers")))


def _paraphrases(fields: _Fields) -> tuple[str, ...]:
    """``paraphrase_prompts``, ``rephrase``, and ``rephrase_prompt`` if it is one.

    In the flattened CounterFact most rephrase prompts are generation prompts, after which the object need not come.
    They count only where ``rephrase_kind`` says ``paraphrase``. EasyEdit's own CounterFact file says nothing of its
    rephrase prompts, which are of the same origin. It is told from WikiBigEdit and zsRE, whose rephrase prompts are
    genuine, by its neighbours: the answer to them is the edited fact's true object.
    """
    if "rephrase_kind" in fields:
        genuine = fields["rephrase_kind"] == "paraphrase"
    else:
        true, elsewhere = (_answers(fields.raw.get(name)) for name in ("ground_truth", "locality_ground_truth"))
        genuine = not set(true) & set(elsewhere)
    names = ("paraphrase_prompts", *(["rephrase_prompt"] if genuine else []), "rephrase")
    return tuple(text for name in names for text in _texts(fields, name))


def _neighbours(fields: _Fields, target_true: str | None) -> Iterator[Probe]:
    """``locality_prompt``: a neighbourhood prompt if its answer is the edited fact's true object."""
    prompts = _texts(fields, "locality_prompt")
    answers = _answers(fields.get("locality_ground_truth")) if prompts else ()
    same = not answers or (target_true is not None and target_true in answers)
    for prompt in prompts:
        if same:
            yield Probe(kind="neighborhood", prompt=prompt, answers=answers or _answers(target_true))
        else:
            yield Probe(kind="locality", prompt=prompt, answers=answers)


def _portability(fields: _Fields) -> Iterator[Probe]:
    """KnowEdit's lists of questions by kind, or EasyEdit's one new question."""
    if not isinstance(fields.raw.get("portability"), dict):
        return
    found = _object(fields["portability"], "portability")
    if "New Question" in found:
        question = _optional_prompt(found, "New Question")
        if question is not None:
            yield Probe(kind="portability.reasoning", prompt=question, answers=_answers(found.get("New Answer")))
        return
    yield from _by_kind("portability", found)


def _further(fields: _Fields) -> Iterator[Probe]:
    """``mhop`` with ``mhop_ans``: a question that leads on from the edited fact."""
    for prompt in _texts(fields, "mhop"):
        yield Probe(kind="multihop", prompt=prompt, answers=_answers(fields.get("mhop_ans")))


def _locality(fields: _Fields) -> Iterator[Probe]:
    """KnowEdit's lists by kind, or QAEdit's list of questions about other things.

    KnowEdit's are no neighbourhood: they ask about the edited subject, and where their answer is the true object they
    ask the edited fact itself in other words (84 of 84 in its zsRE, 146 of 146 in wiki_counterfact).
    """
    found = fields.raw.get("locality")
    if isinstance(found, dict):
        yield from _by_kind("locality", fields["locality"])
    elif isinstance(found, list):
        for part in _objects(fields, "locality"):
            yield from _elsewhere(part)
            yield from _asked("locality", part)


def _by_kind(kind: str, lists: Mapping[str, Any]) -> Iterator[Probe]:
    for name, questions in lists.items():
        special = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        for place, one in enumerate(questions if isinstance(questions, list) else [questions]):
            yield from _asked(f"{kind}.{special}", _object(one, f"{kind}.{name}[{place}]"))


def _asked(kind: str, part: _Fields) -> Iterator[Probe]:
    """``prompt`` with its answer; or a list of prompts with a list that has an answer for each, as EasyEdit is given
    them."""
    answer = part.first("ground_truth", "target", "answer")
    prompts = _texts(part, "prompt")
    found = part[answer] if answer is not None and prompts else None
    listed = isinstance(part.raw.get("prompt"), list) and isinstance(found, list) and len(found) == len(prompts)
    answers = found if listed and isinstance(found, list) else [found] * len(prompts)
    for prompt, own in zip(prompts, answers, strict=True):
        yield Probe(kind=kind, prompt=prompt, answers=_answers(own))


def _elsewhere(fields: _Fields) -> Iterator[Probe]:
    """``loc`` with ``loc_ans``: a question about something else."""
    for prompt in _texts(fields, "loc"):
        yield Probe(kind="locality", prompt=prompt, answers=_answers(fields.get("loc_ans")))


def _request(
    fields: _Fields,
    *,
    subject: str,
    prompt: str,
    target_new: str,
    target_true: str | None,
    id: str,
    join: str | None = None,
) -> EditRequest:
    template = prompt
    if subject and "{}" not in prompt:
        start, end = _place(prompt, subject, respell=fields.respelt is not None)
        if fields.respelt is not None and prompt[start:end] != subject:
            fields.respelt.append((subject, prompt[start:end]))
        template, subject = f"{prompt[:start]}{{}}{prompt[end:]}", prompt[start:end]
    return EditRequest.create(
        subject=subject, prompt=template, target_new=target_new, target_true=target_true, join=join, id=id
    )


def _place(text: str, subject: str, *, respell: bool) -> tuple[int, int]:
    """Where ``text`` mentions the subject last; inside a longer word only if it does nowhere else.

    Args:
        respell: a mention that differs by case, Unicode form or spaces only counts where there is no other.
    """
    places = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)]
    start = places[-1] if places else text.rfind(subject)
    if start >= 0:
        return start, start + len(subject)
    otherwise = _respelt(text, subject) if respell else None
    if otherwise is None:
        raise RequestError(
            f"The subject {_cut(subject)} is not in the prompt {_cut(text)}; write {{}} where it goes, or spell it as "
            "it is there."
        )
    return otherwise


def _respelt(text: str, subject: str) -> tuple[int, int] | None:
    """Where ``text`` has the subject last as whole words, case, Unicode form (NFC, NFD, NFKC, NFKD) and the number of
    spaces apart."""
    wanted = "".join(plain for plain, _, _ in _plainly(subject.strip()))
    pieces = _plainly(text)
    plain = "".join(piece for piece, _, _ in pieces)
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    at = 0
    for piece, first, last in pieces:  # a match may not begin or end inside of what is one letter
        starts[at] = first
        at += len(piece)
        ends[at] = last
    found = None
    for place in (match.start() for match in re.finditer(f"(?={re.escape(wanted)})", plain)):
        end = place + len(wanted)
        if place in starts and end in ends and _stands_alone(text, starts[place], ends[end]):
            found = (starts[place], ends[end])
    return found


def _plainly(text: str) -> list[tuple[str, int, int]]:
    """``text`` letter by letter, or a run of spaces as one: folded in case and form, with where it begins and ends."""
    pieces: list[tuple[str, int, int]] = []
    for match in re.finditer(r"\s+|.", text, re.DOTALL):
        letter, start, end = match[0], match.start(), match.end()
        plain = " " if letter.isspace() else unicodedata.normalize("NFKD", letter.casefold()).casefold()
        if pieces and not letter.isspace() and unicodedata.combining(letter[0]):
            before, first, _ = pieces.pop()  # an accent belongs to the letter before it
            plain, start = unicodedata.normalize("NFKD", before + plain), first
        pieces.append((plain, start, end))
    return pieces


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether a part of ``text`` is not cut out of a longer word; scripts without upper and lower case have no spaces
    to tell that by."""

    def runs_on(inside: str, outside: str) -> bool:
        return all(one.isalnum() and (one.isdigit() or one.lower() != one.upper()) for one in (inside, outside))

    before = start > 0 and runs_on(text[start], text[start - 1])
    return not before and not (end < len(text) and runs_on(text[end - 1], text[end]))


def _identity(fields: Mapping[str, Any]) -> str:
    value = next((fields[name] for name in ("id", "case_id") if fields.get(name) not in (None, "")), "")
    return str(value)


def _object(value: Any, name: str) -> _Fields:
    if not isinstance(value, _Fields):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected an object.")
    return value


def _objects(fields: _Fields, name: str) -> list[_Fields]:
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected a list of objects.")
    return [_object(one, f"{name}[{place}]") for place, one in enumerate(value)]


def _text(fields: _Fields, name: str) -> str:
    return _as_text(fields.get(name), fields, name)


def _as_text(value: Any, fields: _Fields, name: str) -> str:
    if value is None and fields.raw.get(name) is not None:
        raise RequestError(f"The field '{name}' has no text: it is {_describe(fields[name])}.")
    if value is None and name not in fields:
        raise RequestError(f"The field '{name}' is missing; {_found(fields)}.")
    if value in _NOTHING:
        raise RequestError(f"The field '{name}' is empty.")
    if not isinstance(value, str):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected text.")
    if not value.strip():
        raise RequestError(f"The field '{name}' is empty.")
    return value.strip()


def _prompt(fields: _Fields, name: str) -> str:
    """A text with the white space at its ends, which is part of a prompt."""
    _text(fields, name)
    return str(fields.get(name))


def without_last_space(prompt: str) -> str:
    """A prompt of CounterFact, zsRE or ``known_1000``, where a space at the end stands for the one of the answer."""
    return prompt.rstrip(" ")


def _published(prompts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(without_last_space, prompts))


def _published_at(name: str, prompt: str) -> str:
    """The same for the prompt of a flat record, which is zsRE's where it is in ``src``."""
    return without_last_space(prompt) if name == "src" else prompt


def _optional_prompt(fields: _Fields, name: str) -> str | None:
    value = fields.get(name)
    return None if value is None or value == "" else _prompt(fields, name)


def join_of(fields: _Fields | Mapping[str, Any]) -> str | None:
    """What stands between prompt and target; ``None`` where the record leaves it to the prompt's last character.

    Raises:
        RequestError: it is no text.
    """
    value = fields.get("join")
    if value is not None and not isinstance(value, str):
        raise RequestError(f'The field \'join\' is {_describe(value)}; expected text, such as "" or " ".')
    return value


def _optional_text(fields: _Fields, name: str) -> str | None:
    value = fields.get(name)
    return None if value is None or value == "" else _text(fields, name)


def _answer(fields: _Fields, name: str) -> str:
    """An object: text, ``{"str": text}``, or the first of a list (of lists) of accepted answers."""
    value = fields.get(name)
    while isinstance(value, list) and value:
        value = value[0]
    return _as_text(_plain_answer(value), fields, name)


def _plain_answer(value: Any) -> Any:
    """The text of ``{"str": text, "id": ...}``, whose id says the same in Wikidata's numbers; a number as text."""
    if isinstance(value, Mapping):
        value, _ = value.get("str"), value.get("id")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _optional_answer(fields: _Fields, name: str) -> str | None:
    return _answer(fields, name) if fields.get(name) not in (None, "", [], [[]]) else None


def _answers(value: Any) -> tuple[str, ...]:
    """Every accepted answer of text, ``{"str": text}``, a number, or lists of them; each once, in their order."""
    value = _plain_answer(value)
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(answer for part in value for answer in _answers(part)))
    return (value.strip(),) if isinstance(value, str) and value.strip() else ()


def _texts(fields: _Fields, name: str) -> tuple[str, ...]:
    """A list of texts, or one text, as they are; empty ones are dropped."""
    value = fields.get(name)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise RequestError(f"The field '{name}' is {_describe(value)}; expected a list of texts.")
    return tuple(text for text in values if text.strip())


def _describe(value: Any) -> str:
    value = value.raw if isinstance(value, _Fields) else value
    return f"{type(value).__name__} ({_cut(value, 40)})"


def _cut(value: object, most: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _found(fields: _Fields) -> str:
    """What a record has, for a sentence on what it lacks."""
    names = fields.filled()
    more = f" and {len(names) - _MOST_FIELDS:,} more" if len(names) > _MOST_FIELDS else ""
    return f"the fields with something in them are: {', '.join(names[:_MOST_FIELDS]) or 'none'}{more}"


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
