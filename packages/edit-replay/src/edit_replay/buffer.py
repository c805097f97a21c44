"""The buffer of replay: a bounded set of edited facts. Torch appears in annotations only."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from editcore import EditRequest, KnownTarget

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BufferStatistics", "EditRecord", "ReplayBuffer", "compute_edit_priority"]

PASSED = 0.5
"""A check fails if its success is less than this."""


def compute_edit_priority(success: float | None, importance: float = 1.0) -> float:
    """How much a fact needs replay: ``importance · (1 - success)``. A fact that was never checked counts as failed.

    >>> compute_edit_priority(0.75, importance=2.0)
    0.5

    Args:
        success: success of the last check, from 0 (nothing is left of the edit) to 1 (it holds exactly).
    """
    return importance * (1.0 - (success or 0.0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EditRecord:
    """One edited fact, as it is kept for replay."""

    request: EditRequest
    known: KnownTarget
    """The value from its last optimisation, and its key in the last batch it was part of. Empty if its editor keeps
    neither."""
    batch: int
    """Index of the batch that edited it. This is its age: no clock is read, so that a run can be repeated."""
    order: int
    """Position among all facts edited in the run, from 0."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """The batch whose ledger entry has the key, by weight name."""
    importance: float = 1.0
    reached: float | None = None
    """Probability per target token at which the optimisation of its value ended; ``None`` if it had none."""
    access_count: int = 0
    """Times it was replayed."""
    strength: float | None = None
    """How well the projection gave its value at the last check: 1 − ‖Wk − v‖ / ‖v‖, at least 0; ``None`` if it was
    never checked."""
    success: float | None = None
    """Probability per target token that the model gave it at the last check; ``None`` if it was never measured."""

    @property
    def checked(self) -> float | None:
        """Success of the last check: as measured on the model, or else the strength."""
        return self.strength if self.success is None else self.success

    @property
    def failed(self) -> bool:
        """Whether the last check failed, or there was none."""
        return self.checked is None or self.checked < PASSED

    @property
    def priority(self) -> float:
        """How much it needs replay; see :func:`compute_edit_priority`."""
        return compute_edit_priority(self.checked, self.importance)


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferStatistics:
    """Counts over the life of a buffer."""

    size: int
    unique_subjects: int
    hits: int
    """Replays: a fact counts each time it is replayed."""
    refreshed: int
    """Those of them in which the fact was optimised anew."""
    evictions: int
    """Facts dropped because the buffer was full."""
    replacements: int
    """Facts dropped because they were edited anew, or their subject was, if the buffer keeps one fact per subject."""


class ReplayBuffer:
    """At most ``capacity`` edited facts, by subject or by subject and prompt.

    A newer fact replaces the older record of its subject (``duplicates = "subject"``) or of the same prompt
    (``"fact"``). A full buffer drops the record that was edited longest ago (``fifo``), or edited or replayed longest
    ago (``lru``).
    """

    def __init__(
        self,
        capacity: int,
        *,
        eviction: Literal["fifo", "lru"] = "fifo",
        duplicates: Literal["subject", "fact"] = "fact",
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, found {capacity}")
        self.capacity = capacity
        self.eviction = eviction
        self.duplicates = duplicates
        self._records: dict[Hashable, EditRecord] = {}  # the next to be dropped comes first
        self._stored = self._hits = self._refreshed = self._evictions = self._replacements = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> tuple[EditRecord, ...]:
        """All records, in the order in which their facts were edited."""
        return tuple(sorted(self._records.values(), key=lambda record: record.order))

    @property
    def statistics(self) -> BufferStatistics:
        """The counts so far."""
        return BufferStatistics(
            size=len(self),
            unique_subjects=len({record.request.subject for record in self._records.values()} - {""}),
            hits=self._hits,
            refreshed=self._refreshed,
            evictions=self._evictions,
            replacements=self._replacements,
        )

    def key(self, request: EditRequest) -> Hashable:
        """What a newer request shares with the record that it replaces."""
        return request.subject_key if self.duplicates == "subject" and request.subject else request.fact_key

    def get(self, request: EditRequest) -> EditRecord | None:
        """The record of exactly this request; ``None`` if its fact is not kept, or is kept with another target."""
        record = self._records.get(self.key(request))
        return record if record is not None and record.request == request else None

    def store(
        self,
        request: EditRequest,
        known: KnownTarget,
        *,
        batch: int,
        importance: float = 1.0,
        reached: float | None = None,
    ) -> EditRecord:
        """Keep a fact that was just edited."""
        key = self.key(request)
        if self._records.pop(key, None) is not None:
            self._replacements += 1
        elif len(self._records) == self.capacity:
            del self._records[next(iter(self._records))]
            self._evictions += 1
        record = EditRecord(
            request=request,
            known=known,
            batch=batch,
            order=self._stored,
            sources=dict.fromkeys(known.keys, batch),
            importance=importance,
            reached=reached,
        )
        self._stored += 1
        self._records[key] = record
        return record

    def replayed(
        self,
        record: EditRecord,
        known: KnownTarget,
        *,
        batch: int,
        refreshed: bool = False,
        reached: float | None = None,
    ) -> None:
        """Note that a kept fact was replayed in ``batch``, at the keys of ``known``.

        Its value stays: measuring it anew each time would let rounding accumulate. Only a fact that was optimised anew
        (``refreshed``) gets a new value, and a new probability ``reached``.
        """
        values = _Joined(record.known.values, known.values) if refreshed else record.known.values
        updated = replace(
            record,
            known=KnownTarget(keys=_Joined(record.known.keys, known.keys), values=values),
            sources={**record.sources, **dict.fromkeys(known.keys, batch)},
            reached=reached if refreshed else record.reached,
            access_count=record.access_count + 1,
        )
        self._put(updated)
        self._hits += 1
        self._refreshed += refreshed
        if self.eviction == "lru":
            key = self.key(record.request)
            self._records[key] = self._records.pop(key)

    def load(self) -> None:
        """Read the keys and values of all records into memory. A target that the ledger gave is read when it is looked
        at; most facts of a long history have left the buffer before that."""
        for record in self.records:
            keys, values = record.known.keys, record.known.values
            if not (type(keys) is type(values) is dict):
                self._put(replace(record, known=replace(record.known, keys=dict(keys), values=dict(values))))

    def checked(self, record: EditRecord, *, strength: float | None, success: float | None = None) -> None:
        """Note how well the model holds a kept fact."""
        self._put(replace(record, strength=strength, success=success))

    def _put(self, record: EditRecord) -> None:
        key = self.key(record.request)
        if key not in self._records:
            raise KeyError(f"'{record.request.text}' is not in the buffer")
        self._records[key] = record  # keeps its place


class _Joined(Mapping[str, "Tensor"]):
    """Two mappings as one; the second counts where both have a name. Their tensors are not looked at before they are
    needed."""

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self._of: dict[str, Mapping[str, Tensor]] = {
            name: found._of[name] if isinstance(found, _Joined) else found
            for found in (first, second)
            for name in found
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)
