"""The protocols that a plugin's classes implement, and the contexts they are given. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

from editcore.interfaces.changes import Attachment, Changes, Written
from editcore.interfaces.documented import documented
from editcore.interfaces.metrics import EvaluationContext, Observation
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.specs import Capabilities
from editcore.interfaces.values import EditBatch, FactRecord, Proposal

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.interfaces.history import LedgerEntry
    from editcore.models import LanguageModel
    from editcore.plugins.registry import Plugins
    from editcore.second_moments.linalg import Metric
    from editcore.second_moments.statistics import StatisticsStore
    from editcore.settings.hparams import HParams

__all__ = [
    "AttachmentKind",
    "Backend",
    "BackendContext",
    "EditContext",
    "Editor",
    "Evaluator",
    "Executor",
    "ExtensionContext",
    "Outcome",
    "OverlaysWeights",
    "Remembers",
    "ReportsStatistics",
    "Resolves",
    "RewritesPrompts",
    "SolvesAtStoredKeys",
    "TakesContext",
    "Trial",
]

T = TypeVar("T")
R = TypeVar("R")


class Trial(Protocol):
    """Shows the model as it would be after a change. It is the type of :attr:`EditContext.trial`."""

    def __call__(self, changes: Changes, attachment: Attachment | None = None) -> AbstractContextManager[None]:
        """Put changes, and an attachment, on top of what is active, inside the block only.

        However the block ends, the weights are restored to the bit.
        """
        ...


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class EditContext:
    """What an editor may use besides the model: one object per session."""

    statistics: StatisticsStore
    """Second moments of the unedited model, computed or read from the cache when first asked for."""
    trial: Trial
    """Shows the model with changes, and an attachment, on top of what is active, inside a block."""
    plugins: Plugins
    """The installed plugins, for an editor that uses parts of others."""
    records: Mapping[str, FactRecord] = field(default_factory=dict)
    """The records behind the requests, by request id; empty in a session that has none."""
    learnt: Mapping[str, Any] = field(default_factory=dict)
    """What :meth:`Editor.prepare` returned when it was first called with this model, these settings and this seed, as
    JSON reads it; empty if that is now. What is in it need not be learnt again."""
    seed: int = 0
    """Seed of everything random in the edit."""
    progress: Progress = silent
    """Shows how far long work is."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionContext:
    """What an extension may use: given to its constructor with its hyperparameters."""

    plugins: Plugins
    """For named components (``plugins.components("replay.strategy")``)."""
    seed: int = 0
    """Seed of everything random in the run."""
    progress: Progress = silent
    """Shows how far long work is."""
    capabilities: Capabilities = field(default_factory=Capabilities)
    """What the run's editor can do."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BackendContext:
    """What a backend may use besides the model: given to those that ask for it (:class:`TakesContext`)."""

    metrics: Callable[[Sequence[int]], Mapping[int, Metric]]
    """Called with layers, it gives the second moments of the unedited model with their factors. Call it while the model
    has no change, because moments that are not cached are computed by running the model."""
    directory: Path | None = None
    """The run directory, or ``None`` for a session in memory."""


@runtime_checkable
class Editor(Protocol):
    """Turns requests into proposals. It leaves the model as it was given.

    A class that implements it is constructed with its hyperparameters, ``MyEditor(hparams)``, and has them as
    ``hparams``.
    """

    hparams: HParams

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Learn what is needed from the unedited model. Called once, before the first batch of a session.

        Returns:
            JSON-able facts for the run's record, such as the context templates that were sampled.
        """
        ...

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Solve one batch on the model as it is now. The model is unchanged, to the bit, when this returns.

        Raises:
            EditcoreError: the batch cannot be solved; the message says what would work.
        """
        ...


@runtime_checkable
class Remembers(Protocol):
    """An editor whose state depends on what it has written before.

    The state follows from the ledger alone, batch by batch, so resuming and undoing need nothing more. The history has
    no rejected proposals and no undone edits.
    """

    def recall(self, history: Sequence[LedgerEntry]) -> None:
        """Compute the state anew from the active batches, oldest first.

        Called after :meth:`Editor.prepare`, after every undo and redo, and before a batch is solved again on the model
        as it was before that batch. Tensors are read from the ledger whenever they are looked up.
        """
        ...

    def absorb(self, entry: LedgerEntry) -> None:
        """Update the state with a batch that was applied. Its ``memory`` is what the proposal asked to keep."""
        ...


@runtime_checkable
class Resolves(Protocol):
    """An editor that can solve a batch again, without some of its requests, from the ledger alone.

    This makes it cheap to undo one fact of a batch. Other editors are asked to :meth:`Editor.propose` the rest of the
    batch again, with its keys and values known, on the model as it was before the batch.
    """

    def resolve(
        self, model: LanguageModel, entry: LedgerEntry, rows: Sequence[int], context: EditContext
    ) -> Written | None:
        """What the editor would have written for some requests of a batch, on the model as it was before the batch.

        The result must depend only on the arguments and on what :meth:`Editor.prepare` learnt, not on the model's
        present weights. Undoing in any order then gives the same bits.

        Args:
            entry: the batch as it was solved, and scaled.
            rows: indices of the requests that stay, in ascending order; at least one.

        Returns:
            What is written, scaled as the batch was; or ``None`` if the ledger does not have enough to tell (several
            layers).
        """
        ...


@runtime_checkable
class SolvesAtStoredKeys(Protocol):
    """An editor whose batches are solves for keys and values, so that one can be solved again for other weights.

    This makes it possible to undo an edit as if it had never been solved: every later batch is solved again for the
    keys and values that the ledger has, on the weights that it would have met.
    """

    def solve_at_stored_keys(
        self,
        model: LanguageModel,
        entry: LedgerEntry,
        rows: Sequence[int],
        missing: Mapping[str, Tensor],
        context: EditContext,
    ) -> Written | None:
        """What the editor would have written for some requests of a batch, for the keys and values that the ledger has.

        The result must not depend on the model's present weights. An editor that :class:`Remembers` batches has been
        told those that were before this one.

        Args:
            entry: the batch as it was solved, and scaled, without held keys that count no more.
            rows: indices of the requests that stay, in ascending order; at least one.
            missing: by address, what the weight had when the batch came and would not have had, ``[d_out, d_in]``
                float64: a value v asks for v − (W − missing) k.

        Returns:
            What is written, scaled as the batch was; ``None`` if its changes are not solves for stored keys.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """Puts changes of weights into a model and takes them out again, to the bit.

    The state of the model is a function of the base weights and the sequence of active changes: ``rebuild(s)`` after
    any history gives the same bits as a fresh ``open`` followed by ``apply`` of each element of ``s``.
    """

    def open(self, model: LanguageModel) -> None:
        """Take charge of an unedited model."""
        ...

    def apply(self, changes: Changes) -> None:
        """Add the changes of a batch to those that are active.

        Raises:
            EditcoreError: the backend cannot express them; the model is as it was.
        """
        ...

    def rebuild(self, active: Sequence[Changes]) -> None:
        """Give the model exactly the changes ``active``, in this order. ``rebuild([])`` restores the base weights."""
        ...

    def trial(self, changes: Changes) -> AbstractContextManager[None]:
        """Add ``changes`` to those that are active, inside the block only, so that a proposal can be measured.

        However the block ends, the weights are restored to the bit.

        Raises:
            EditcoreError: as :meth:`apply`.
        """
        ...


@runtime_checkable
class AttachmentKind(Protocol):
    """Installs attachments of one kind into a model.

    One object installs all attachments of the kind. It is made without arguments and thrown away after :meth:`remove`.
    """

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        """Put knowledge beside the weights: the attachments of all active batches, in the order of the batches.

        Hooks and wrapped modules are allowed; weights stay as they are. What the model answers must be a function of
        the model's weights and of ``attachments``.

        Raises:
            EditcoreError: they do not fit the model; the model is as it was.
        """
        ...

    def remove(self) -> None:
        """Take everything out: modules, hooks and answers are as before :meth:`install`, to the bit."""
        ...


@runtime_checkable
class RewritesPrompts(Protocol):
    """A kind of attachment that changes prompts before they are tokenised, in generation and evaluation only.

    Keys and targets are computed from the prompts as they are.
    """

    def rewrite(self, prompt: str) -> str:
        """The text that the model is given instead of ``prompt``, such as a remembered statement before the prompt.

        What is scored or generated follows this text.
        """
        ...


@runtime_checkable
class TakesContext(Protocol):
    """A backend that needs more than the model."""

    def take(self, context: BackendContext) -> None:
        """Called once, right before ``open``."""
        ...


@runtime_checkable
class OverlaysWeights(Protocol):
    """A backend that keeps changes beside the weights, in modules that it wraps."""

    def written(self) -> AbstractContextManager[None]:
        """Write what the overlay adds into the model's weights, and take its modules away, inside the block only.

        The model is then one that ``from_pretrained`` knows. It is saved inside the block.
        """
        ...


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model on fact records; never changes it.

    A class that implements it is constructed with its hyperparameters, or without arguments if it has none. What it can
    observe is announced in its :class:`editcore.EvaluatorSpec`.
    """

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> Sequence[Observation]:
        """One observation for each record, question and metric that has a value.

        They must depend only on the model, the records and ``context``, because a run that was killed and resumed asks
        again.
        """
        ...


@runtime_checkable
class ReportsStatistics(Protocol):
    """An extension or backend that keeps counts. They are in ``summary.json``, under ``extensions`` and its name."""

    def statistics(self) -> Mapping[str, float | int | None]:
        """The current numbers, by ``lower_case`` name. Called once, after the last ``editcore_after_run``."""
        ...


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[R]):
    """What became of one item that an executor was given."""

    index: int
    """The item's place in the sequence."""
    value: R | None = None
    """What the function returned; ``None`` if it failed."""
    kind: str = ""
    """Class of the exception, or ``WorkerLost``; empty if the function returned."""
    error: str = ""
    """What went wrong, in a sentence; empty if nothing did."""
    traceback: str = ""
    """The traceback of an exception that is not an :class:`editcore.EditcoreError`: that is a bug."""
    attempts: int = 1
    """How often the item was handed to a worker."""

    @property
    def failed(self) -> bool:
        """Whether there is no value."""
        return bool(self.kind)


class Executor(Protocol):
    """Runs a function on independent items, on workers that may be lost.

    A class that implements it is constructed with its hyperparameters, or without arguments if it has none. Its
    ``shares_files`` says whether workers see the folders of the process that asks: if not, results travel as values.
    The contract suite is ``editcore.testing.ExecutorContract``.
    """

    shares_files: bool

    def map(
        self,
        make: Callable[[], Callable[[T], R]],
        items: Sequence[T],
        *,
        started: Callable[[int], None],
        accelerator: bool = False,
    ) -> Iterator[Outcome[R]]:
        """One outcome per item, as they come.

        If the function raises, the exception is the item's outcome, and the item is not tried again. If a worker is
        lost (killed, out of memory, its machine gone), its item is tried again, within the executor's bounds, and no
        other item is affected. If the caller stops iterating, the workers are stopped.

        Args:
            make: called once in each worker; what it returns is called with the items. It and the items are pickled.
            started: called here with an item's index whenever it is handed to a worker.
            accelerator: whether each worker needs a GPU of its own.
        """
        ...

    def close(self) -> None:
        """Release everything. Workers that still run are ended."""
        ...
