"""Checks before anything is computed: which requests are for facts that are already active, or that the batch asks for
twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from editcore import EditRequest, Rejection, RequestError

__all__ = ["Active", "Settled", "settle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Active:
    """A fact that is in the model, and the batch that edited it."""

    request: EditRequest
    batch: int


@dataclass(slots=True)
class Settled:
    """How the conflicts of a batch were settled."""

    withdrawn: dict[str, Rejection] = field(default_factory=dict)
    """The requests that are left out, by request id."""
    notes: list[str] = field(default_factory=list)
    """One sentence for each active fact that is replaced."""


def settle(
    requests: Sequence[EditRequest],
    active: Mapping[tuple[str, str], Active],
    *,
    on_conflict: Literal["replace", "keep", "error"],
) -> Settled:
    """Settle the requests for facts that are active, or that an earlier request of the batch asks for.

    Two requests for one fact contradict each other if their targets differ, and are duplicates if they do not.

    Args:
        active: by ``EditRequest.fact_key``.

    Raises:
        RequestError: there is a conflict, and ``on_conflict`` is ``error``.
    """
    settled = Settled()
    latest: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        earlier = latest.get(request.fact_key)
        known = active.get(request.fact_key)
        if earlier is None and known is None:
            latest[request.fact_key] = request
            continue
        older = earlier or (known.request if known else request)
        where = "which comes earlier in the batch" if earlier or not known else f"active since batch {known.batch}"
        conflict = f"{_verb(request, older)} '{older.target_new}' ({older.id}), {where}"
        if on_conflict == "error":
            raise RequestError(
                f"trust: the request '{request.id}' ('{request.text}' → '{request.target_new}') {conflict}. Leave it "
                "out, or settle such requests with --set trust.on_conflict=replace or keep."
            )
        if on_conflict == "keep":
            settled.withdrawn[request.id] = Rejection(reason=f"{conflict}; on_conflict is keep")
            continue
        if earlier is not None:
            reason = f"{_verb(earlier, request)} '{request.target_new}' ({request.id}), which comes later in the batch"
            settled.withdrawn[earlier.id] = Rejection(reason=f"{reason}; on_conflict is replace")
        else:
            settled.notes.append(f"'{request.id}' replaces an active fact: it {conflict}")
        latest[request.fact_key] = request
    return settled


def _verb(request: EditRequest, other: EditRequest) -> str:
    return "repeats" if request.continuation == other.continuation else "contradicts"
