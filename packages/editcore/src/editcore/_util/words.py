"""Formats numbers and long texts for sentences and tables."""

from __future__ import annotations

from typing import Literal

__all__ = ["counted", "counted_of", "cut", "quoted", "roughly", "with_article", "with_full_stop"]


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    >>> counted(1, "fact"), counted(2000, "fact"), counted(2, "batch", "batches")
    ('1 fact', '2,000 facts', '2 batches')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"


def cut(text: str, most: int = 60, *, keep: Literal["start", "end"] = "start") -> str:
    """A text of at most ``most`` characters; an ellipsis stands for the rest.

    >>> cut("a long story", 7), cut("a long story", 7, keep="end")
    ('a long…', '… story')
    """
    if len(text) <= most:
        return text
    return f"{text[: most - 1]}…" if keep == "start" else f"…{text[-(most - 1) :]}"


def quoted(value: object, most: int = 120) -> str:
    """A value as Python writes it, in at most ``most`` characters.

    >>> quoted("Paris"), quoted([1, 2, 3, 4], 9)
    ("'Paris'", '[1, 2,...')
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def counted_of(count: int, noun: str, data: str, *, more: int = 0) -> str:
    """A number of things of some data, and how many more there are.

    >>> counted_of(6, "edit", "facts.jsonl"), counted_of(6, "edit", "facts.jsonl", more=1)
    ('6 edits of facts.jsonl', '6 edits of facts.jsonl and 1 more')
    """
    return f"{counted(count, noun)} of {data}" + (f" and {more:,} more" if more else "")


def roughly(seconds: float) -> str:
    """An estimated time in words.

    >>> roughly(0.2), roughly(42.4), roughly(200)
    ('1 s', '42 s', '3 min')
    """
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{round(seconds / 60)} min"


def with_article(noun: str) -> str:
    """A noun with its indefinite article.

    >>> with_article("editor"), with_article("str")
    ('an editor', 'a str')
    """
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def with_full_stop(sentence: str) -> str:
    """A sentence with a full stop, unless it ends with one, or with ``!`` or ``?``.

    >>> with_full_stop("It failed"), with_full_stop("Why?")
    ('It failed.', 'Why?')
    """
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
