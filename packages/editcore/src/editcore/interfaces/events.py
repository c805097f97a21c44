"""The events that hooks are given.

They are frozen, so that no plugin changes what another one sees. A new field breaks no plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from editcore.interfaces.documented import documented

if TYPE_CHECKING:
    from editcore.interfaces.changes import Changes
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
    "AfterSolve",
    "AfterUndo",
    "BatchAddition",
    "BeforeApply",
    "BeforeBatch",
    "BeforeRun",
    "Registration",
    "Rework",
]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Given to registration hooks. It has no fields yet."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeRun:
    """A session is open. It has its model, editor and backend, and has edited nothing yet."""

    model: LanguageModel
    """The model. In a resumed run it has the edits of the earlier batches."""
    history: Sequence[LedgerEntry]
    """The active batches of a resumed run, oldest first, without the edits that were undone; empty for a new run."""
    directory: Path | None
    """The run directory, or ``None`` for a session in memory."""
    records: Sequence[FactRecord] = ()
    """The facts that the run edits, in order; empty for a session that was given requests alone."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeBatch:
    """A batch of new requests is about to be solved."""

    model: LanguageModel
    """The model with all earlier batches applied."""
    batch: EditBatch
    """The batch as the user gave it; additions of other extensions are not in it."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAddition:
    """What an extension adds to a batch, and what it takes out.

    It may add requests that were edited before, and keys that the update should leave alone.
    """

    requests: tuple[EditRequest, ...] = ()
    """Requests that were edited before."""
    weights: tuple[float, ...] = ()
    """One positive weight per request; see ``EditBatch.weights``."""
    known: Mapping[str, KnownTarget] = field(default_factory=dict)
    """By request id: keys and values that need no optimisation. A request without one is optimised again. The keys must
    come from this run's ledger: they are used as they are wherever no edit can have moved them."""
    held: Sequence[HeldKey] = ()
    """Facts of earlier batches. The update changes as little as it can at their keys."""
    withdrawn: Mapping[str, Rejection] = field(default_factory=dict)
    """Why new requests of the batch must not be edited, by request id. Nothing is computed for them."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class AfterSolve:
    """An editor has solved a batch."""

    model: LanguageModel
    """The model as it was when the batch came, without the batch."""
    changes: Changes
    """What the editor proposes, as the extensions that were called before left it."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Rework:
    """What an extension makes of the changes that an editor proposes."""

    changes: Changes
    """In place of all changes, for the same weights. The columns of a factored change's left factor belong to the
    requests: change the right factor only, so that a batch can be solved again without some of them."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """Numbers about what was done, kept with those of the batch."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeApply:
    """A proposal is ready, and nothing has been written."""

    model: LanguageModel
    """The model without this batch."""
    batch: EditBatch
    """The batch that was solved, additions included."""
    proposal: Proposal
    """The editor's answer, unscaled."""
    trial: Callable[[Proposal, float], AbstractContextManager[None]]
    """Called with a proposal and a factor (1 for unscaled). Inside the block, the model is as it would be after the
    batch, weights and attachments alike. Measure there; nobody else may change the model."""
    without: Callable[[Collection[str]], Proposal]
    """Called with the ids of new requests of the batch. It gives what the editor proposes without them, solved again on
    the model as it is. The targets are those of ``proposal``: none is optimised again, and nothing is written."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class AfterBatch:
    """A batch is applied and, in a run, durable on disk."""

    model: LanguageModel
    """The model with this batch applied."""
    batch: EditBatch
    """The batch, additions included."""
    proposal: Proposal
    """The editor's answer, before any scaling."""
    entry: LedgerEntry
    """What was written, as the ledger keeps it."""
    seconds: float
    """Wall time of the whole batch, without evaluation."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class AfterUndo:
    """Edits were taken out of the model, or put back."""

    model: LanguageModel
    """The model as it is now."""
    history: Sequence[LedgerEntry]
    """The batches that are active now, oldest first, as in :class:`BeforeRun`."""
    undone: tuple[EditRequest, ...]
    """Requests that were taken out."""
    redone: tuple[EditRequest, ...]
    """Requests that were put back."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class AfterEvaluation:
    """All edits made so far have been measured."""

    model: LanguageModel
    """The model as it was measured."""
    phase: str
    """``before`` or ``after``, or the number of edits at a checkpoint."""
    num_edits: int
    """Facts that are active."""
    records: Sequence[FactRecord]
    """The facts that were measured."""
    observations: Mapping[str, Sequence[Observation]]
    """All observations, by evaluator."""
    scores: Mapping[str, float]
    """Means and composites by metric, as they are shown: a percentage lies between 0 and 100. Where two evaluators have
    a metric of one name, the key is ``EVALUATOR.METRIC``."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class AfterRun:
    """All batches are applied and evaluated."""

    model: LanguageModel
    """The model with all edits."""
    records: Sequence[FactRecord]
    """The facts that the run was given."""
    directory: Path | None
    """The run directory, or ``None`` for a session in memory."""
    num_edits: int
    """Facts that are active."""
