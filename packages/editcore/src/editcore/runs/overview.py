"""What a run directory holds, for ``editctl status`` and ``editctl log``. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from editcore.interfaces.documented import documented
from editcore.interfaces.history import LedgerEntry, Signature
from editcore.interfaces.values import EditRequest
from editcore.ledger.ledger import Ledger
from editcore.ledger.lines import UndoLine
from editcore.ledger.undo import requests_of
from editcore.runs.check_record import CheckRecord
from editcore.runs.record import RunRecord
from editcore.runs.state import DirectoryState

__all__ = ["Event", "Overview", "events_of", "overview"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What a run directory holds now."""

    record: RunRecord
    """How it was made."""
    facts: int
    """Active facts."""
    batches: int
    """Batches that were written or rejected."""
    undone: int
    """Edits that are undone."""
    rejected: int
    """Requests that extensions kept out."""
    relative_change: dict[str, float] | None
    """By the address of a weight, ‖ΔW‖ / ‖W‖; ``None`` if it was not measured since the last change."""
    last: Event | None
    """The last change."""
    check: CheckRecord | None
    """The last check."""
    changes_since_check: int
    """Changes that came after it."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened to a directory."""

    what: str
    """``wrote``, ``undid`` or ``redid``."""
    batch: int | None
    """The batch that was written."""
    requests: tuple[EditRequest, ...]
    """Written, undone or redone."""
    rejected: int
    """Requests that extensions kept out."""
    signature: Signature | None
    """Who did it; ``None`` for a batch of the run that the directory was made by."""


def overview(directory: Path, record: RunRecord, ledger: Ledger) -> Overview:
    """What a directory holds."""
    state, check = DirectoryState.read(directory), CheckRecord.last(directory)
    return Overview(
        record=record,
        facts=len(ledger.facts()),
        batches=len(ledger.batches),
        undone=sum(len(ledger.undone(entry.batch)) for entry in ledger.entries),
        rejected=sum(len(entry.all_rejected) for entry in ledger.batches),
        relative_change=None if state is None else dict(state.relative_change),
        last=next(_events(ledger, ledger.events[-1:]), None),
        check=check,
        changes_since_check=0 if check is None else len(ledger.events) - check.changes,
    )


def events_of(ledger: Ledger) -> Iterator[Event]:
    """What happened to a directory, oldest first."""
    yield from _events(ledger, ledger.events)


def _events(ledger: Ledger, events: Iterable[LedgerEntry | UndoLine]) -> Iterator[Event]:
    for event in events:
        if isinstance(event, UndoLine):
            yield Event(
                what="undid" if event.kind == "undo" else "redid",
                batch=None,
                requests=requests_of(ledger, event.edits),
                rejected=0,
                signature=event.signature,
            )
        else:
            yield _written(event)


def _written(entry: LedgerEntry) -> Event:
    return Event(
        what="wrote",
        batch=entry.batch,
        requests=entry.new_requests if entry.applied else (),
        rejected=len(entry.all_rejected),
        signature=entry.signature,
    )
