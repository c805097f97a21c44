"""Finds where a prompt mentions its subject."""

from __future__ import annotations

import re
import unicodedata

from editcore._util.words import quoted
from editcore.datasets.fields import Fields
from editcore.interfaces.errors import RequestError

__all__ = ["mention_of", "mentions", "with_placeholder"]


def with_placeholder(fields: Fields, subject: str, prompt: str) -> tuple[str, str]:
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


def mention_of(subject: str, prompt: str, *, respell: bool) -> tuple[int, int]:
    """Start and end of the last mention of ``subject`` in ``prompt``.

    A mention inside a longer word counts only if there is no other.

    Args:
        respell: whether to accept a mention that differs by case, Unicode form or spaces, if there is no other.

    Raises:
        RequestError: the prompt does not mention the subject.
    """
    places = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)]
    start = places[-1] if places else prompt.rfind(subject)
    if start >= 0:
        return start, start + len(subject)
    respelt = _respelt_mention(subject, prompt) if respell else None
    if respelt is None:
        raise RequestError(
            f"The subject {quoted(subject)} is not in the prompt {quoted(prompt)}; write {{}} where it goes, or spell "
            "it as it is there."
        )
    return respelt


def mentions(text: str, phrase: str) -> bool:
    """Whether a text contains a phrase as whole words, whatever its case.

    >>> mentions("Made by Ford Motor", "ford"), mentions("Oxford is old", "ford")
    (True, False)
    """
    # The quick look first: whole data sets are searched.
    return phrase.casefold() in text.casefold() and _respelt_mention(phrase, text) is not None


def _respelt_mention(subject: str, prompt: str) -> tuple[int, int] | None:
    """The last mention as whole words, whatever its case, Unicode form (NFC, NFD, NFKC, NFKD) and number of spaces."""
    wanted = "".join(folded for folded, _, _ in _folded_letters(subject.strip()))
    letters = _folded_letters(prompt)
    text = "".join(folded for folded, _, _ in letters)
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    position = 0
    for folded, start, end in letters:  # a mention may not begin or end inside a letter
        starts[position] = start
        position += len(folded)
        ends[position] = end
    found = None
    for first in (match.start() for match in re.finditer(f"(?={re.escape(wanted)})", text)):
        last = first + len(wanted)
        if first in starts and last in ends and _is_whole_words(prompt, starts[first], ends[last]):
            found = (starts[first], ends[last])
    return found


def _folded_letters(text: str) -> list[tuple[str, int, int]]:
    """Each letter of ``text``, folded in case and Unicode form, with its start and end in ``text``. Spaces in a row are
    one letter."""
    letters: list[tuple[str, int, int]] = []
    for match in re.finditer(r"\s+|.", text, re.DOTALL):
        letter, start, end = match[0], match.start(), match.end()
        folded = " " if letter.isspace() else unicodedata.normalize("NFKD", letter.casefold()).casefold()
        if letters and not letter.isspace() and unicodedata.combining(letter[0]):
            before, first, _ = letters.pop()  # an accent belongs to the letter before it
            folded, start = unicodedata.normalize("NFKD", before + folded), first
        letters.append((folded, start, end))
    return letters


def _is_whole_words(text: str, start: int, end: int) -> bool:
    """Whether ``text[start:end]`` is not cut out of a longer word.

    Scripts without upper and lower case do not put spaces between words, so nothing in them counts as cut.
    """

    def runs_on(inside: str, outside: str) -> bool:
        return all(
            letter.isalnum() and (letter.isdigit() or letter.lower() != letter.upper()) for letter in (inside, outside)
        )

    before = start > 0 and runs_on(text[start], text[start - 1])
    return not before and not (end < len(text) and runs_on(text[end - 1], text[end]))
