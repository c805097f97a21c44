"""The active facts by subject: a new fact is written together with those that the model was told about its subject."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from editcore.interfaces.events import BatchAddition
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.values import EditRequest

__all__ = ["FactsBySubject", "ids_about"]


class FactsBySubject:
    """What is active about each subject, oldest first.

    Args:
        history: the active batches.
    """

    def __init__(self, history: Iterable[LedgerEntry] = ()) -> None:
        self._facts: dict[str, list[EditRequest]] = {}
        self._latest: dict[str, LedgerEntry] = {}  # by id, the entry with its last known target
        for entry in history:
            self.absorb(entry)

    def absorb(self, entry: LedgerEntry) -> None:
        """Take a further batch into account."""
        for request in entry.new_requests:
            if request.subject:
                self._facts.setdefault(request.subject_key, []).append(request)
        self._latest |= {request.id: entry for request in entry.requests if request.subject}

    def addition(self, requests: Sequence[EditRequest]) -> BatchAddition:
        """The active facts about the subjects of ``requests``, which are new, with their known targets. A fact that one
        of ``requests`` corrects is among them; it is not added to a batch that edits it."""
        facts: dict[tuple[str, str], EditRequest] = {}
        for subject in dict.fromkeys(request.subject_key for request in requests):
            for request in self._facts.get(subject, ()):
                facts.pop(request.fact_key, None)
                facts[request.fact_key] = request
        known = {request.id: self._latest[request.id].known.get(request.id) for request in facts.values()}
        return BatchAddition(
            requests=tuple(facts.values()),
            weights=(1.0,) * len(facts),
            known={name: target for name, target in known.items() if target is not None},
        )


def ids_about(subjects: Iterable[str], requests: Iterable[EditRequest]) -> set[str]:
    """Ids of the requests that are about ``subjects``, as they are compared (:attr:`EditRequest.subject_key`)."""
    meant = set(subjects) - {""}
    return {request.id for request in requests if request.subject_key in meant}
