"""Which facts make a batch fail: a search that tries parts of it. Knows no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Found", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search; every item is in one of the three groups."""

    kept: tuple[str, ...]
    """Items that pass together."""
    culprits: tuple[str, ...]
    """Items each of which fails together with the items kept before it, which pass without it."""
    unexamined: tuple[str, ...]
    """Items that the search did not come to."""


def split(items: Sequence[str], passes: Callable[[Sequence[str]], bool], *, looks: int) -> Found:
    """Split items that fail together.

    The items kept so far pass together. Among the waiting items, the search looks for the one whose addition makes them
    fail: the kept items and all waiting ones before it pass, and with it they fail. That item is a culprit; the items
    before it are kept, and those after it go on waiting. The search gallops from the end, where the suspects are: to
    find a single culprit takes one look if it is the last item, else about 2 log₂ of its distance from the end.

    Args:
        items: the most suspect last.
        passes: whether the given items pass together. It is called at most ``looks`` times, and never for no items or
            for all.
    """
    kept: list[str] = []
    culprits: list[str] = []
    waiting = list(items)
    known_to_fail = True
    left, good = looks, 0

    def passes_with(number: int) -> bool:
        """Whether the first ``number`` waiting items pass with those kept."""
        nonlocal left
        if not kept and not number:
            return True
        if left == 0:
            raise _OutOfLooksError
        left -= 1
        return passes([*kept, *waiting[:number]])

    try:
        while waiting:
            if not known_to_fail and passes_with(len(waiting)):
                kept += waiting
                waiting = []
                break
            bad, step = len(waiting), 1
            while bad > 0 and step < bad:  # gallop: leave out the last one, three, seven, ...
                if passes_with(bad - step):
                    good = bad - step
                    break
                bad, step = bad - step, 2 * step
            while bad - good > 1:
                middle = (good + bad) // 2
                good, bad = (middle, bad) if passes_with(middle) else (good, middle)
            culprits.append(waiting[bad - 1])
            kept += waiting[:good]
            waiting = waiting[bad:]
            known_to_fail, good = False, 0
    except _OutOfLooksError:
        kept += waiting[:good]
        waiting = waiting[good:]
    return Found(kept=tuple(kept), culprits=tuple(culprits), unexamined=tuple(waiting))


class _OutOfLooksError(Exception):
    """Raised when all looks are used, to end the search."""
