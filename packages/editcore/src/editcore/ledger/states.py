"""What is undone in a ledger, and what a batch is therefore without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from editcore.interfaces.documented import documented

__all__ = ["Edit", "LeftOut", "State"]

Edit = tuple[int, str]
"""Batch and id of an edit."""


@documented
@dataclass(frozen=True, slots=True)
class LeftOut:
    """What makes a batch need another solution than its first."""

    edits: frozenset[Edit] = frozenset()
    """Its own edits that are undone, and earlier ones that it builds on and whose state is another one than when it
    came."""
    never: frozenset[Edit] = frozenset()
    """Edits of it and of earlier batches that are undone as if they had never been solved."""

    def __bool__(self) -> bool:
        return bool(self.edits or self.never)

    def own(self, batch: int) -> frozenset[str]:
        """Ids of the edits of a batch that are undone."""
        return frozenset(name for index, name in self.edits if index == batch)


@documented
@dataclass(frozen=True, slots=True)
class State:
    """What is undone."""

    undone: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Ids by batch."""
    never: frozenset[Edit] = frozenset()
    """Those of them that are undone as if they had never been solved."""

    def has(self, edit: Edit) -> bool:
        """Whether an edit is undone."""
        return edit[1] in self.undone.get(edit[0], ())

    def without(self, out: LeftOut, *, before: int) -> State:
        """The state after ``out``, as far as it is about batches before one: edits that are active are undone, and the
        others are active."""
        undone = dict(self.undone)
        for index, name in {*out.edits, *(edit for edit in out.never if not self.has(edit))}:
            if index < before:
                undone[index] = undone.get(index, frozenset()) ^ {name}
        return State(undone, self.never | {edit for edit in out.never if edit[0] < before})
