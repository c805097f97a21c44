"""What a plugin's classes must look like. Torch appears in annotations only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import EditBatch, FactoredDelta, FactRecord, Proposal

if TYPE_CHECKING:
    from editcore.evaluation import PromptScore
    from editcore.models import LanguageModel
    from editcore.plugins.registry import Plugins
    from editcore.second_moments.linalg import Metric
    from editcore.second_moments.statistics import StatisticsStore
    from editcore.settings.hparams import HParams

__all__ = [
    "Backend",
    "BackendContext",
    "EditContext",
    "Editor",
    "Evaluator",
    "Executor",
    "ExtensionContext",
    "Outcome",
    "OverlaysWeights",
    "ReportsStatistics",
    "Resolves",
    "TakesContext",
]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class EditContext:
    """What an editor may use besides the model: one object per session."""

    statistics: StatisticsStore
    """Second moments of the unedited model, computed or read from the cache when first asked for."""
    seed: int = 0
    """Seed of everything random in the edit."""
    progress: Progress = silent


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionContext:
    """What an extension may use: given to its constructor with its hyperparameters."""

    plugins: Plugins
    """For named components (``plugins.components("replay.strategy")``)."""
    seed: int = 0
    progress: Progress = silent


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendContext:
    """What a backend may use besides the model: given to those that ask for it (:class:`TakesContext`)."""

    metrics: Callable[[Sequence[int]], Mapping[int, Metric]]
    """Second moments of the unedited model by layer, with their factors. Ask while no delta is in the model: what
    is neither in memory nor in the cache is computed by running it."""
    directory: Path | None = None
    """The run directory, or ``None`` for a session in memory."""


@runtime_checkable
class Editor(Protocol):
    """Turns requests into weight deltas. Never leaves the model it is given changed.

    A class that implements it is constructed with its hyperparameters: ``MyEditor(hparams)``.
    """

    hparams: HParams

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Look at the unedited model once, before the first batch: fetch second moments, sample context templates.

        Returns:
            What the run should record to be reproducible (``context_templates``, corpus), JSON-able.
        """
        ...

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Solve one batch on the model as it is now (earlier batches applied).

        Raises:
            EditcoreError: a subject is not found, a system is singular, a value is not finite.
        """
        ...


@runtime_checkable
class Resolves(Protocol):
    """An editor that can solve a batch again without some of its facts, from what the ledger keeps of it alone.

    Without it, and where it answers ``None``, the rest of the batch is proposed again, with the targets it had, on the
    model as it was before the batch.
    """

    def resolve(
        self,
        model: LanguageModel,
        batch: EditBatch,
        deltas: Mapping[str, FactoredDelta],
        rows: Sequence[int],
        context: EditContext,
    ) -> Mapping[str, FactoredDelta] | None:
        """What the editor would have proposed for some requests of a batch, on the model that it saw then.

        It must depend on the arguments and on what :meth:`Editor.prepare` learnt alone, not on the model's present
        weights: undoing in any order then gives the same bits.

        Args:
            batch: as it was solved, with the key and value of every request in ``known``.
            deltas: as they were solved (and scaled) for all of it.
            rows: indices of the requests that stay, in ascending order; at least one.

        Returns:
            Deltas, scaled as ``deltas`` are, or ``None`` if what is kept does not suffice (several layers).
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """Puts deltas into a model and takes them out again, to the bit.

    The state of the model is a function of the base weights and the sequence of active deltas: ``rebuild(s)`` after any
    history gives the same bits as a fresh ``open`` followed by ``apply`` of each element of ``s``.
    """

    def open(self, model: LanguageModel) -> None:
        """Take charge of a model that no delta has touched."""
        ...

    def apply(self, deltas: Mapping[str, FactoredDelta]) -> None:
        """Add one batch's deltas behind those already active.

        Raises:
            EditcoreError: the backend cannot express them; the model is as it was.
        """
        ...

    def rebuild(self, active: Sequence[Mapping[str, FactoredDelta]]) -> None:
        """Make exactly ``active``, in this order, the model's state. ``rebuild([])`` restores the base weights."""
        ...


@runtime_checkable
class TakesContext(Protocol):
    """A backend that needs more than the model."""

    def take(self, context: BackendContext) -> None:
        """Called once, right before ``open``."""
        ...


@runtime_checkable
class OverlaysWeights(Protocol):
    """A backend that keeps deltas beside the weights, in modules that it wraps."""

    def written(self) -> AbstractContextManager[None]:
        """The model as ``from_pretrained`` knows it, with what the overlay adds written into its weights: inside the
        block only. Models are saved in there."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model on fact records; never changes it."""

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], *, progress: Progress = silent
    ) -> list[PromptScore]:
        """One score per record and prompt."""
        ...


@runtime_checkable
class ReportsStatistics(Protocol):
    """An extension or backend that counts: what it answers stands in ``summary.json`` under ``extensions`` and its
    name."""

    def statistics(self) -> Mapping[str, float | int | None]:
        """Its numbers as of now, by ``lower_case`` name. Called once, after the last ``editcore_after_run``."""
        ...


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
    """Of an exception that is no :class:`editcore.EditcoreError`, which is a bug of somebody's."""
    attempts: int = 1
    """How often the item was handed to a worker."""

    @property
    def failed(self) -> bool:
        """Whether there is no value."""
        return bool(self.kind)


class Executor(Protocol):
    """Runs a function on independent items, on workers that may be lost.

    A class that implements it is constructed with its hyperparameters, or without arguments if it has none. The
    contract suite is ``editcore.testing.ExecutorContract``.
    """

    shares_files: bool
    """Whether workers see the folders of the process that asks: if not, results travel as values."""

    def map(
        self,
        make: Callable[[], Callable[[T], R]],
        items: Sequence[T],
        *,
        started: Callable[[int], None],
        accelerator: bool = False,
    ) -> Iterator[Outcome[R]]:
        """One outcome per item, as they come.

        An exception of the function is its item's outcome and is not tried again. A worker that is lost (killed, out of
        memory, its machine gone) costs its item another attempt, within the executor's bounds, and no other item
        anything. A caller that stops asking stops the workers.

        Args:
            make: called once in each worker; what it returns is called with the items. It and the items are pickled.
            started: called here with an item's index whenever it is handed to a worker.
            accelerator: whether each worker needs a GPU of its own.
        """
        ...

    def close(self) -> None:
        """Give everything back; workers that still run are ended."""
        ...
