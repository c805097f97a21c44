"""The memory of replay: a bounded set of edited facts. Torch appears in annotations only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from editcore import EditRequest, KnownTarget

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BufferStatistics", "EditRecord", "ReplayBuffer", "compute_edit_priority"]


def compute_edit_priority(success: float | None, importance: float = 1.0) -> float:
    """How much a fact needs replay: ``importance · (1 - success)``. A fact that was never checked counts as failed.

    >>> compute_edit_priority(0.75, importance=2.0)
    0.5

    Args:
        success: of the last check, from 0 (nothing left of the edit) to 1 (held exactly).
    """
    return importance * (1.0 - (success or 0.0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EditRecord:
    """One edited fact, as it is kept for replay."""

    request: EditRequest
    known: KnownTarget
    """The value it was first solved for, and its key as of the last batch it was part of."""
    batch: int
    """Index of the batch that edited it: its timestamp. No clock is read, so that a run can be repeated."""
    order: int
    """Position among all facts edited in the run, from 0."""
    access_count: int = 0
    """Times it was replayed."""
    strength: float | None = None
    """How well the model held it when last checked, from 0 to 1; ``None`` if it never was."""
    priority: float = 1.0
    """How much it needs replay; see :func:`compute_edit_priority`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferStatistics:
    """Counts over the life of a buffer."""

    size: int
    unique_subjects: int
    sampled: int
    """Facts replayed, each time counted."""
    evictions: int
    """Facts dropped because the buffer was full."""
    replacements: int
    """Facts dropped because they were edited anew."""


class ReplayBuffer:
    """Edited facts by subject and prompt, ``capacity`` at most.

    A fact that is edited anew replaces its older record. A full buffer drops the record that was edited longest ago
    (``fifo``), or edited or replayed longest ago (``lru``).
    """

    def __init__(self, capacity: int, *, eviction: Literal["fifo", "lru"] = "fifo") -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, found {capacity}")
        self.capacity = capacity
        self.eviction = eviction
        self._records: dict[tuple[str, str], EditRecord] = {}  # the next to be dropped comes first
        self._stored = self._sampled = self._evictions = self._replacements = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> tuple[EditRecord, ...]:
        """All records, in the order in which their facts were edited."""
        return tuple(sorted(self._records.values(), key=lambda record: record.order))

    @property
    def statistics(self) -> BufferStatistics:
        """Counts as of now."""
        return BufferStatistics(
            size=len(self),
            unique_subjects=len({subject for subject, _ in self._records}),
            sampled=self._sampled,
            evictions=self._evictions,
            replacements=self._replacements,
        )

    def get(self, request: EditRequest) -> EditRecord | None:
        """The record of exactly this request; ``None`` if its fact is not kept, or with another target."""
        record = self._records.get(request.fact_key)
        return record if record is not None and record.request == request else None

    def store(self, request: EditRequest, known: KnownTarget, *, batch: int) -> EditRecord:
        """Keep a fact that was just edited."""
        if self._records.pop(request.fact_key, None) is not None:
            self._replacements += 1
        elif len(self._records) == self.capacity:
            del self._records[next(iter(self._records))]
            self._evictions += 1
        record = EditRecord(request=request, known=known, batch=batch, order=self._stored)
        self._stored += 1
        self._records[request.fact_key] = record
        return record

    def replayed(self, record: EditRecord, keys: Mapping[str, Tensor]) -> None:
        """Note that a kept fact was replayed, at ``keys``.

        The value stays the one it was first solved for: measuring it anew each time would let rounding accumulate.
        """
        known = KnownTarget(keys={**record.known.keys, **keys}, values=record.known.values)
        self._put(replace(record, known=known, access_count=record.access_count + 1))
        self._sampled += 1
        if self.eviction == "lru":
            self._records[record.request.fact_key] = self._records.pop(record.request.fact_key)

    def checked(self, record: EditRecord, strength: float) -> None:
        """Note how well the model holds a kept fact."""
        self._put(replace(record, strength=strength, priority=compute_edit_priority(strength)))

    def _put(self, record: EditRecord) -> None:
        if record.request.fact_key not in self._records:
            raise KeyError(f"'{record.request.text}' is not in the buffer")
        self._records[record.request.fact_key] = record  # keeps its place
