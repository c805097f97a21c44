"""What writing more facts into a run directory would do, from its ledger alone. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from editcore.datasets.check import with_unique_ids
from editcore.interfaces.documented import documented
from editcore.interfaces.values import EditRequest, FactRecord
from editcore.ledger.ledger import Ledger
from editcore.runs.fit import refuse_contradictions

__all__ = ["PlannedEdit", "plan_edit"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEdit:
    """Facts to write, and the active facts that they concern."""

    records: tuple[FactRecord, ...]
    """What is written, with ids that the ledger does not have."""
    active_already: tuple[EditRequest, ...]
    """Facts that were asked for and are active with the same target; they are not written again."""
    corrections: tuple[tuple[EditRequest, EditRequest], ...]
    """Active facts, each with the new one that replaces it."""
    same_subject: tuple[tuple[EditRequest, tuple[EditRequest, ...]], ...]
    """New facts, each with the further active facts about its subject."""

    def batches(self, size: int) -> int:
        """How many batches they are, with at most ``size`` facts each."""
        return math.ceil(len(self.records) / size)


def plan_edit(ledger: Ledger, records: Sequence[FactRecord], *, again: bool = False) -> PlannedEdit:
    """What writing ``records`` into the model of a ledger would do.

    Args:
        again: whether to write facts that are active with the same target, too.

    Raises:
        RequestError: two of the records are about the same fact.
    """
    refuse_contradictions([record.request for record in records], together="one call")
    active = {request.fact_key: request for request in ledger.facts()}
    about: dict[str, list[EditRequest]] = {}
    for request in active.values():
        if request.subject:
            about.setdefault(request.subject_key, []).append(request)
    fresh: list[FactRecord] = []
    already: list[EditRequest] = []
    for record in records:
        known = active.get(record.request.fact_key)
        if known is not None and known.continuation == record.request.continuation and not again:
            already.append(known)
        else:
            fresh.append(record)
    new = _with_new_ids(ledger, fresh)
    requests = [record.request for record in new]
    asked = {request.fact_key for request in requests}
    others = {
        request.id: tuple(other for other in about.get(request.subject_key, ()) if other.fact_key not in asked)
        for request in requests
        if request.subject
    }
    return PlannedEdit(
        records=tuple(new),
        active_already=tuple(already),
        corrections=tuple((active[request.fact_key], request) for request in requests if request.fact_key in active),
        same_subject=tuple((request, others[request.id]) for request in requests if others.get(request.id)),
    )


def _with_new_ids(ledger: Ledger, records: Iterable[FactRecord]) -> list[FactRecord]:
    """The records with ids that the ledger does not have."""
    taken = [name for entry in ledger.batches for name in entry.new_ids]
    taken += [left.request.id for entry in ledger.batches for left in entry.rejected]
    return list(with_unique_ids(records, taken))
