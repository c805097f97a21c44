"""What the lifecycle hooks are told. Frozen: a new field breaks no plugin, and no plugin changes another's view."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from editcore.interfaces.documented import documented

if TYPE_CHECKING:
    from editcore.interfaces.history import LedgerEntry
    from editcore.interfaces.metrics import Observation
    from editcore.interfaces.values import (
        EditBatch,
        EditRequest,
        FactRecord,
        HeldKey,
        KnownTarget,
        Proposal,
        Rejection,
    )
    from editcore.models import LanguageModel

__all__ = [
    "AfterBatch",
    "AfterEvaluation",
    "AfterRun",
    "AfterUndo",
    "BatchAddition",
    "BeforeApply",
    "BeforeBatch",
    "BeforeRun",
    "Registration",
]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Given to registration hooks. It has no fields yet."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeRun:
    """A session has its model, editor and backend, and edits nothing yet."""

    model: LanguageModel
    """With the batches of a resumed run in it."""
    history: Sequence[LedgerEntry]
    """Batches that are already active, without the edits that are undone, oldest first: empty for a new run, filled
    when one is resumed."""
    directory: Path | None
    """The run directory, or ``None`` for a session in memory."""
    records: Sequence[FactRecord] = ()
    """What the run edits, in its order; empty for a session that was given requests alone."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeBatch:
    """A batch of new requests is about to be solved."""

    model: LanguageModel
    """All earlier batches applied."""
    batch: EditBatch
    """As given by the user; additions of other extensions are not in it."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAddition:
    """What an extension adds to a batch (requests that were edited before, keys that shall be left alone), and what it
    takes out of it."""

    requests: tuple[EditRequest, ...] = ()
    """Requests that were edited before."""
    weights: tuple[float, ...] = ()
    """One positive weight per request; see ``EditBatch.weights``."""
    known: Mapping[str, KnownTarget] = field(default_factory=dict)
    """By request id: keys and values that need no optimisation. A request without one is optimised anew. Keys must be
    those of this run's ledger: where no edit can have moved them they are used as they are."""
    held: Sequence[HeldKey] = ()
    """Facts of earlier batches at whose keys the update shall change as little as it can."""
    withdrawn: Mapping[str, Rejection] = field(default_factory=dict)
    """By the id of a new request of the batch, why it must not be edited. Nothing is computed for it."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeApply:
    """A proposal is ready; nothing has been written."""

    model: LanguageModel
    """Without this batch."""
    batch: EditBatch
    """What was solved, additions included."""
    proposal: Proposal
    """What the editor answered, unscaled."""
    trial: Callable[[Proposal, float], AbstractContextManager[None]]
    """The model with a proposal in it, scaled by a factor (1 for as it is), inside the block only: weights and
    attachments as they would be after the batch. Measure in there; nobody else may change the model."""
    without: Callable[[Collection[str]], Proposal]
    """What the editor proposes without some of the batch's new requests, given their ids: solved again with the targets
    that are in ``proposal``, on the model as it is. No target is optimised again, and nothing is written."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class AfterBatch:
    """A batch is applied and, in a run, durable on disk."""

    model: LanguageModel
    """This batch applied."""
    batch: EditBatch
    """Additions included."""
    proposal: Proposal
    """What the editor answered, before any scaling."""
    entry: LedgerEntry
    """What was written, as the ledger keeps it."""
    seconds: float
    """Wall time of the whole batch, without evaluation."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class AfterUndo:
    """Edits were taken out of the model, or put back."""

    model: LanguageModel
    """As it is now."""
    history: Sequence[LedgerEntry]
    """What is active now, oldest first, as in :class:`BeforeRun`."""
    undone: tuple[EditRequest, ...]
    """Requests that are out now and were not before."""
    redone: tuple[EditRequest, ...]
    """Requests that are back."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class AfterEvaluation:
    """All edits made so far have been measured."""

    model: LanguageModel
    """As it was measured."""
    phase: str
    """``before`` or ``after``, or the number of edits at a checkpoint."""
    num_edits: int
    """Facts that are active."""
    records: Sequence[FactRecord]
    """The facts that were measured."""
    observations: Mapping[str, Sequence[Observation]]
    """By evaluator, everything that was seen."""
    scores: Mapping[str, float]
    """What it adds up to, by metric, as it is shown: a percentage between 0 and 100. Of two evaluators' metrics of one
    name each has its evaluator's in front: ``EVALUATOR.METRIC``."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class AfterRun:
    """All batches are applied and evaluated."""

    model: LanguageModel
    """With all edits in it."""
    records: Sequence[FactRecord]
    """What the run was to edit."""
    directory: Path | None
    """The run directory, or ``None`` for a session in memory."""
    num_edits: int
    """Facts that are active."""
