"""Requests that contradict or repeat each other, and ids that come twice.

One batch cannot write two objects for one fact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from editcore.interfaces.values import EditRequest, FactRecord

__all__ = ["check_records", "check_requests", "with_unique_ids"]

T = TypeVar("T")


def check_requests(requests: Iterable[EditRequest]) -> tuple[list[EditRequest], list[str]]:
    """``(kept, notes)``: per fact (subject and prompt) the last request, in the order given, and a sentence per loss.

    Requests for the same fact with different targets contradict each other and the last one wins; with one target they
    are repeated, and one stays.
    """
    return _keep_last(requests, lambda request: request)


def check_records(records: Iterable[FactRecord]) -> tuple[list[FactRecord], list[str]]:
    """:func:`check_requests` for records, by their requests."""
    return _keep_last(records, lambda record: record.request)


def with_unique_ids(records: Iterable[FactRecord]) -> Iterator[FactRecord]:
    """The records, in their order; an id that comes again gets ``-2``, ``-3``, ... behind it."""
    taken: set[str] = set()
    for record in records:
        identity, count = record.request.id, 1
        while identity in taken:
            count += 1
            identity = f"{record.request.id}-{count}"
        taken.add(identity)
        if count > 1:
            record = record.model_copy(update={"request": record.request.model_copy(update={"id": identity})})
        yield record


def _keep_last(asked: Iterable[T], request_of: Callable[[T], EditRequest]) -> tuple[list[T], list[str]]:
    groups: dict[tuple[str, str], list[T]] = {}
    for record in asked:
        key = request_of(record).fact_key
        # Moved to the end: a fact asked for twice has the place of its last request.
        groups[key] = [*groups.pop(key, []), record]
    notes = [_note([request_of(record) for record in group]) for group in groups.values() if len(group) > 1]
    return [group[-1] for group in groups.values()], notes


def _note(group: list[EditRequest]) -> str:
    kept = group[-1]
    what = f"{kept.text!r} (subject {kept.subject!r})" if kept.subject else repr(kept.text)
    if len({request.continuation for request in group}) == 1:
        return f"{len(group)} requests ask the same of {what}: {kept.target_new!r}. One is kept."
    asked = ", ".join(f"{request.target_new!r} ({request.id})" for request in group)
    return f"{len(group)} requests contradict each other about {what}: {asked}. The last is kept: {kept.target_new!r}."
