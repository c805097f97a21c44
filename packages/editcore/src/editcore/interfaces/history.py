"""The history of a run, batch by batch, as extensions see it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from editcore.interfaces.changes import Attachment, Changes, Written
from editcore.interfaces.documented import documented
from editcore.interfaces.values import (
    EditBatch,
    EditEvidence,
    EditRequest,
    HeldKey,
    KnownTarget,
    RejectedRequest,
    Verdict,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LedgerEntry", "Signature"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Who changed what a model knows, when, and why."""

    author: str
    """A name."""
    time: str
    """In UTC, as ISO 8601 writes it, to the second."""
    note: str = ""
    """Why, in the author's words."""

    @property
    def day(self) -> str:
        """The date, ``YYYY-MM-DD``."""
        return self.time[:10]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One batch."""

    batch: int
    """Its index in the run."""
    requests: tuple[EditRequest, ...]
    """New requests first, replayed ones behind."""
    weights: tuple[float, ...]
    """One per request; see ``EditBatch.weights``."""
    num_new: int
    """The first ``num_new`` requests are new."""
    changes: Changes = field(default_factory=dict)
    """By the address of their weight. Empty if the batch was rejected, or changes no weight. An entry of a directory
    has no tensors in memory: they are read from the disk whenever they are looked up, here and below."""
    attachment: Attachment | None = None
    """Knowledge that the batch keeps beside the weights."""
    known: Mapping[str, KnownTarget] = field(default_factory=dict)
    """By request id: the key and value each fact was solved with, if the editor has keys and values."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the editor wanted kept with the batch."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """The proposal's numbers about the batch, by name."""
    scale: float = 1.0
    """The factor by which a gate scaled the proposal; 0 if the batch was rejected."""
    evidence: tuple[EditEvidence, ...] = ()
    """One per request, in their order."""
    notes: tuple[str, ...] = ()
    """Sentences of the editor for the user."""
    reason: str = ""
    """Why a gate rejected or scaled the batch."""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """By the name of the extension that judged."""
    held: Sequence[HeldKey] = ()
    """Facts of earlier batches whose keys the update left alone."""
    builds_on: tuple[tuple[int, str], ...] = ()
    """Batch and id of each earlier edit about a subject of this batch, if the editor rewrites subjects
    (``Capabilities.rewrites_subject``). When one of them is undone or redone, the batch is solved again."""
    rejected: tuple[RejectedRequest, ...] = ()
    """New requests that were left out, in the order in which they were rejected; they are not among ``requests``."""
    signature: Signature | None = None
    """Who wrote the batch; ``None`` for the batches of a run, whose record says when it was made."""

    @property
    def applied(self) -> bool:
        """False for a batch that was rejected."""
        return self.scale > 0

    @property
    def written(self) -> Written:
        """What the batch puts into the model, and what its editor keeps with it."""
        return Written(changes=self.changes, attachment=self.attachment, memory=self.memory)

    @property
    def new_requests(self) -> tuple[EditRequest, ...]:
        """The requests that were new in this batch, without replayed ones."""
        return self.requests[: self.num_new]

    @property
    def new_ids(self) -> tuple[str, ...]:
        """The ids of :attr:`new_requests`."""
        return tuple(request.id for request in self.new_requests)

    def as_batch(self) -> EditBatch:
        """The batch as it was given to the editor, with every target known."""
        return EditBatch(
            index=self.batch,
            requests=self.requests,
            weights=self.weights,
            num_new=self.num_new,
            known=self.known,
            held=self.held,
        )

    @property
    def all_rejected(self) -> tuple[RejectedRequest, ...]:
        """Every new request that extensions kept out of the model. If the whole batch was rejected, these are all its
        new requests, with the reason and figures of the batch."""
        if self.applied:
            return self.rejected
        doubts = {name: verdict for name, verdict in self.verdicts.items() if verdict.action != "accept"}
        by, reason = ", ".join(doubts), "; ".join(verdict.reason for verdict in doubts.values())
        figures = {name: number for verdict in doubts.values() for name, number in verdict.figures.items()}
        rest = (
            RejectedRequest(request=request, by=by, reason=reason, figures=figures) for request in self.new_requests
        )
        return (*self.rejected, *rest)

    def kept_rows(self, undone: Collection[str]) -> list[int]:
        """Indices of the requests that stay when some of the new ones are undone."""
        return [row for row, request in enumerate(self.requests) if row >= self.num_new or request.id not in undone]
