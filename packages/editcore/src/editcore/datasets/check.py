"""Finds requests that contradict or repeat each other, and makes ids unique.

One batch cannot write two objects for one fact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from pydantic import JsonValue

from editcore.interfaces.values import EditRequest, FactRecord

__all__ = ["check_records", "check_requests", "with_unique_ids"]

T = TypeVar("T")


def check_requests(requests: Iterable[EditRequest]) -> tuple[list[EditRequest], list[str]]:
    """``(kept, notes)``: the last request of each fact (subject and prompt), in the order given, and a sentence for
    each fact that came more than once.

    Requests for the same fact contradict each other if their targets differ, and repeat each other if not. In both
    cases the last one is kept.
    """
    return _keep_last(requests, lambda request: request)


def check_records(records: Iterable[FactRecord]) -> tuple[list[FactRecord], list[str]]:
    """:func:`check_requests` for records, by their requests.

    A record that is kept takes over the chains (``extra["chains"]``) of those that repeat it, because they ask for the
    same fact. The chains of records that contradict it are left out: what they ask for is not written.
    """
    listed = list(records)
    kept, notes = _keep_last(listed, lambda record: record.request)
    if len(kept) == len(listed):
        return kept, notes
    repeated: dict[tuple[tuple[str, str], str], list[FactRecord]] = {}
    for record in listed:
        repeated.setdefault((record.request.fact_key, record.request.continuation), []).append(record)
    return [
        _with_chains_of(record, repeated[record.request.fact_key, record.request.continuation]) for record in kept
    ], notes


def with_unique_ids(records: Iterable[FactRecord], taken: Iterable[str] = ()) -> Iterator[FactRecord]:
    """The records, in their order. An id that comes again gets the suffix ``-2``, ``-3``, ....

    Args:
        taken: ids that the records must not have.
    """
    taken = set(taken)
    for record in records:
        identity, count = record.request.id, 1
        while identity in taken:
            count += 1
            identity = f"{record.request.id}-{count}"
        taken.add(identity)
        if count > 1:
            record = record.model_copy(update={"request": record.request.model_copy(update={"id": identity})})
        yield record


def _with_chains_of(kept: FactRecord, records: list[FactRecord]) -> FactRecord:
    """``kept`` with the chains of all ``records``, each once."""
    chains: list[JsonValue] = []
    for record in records:
        own = record.extra.get("chains")
        chains += [chain for chain in own if chain not in chains] if isinstance(own, list) else []
    if not chains or chains == kept.extra.get("chains"):
        return kept
    return kept.model_copy(update={"extra": {**kept.extra, "chains": chains}})


def _keep_last(asked: Iterable[T], request_of: Callable[[T], EditRequest]) -> tuple[list[T], list[str]]:
    groups: dict[tuple[str, str], list[T]] = {}
    for record in asked:
        key = request_of(record).fact_key
        # Moved to the end, because a fact with several requests has the place of the last one.
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
