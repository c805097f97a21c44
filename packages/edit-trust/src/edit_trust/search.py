"""Which facts make a batch fail: a search that tries parts of it. Knows no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Found", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a batch was split into; every item is in one of the three."""

    kept: tuple[str, ...]
    """They pass together."""
    culprits: tuple[str, ...]
    """Each fails with those kept before it, which pass without it."""
    unexamined: tuple[str, ...]
    """Nothing is known of them: the search ended before."""


def split(items: Sequence[str], passes: Callable[[Sequence[str]], bool], *, looks: int) -> Found:
    """Split items that fail together.

    The items kept so far pass. Of those that wait, a beginning is looked for that fails with them and passes without
    its last item; that one is a culprit, what stands before it is kept, and the rest goes on waiting. The search
    gallops from the end, where the suspects are: one culprit in the last place takes one look, any other about 2 log₂
    of its distance from the end.

    Args:
        items: the most suspect last.
        passes: whether items pass together; no items do. Asked ``looks`` times at most, never for all ``items``.
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
            while bad > 0 and step < bad:  # gallop: the last one, two, four, ... left out
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
    """Ends a search."""
