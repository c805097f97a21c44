"""Which facts are replayed. A strategy is a function that depends only on the records and the random generator it is
given.

Another package offers one as a component of kind ``replay.strategy`` whose target is such a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from edit_replay.buffer import EditRecord

__all__ = ["Strategy", "priority", "random", "recent"]

Strategy = Callable[[Sequence[EditRecord], int, Random], list[EditRecord]]
"""``(records, count, rng)``: returns ``count`` different ones of ``records``, which are in the order in which they were
edited and at least ``count`` in number."""


def random(records: Sequence[EditRecord], count: int, rng: Random) -> list[EditRecord]:
    """Facts drawn uniformly, without repeats."""
    return rng.sample(records, count)


def priority(records: Sequence[EditRecord], count: int, rng: Random) -> list[EditRecord]:
    """Facts that failed their last check first, then the highest priority; among equals those replayed least, then the
    oldest."""

    def need(record: EditRecord) -> tuple[bool, float, int, int]:
        return not record.failed, -record.priority, record.access_count, record.order

    return sorted(records, key=need)[:count]


def recent(records: Sequence[EditRecord], count: int, rng: Random) -> list[EditRecord]:
    """The facts edited last, the latest first."""
    return sorted(records, key=lambda record: -record.order)[:count]
