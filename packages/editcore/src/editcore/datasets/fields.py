"""The fields of a published record, read by name and type. Which fields were read is remembered, so that others can be
counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from editcore._util.words import quoted
from editcore.interfaces.errors import RequestError

__all__ = [
    "Fields",
    "Unread",
    "accepted_answers",
    "as_object",
    "identity_of",
    "join_of",
    "listed",
    "without_last_space",
]

_EMPTY: tuple[Any, ...] = (None, "", [], {})

_MAX_FIELDS = 20
"""Most fields of a record that a message names; a table may have hundreds."""

Unread = Counter[str]
"""By the name of an unread field, the number of records that have it. The name is ``OUTER.INNER`` for a field inside
another."""


class Fields(Mapping[str, Any]):
    """The fields of a record, or of an object in it. It remembers which of them were read.

    The methods that read a field by its type raise :class:`RequestError` if the field is missing, empty, or of another
    type.

    Args:
        respelt: a list to which subjects are added that are spelt differently in their prompt, each with that spelling;
            ``None`` if this is an error.
    """

    def __init__(self, raw: Mapping[str, Any], respelt: list[tuple[str, str]] | None) -> None:
        self.raw = raw
        self.respelt = respelt
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = self._with_memory(self.raw[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __contains__(self, name: object) -> bool:
        return name in self.raw

    def _with_memory(self, value: Any) -> Any:
        if isinstance(value, dict):
            return Fields(value, self.respelt)
        return [self._with_memory(element) for element in value] if isinstance(value, list) else value

    # Which fields there are

    def filled(self) -> list[str]:
        """The fields that are not empty."""
        return [name for name, value in self.raw.items() if value not in _EMPTY]

    def first(self, *names: str) -> str | None:
        """The first of these fields that is not empty; else the first that is there."""
        return next((name for name in names if self.raw.get(name) not in _EMPTY), None) or next(
            (name for name in names if name in self.raw), None
        )

    def read_all(self) -> dict[str, Any]:
        """All fields. They all count as read."""
        self._read = dict.fromkeys(self.raw)
        return dict(self.raw)

    def unread(self) -> dict[str, None]:
        """Fields that are not empty and were not read, in order."""
        found: dict[str, None] = {}
        for name in self.filled():
            if name not in self._read:
                found[name] = None
            else:
                found |= {f"{name}.{inner}": None for part in _objects_in(self._read[name]) for inner in part.unread()}
        return found

    def described(self) -> str:
        """The fields of the record, for a sentence on a missing field."""
        names = self.filled()
        more = f" and {len(names) - _MAX_FIELDS:,} more" if len(names) > _MAX_FIELDS else ""
        return f"the fields with something in them are: {', '.join(names[:_MAX_FIELDS]) or 'none'}{more}"

    # One field by its type

    def text(self, name: str) -> str:
        """A text, without white space at its ends."""
        return self._as_text(self.get(name), name)

    def optional_text(self, name: str) -> str | None:
        """A text; ``None`` if the field is missing or empty."""
        value = self.get(name)
        return None if value is None or value == "" else self.text(name)

    def prompt(self, name: str) -> str:
        """A prompt: a text with the white space at its ends."""
        self.text(name)
        return str(self.get(name))

    def optional_prompt(self, name: str) -> str | None:
        """A prompt; ``None`` if the field is missing or empty."""
        value = self.get(name)
        return None if value is None or value == "" else self.prompt(name)

    def answer(self, name: str) -> str:
        """An object of a fact: text, ``{"str": text}``, or the first of a list (of lists) of accepted answers."""
        value = self.get(name)
        while isinstance(value, list) and value:
            value = value[0]
        return self._as_text(_plain_answer(value), name)

    def optional_answer(self, name: str) -> str | None:
        """An object of a fact; ``None`` if the field is missing or empty."""
        return self.answer(name) if self.get(name) not in (None, "", [], [[]]) else None

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, or one text, as they are; empty ones are dropped."""
        value = self.get(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise RequestError(f"The field '{name}' is {_described(value)}; expected a list of texts.")
        return tuple(text for text in values if text.strip())

    def objects(self, name: str) -> list[Fields]:
        """A list of objects; empty if the field is missing."""
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise RequestError(f"The field '{name}' is {_described(value)}; expected a list of objects.")
        return [as_object(element, f"{name}[{place}]") for place, element in enumerate(value)]

    def _as_text(self, value: Any, name: str) -> str:
        if value is None and self.raw.get(name) is not None:
            raise RequestError(f"The field '{name}' has no text: it is {_described(self[name])}.")
        if value is None and name not in self:
            raise RequestError(f"The field '{name}' is missing; {self.described()}.")
        if value in _EMPTY:
            raise RequestError(f"The field '{name}' is empty.")
        if not isinstance(value, str):
            raise RequestError(f"The field '{name}' is {_described(value)}; expected text.")
        if not value.strip():
            raise RequestError(f"The field '{name}' is empty.")
        return value.strip()


def as_object(value: Any, name: str) -> Fields:
    """A value of a record as an object.

    Args:
        name: name of its field, for the message.

    Raises:
        RequestError: the value is not an object.
    """
    if not isinstance(value, Fields):
        raise RequestError(f"The field '{name}' is {_described(value)}; expected an object.")
    return value


def accepted_answers(value: Any) -> tuple[str, ...]:
    """Every accepted answer in a text, ``{"str": text}``, a number, or lists of these; each once, in order."""
    value = _plain_answer(value)
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(answer for part in value for answer in accepted_answers(part)))
    return (value.strip(),) if isinstance(value, str) and value.strip() else ()


def join_of(fields: Mapping[str, Any]) -> str | None:
    """The text between prompt and target; ``None`` if the record leaves it to the prompt's last character.

    Raises:
        RequestError: the field is not a text.
    """
    value = fields.get("join")
    if value is not None and not isinstance(value, str):
        raise RequestError(f'The field \'join\' is {_described(value)}; expected text, such as "" or " ".')
    return value


def identity_of(fields: Mapping[str, Any]) -> str:
    """The id of a record; empty if it has none."""
    value = next((fields[name] for name in ("id", "case_id") if fields.get(name) not in (None, "")), "")
    return str(value)


def without_last_space(prompt: str) -> str:
    """A prompt of CounterFact, zsRE or ``known_1000`` without the space at its end, which is the space before the
    answer."""
    return prompt.rstrip(" ")


def listed(names: Iterable[str]) -> str:
    """Names with ``or`` before the last.

    >>> listed(["alt", "answers"])
    'alt or answers'
    """
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _objects_in(value: Any) -> Iterator[Fields]:
    if isinstance(value, Fields):
        yield value
    elif isinstance(value, list):
        for element in value:
            yield from _objects_in(element)


def _plain_answer(value: Any) -> Any:
    """The text of ``{"str": text, "id": ...}``, whose Wikidata id is not needed; a number as text; other values as they
    are."""
    if isinstance(value, Mapping):
        value, _ = value.get("str"), value.get("id")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _described(value: Any) -> str:
    value = value.raw if isinstance(value, Fields) else value
    return f"{type(value).__name__} ({quoted(value, 40)})"
