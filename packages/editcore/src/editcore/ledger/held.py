"""The keys that batches left alone. On the disk, a batch has the difference from the batch before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

from editcore.interfaces.errors import PluginError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.values import HeldKey
from editcore.ledger.lines import HeldGroup, HeldLine
from editcore.ledger.tensors import Lazy

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HeldReferences"]

_Reference = tuple[int, int, float]
"""A batch, the index of a fact among its requests, and the weight of the key."""

_MAX_CHAIN = 64
"""So many batches in a row are kept as differences; then one has all its references again."""


class HeldReferences:
    """What each batch of a ledger left alone.

    Args:
        entry_of: the batch with an index; ``None`` if there is none.
    """

    def __init__(self, entry_of: Callable[[int], LedgerEntry | None]) -> None:
        self._entry_of = entry_of
        self._lines: dict[int, HeldLine] = {}
        self._latest: int | None = None
        self._of_latest = Counter[_Reference]()
        self._read: dict[tuple[int, int], Lazy[Tensor]] = {}
        """The keys of the batch whose held keys were looked at last, by batch and row."""

    def line_of(self, entry: LedgerEntry) -> HeldLine | None:
        """What the line of a new batch says about its held keys; ``None`` if it has none.

        Raises:
            PluginError: a key is not in the ledger.
        """
        wanted = Counter(self._references(entry))
        if not wanted:
            return None
        whole = HeldLine(added=_groups(wanted))
        if self._latest is None or len(self._chain(self._latest)) >= _MAX_CHAIN:
            return whole
        removed, added = self._of_latest - wanted, wanted - self._of_latest
        if removed.total() + added.total() >= wanted.total():
            return whole
        return HeldLine(like=self._latest, removed=_groups(removed), added=_groups(added))

    def take(self, batch: int, line: HeldLine) -> Sequence[HeldKey]:
        """Note the line of a batch.

        Returns:
            Its held keys, in a fixed order. They are made whenever they are looked at.

        Raises:
            ValueError: it refers to something that is not there.
        """
        if line.like is None:
            known = Counter[_Reference]()
        elif line.like == self._latest:
            known = self._of_latest
        elif line.like in self._lines:
            known = self._of(line.like)
        else:
            raise ValueError(f"batch {batch} refers to the held keys of batch {line.like}, which has none")
        removed, added = Counter(_ungrouped(line.removed)), Counter(_ungrouped(line.added))
        for earlier, row, _ in added:
            entry = self._entry_of(earlier)
            if entry is None or not entry.applied or row >= len(entry.requests):
                raise ValueError(f"batch {batch} holds row {row} of batch {earlier}, which is not there")
        for reference, count in removed.items():
            if known[reference] < count:
                raise ValueError(f"batch {batch} leaves out a held key that batch {line.like} does not have")
        self._lines[batch] = line
        self._latest, self._of_latest = batch, _changed(known, removed, added)
        return _Held(lambda: self._keys(batch))

    def _keys(self, batch: int) -> tuple[HeldKey, ...]:
        """What a batch left alone. Keys that were read for the batch before are not read again, because the next batch
        of a sequence left almost the same alone."""
        references = self._of(batch)
        facts = dict.fromkeys((earlier, row) for earlier, row, _ in references)
        self._read = {fact: self._read[fact] if fact in self._read else self._keys_of(*fact) for fact in facts}
        found = []
        for earlier, row, weight in references.elements():
            name = self._name(earlier, row)
            found.append(HeldKey(batch=earlier, request_id=name, keys=self._read[earlier, row], weight=weight))
        return HeldKey.ordered(found)

    def _chain(self, batch: int) -> list[HeldLine]:
        """The lines that say what a batch left alone, the last one first."""
        chain = [self._lines[batch]]
        while (like := chain[-1].like) is not None:
            chain.append(self._lines[like])
        return chain

    def _of(self, batch: int) -> Counter[_Reference]:
        found = Counter[_Reference]()
        for line in reversed(self._chain(batch)):
            found = _changed(found, Counter(_ungrouped(line.removed)), Counter(_ungrouped(line.added)))
        return found

    def _name(self, batch: int, row: int) -> str:
        entry = self._entry_of(batch)
        assert entry is not None  # checked in take
        return entry.requests[row].id

    def _keys_of(self, batch: int, row: int) -> Lazy[Tensor]:
        entry, name = self._entry_of(batch), self._name(batch, row)
        assert entry is not None
        return Lazy(lambda: dict(entry.known[name].keys))

    def _references(self, entry: LedgerEntry) -> Iterator[_Reference]:
        places: dict[int, dict[str, int]] = {}
        for key in entry.held:
            if key.batch not in places:
                found = self._entry_of(key.batch)
                requests = found.requests if found is not None and found.applied else ()
                places[key.batch] = {request.id: row for row, request in enumerate(requests)}
            if key.request_id not in places[key.batch]:
                raise PluginError(
                    f"Batch {entry.batch} holds the key of '{key.request_id}' of batch {key.batch}, which the ledger "
                    "does not have."
                )
            yield key.batch, places[key.batch][key.request_id], key.weight


class _Held(Sequence[HeldKey]):
    """Held keys that are made whenever they are looked at: a ledger of many batches has millions of them."""

    def __init__(self, make: Callable[[], tuple[HeldKey, ...]]) -> None:
        self._make = make

    @overload
    def __getitem__(self, index: int) -> HeldKey: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[HeldKey]: ...
    def __getitem__(self, index: int | slice) -> HeldKey | Sequence[HeldKey]:
        return self._make()[index]

    def __iter__(self) -> Iterator[HeldKey]:
        return iter(self._make())

    def __len__(self) -> int:
        return len(self._make())


def _changed(
    known: Counter[_Reference], removed: Counter[_Reference], added: Counter[_Reference]
) -> Counter[_Reference]:
    """``known`` itself, without ``removed`` and with ``added``."""
    for reference, count in removed.items():
        known[reference] -= count
        if not known[reference]:
            del known[reference]
    known.update(added)
    return known


def _groups(references: Counter[_Reference]) -> tuple[HeldGroup, ...]:
    by_weight: dict[float, dict[int, list[int]]] = {}
    for batch, row, weight in sorted(references.elements()):
        by_weight.setdefault(weight, {}).setdefault(batch, [batch]).append(row)
    return tuple(
        HeldGroup(weight=weight, rows=tuple(map(tuple, rows.values()))) for weight, rows in sorted(by_weight.items())
    )


def _ungrouped(groups: Sequence[HeldGroup]) -> Iterator[_Reference]:
    for group in groups:
        for batch, *rows in group.rows:
            for row in rows:
                yield batch, row, group.weight
