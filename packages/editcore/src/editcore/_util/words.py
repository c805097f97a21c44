"""Numbers in sentences."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "fact"), counted(2000, "fact")
    ('1 fact', '2,000 facts')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
