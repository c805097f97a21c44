"""The strategy."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edit_replay.buffer import EditRecord

__all__ = ["in_turn"]


def in_turn(records: Sequence[EditRecord], count: int, rng: Random) -> list[EditRecord]:
    """Facts that were replayed least; among equals the oldest. Nothing is drawn, so that no fact waits by bad luck.

    Args:
        records: in the order in which they were edited; at least ``count``.
        rng: not used.
    """
    return sorted(records, key=lambda record: (record.access_count, record.order))[:count]
