"""Numbers and long texts in sentences and tables."""

from __future__ import annotations

from typing import Literal

__all__ = ["counted", "cut"]


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "fact"), counted(2000, "fact")
    ('1 fact', '2,000 facts')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def cut(text: str, most: int = 60, *, keep: Literal["start", "end"] = "start") -> str:
    """A text of at most so many characters; an ellipsis stands for the rest.

    >>> cut("a long story", 7), cut("a long story", 7, keep="end")
    ('a long…', '… story')
    """
    if len(text) <= most:
        return text
    return f"{text[: most - 1]}…" if keep == "start" else f"…{text[-(most - 1) :]}"
