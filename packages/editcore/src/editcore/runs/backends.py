"""The built-in backend, which writes changes into the weights; and how any backend is opened and filled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from editcore.interfaces.changes import Changes
from editcore.interfaces.errors import RunError
from editcore.interfaces.protocols import Backend, BackendContext, TakesContext
from editcore.models.edited import EditedModel
from editcore.models.writing import add_changes, applied, misfits

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.interfaces.history import LedgerEntry
    from editcore.ledger.ledger import Ledger
    from editcore.models import LanguageModel
    from editcore.second_moments.linalg import Metric
    from editcore.second_moments.statistics import StatisticsStore

__all__ = ["RawBackend", "by", "open_backend", "rebuild"]


def open_backend(
    backend: Backend,
    model: LanguageModel,
    *,
    statistics: Callable[[], StatisticsStore],
    directory: Path | None = None,
) -> None:
    """Put a backend in charge of an unedited model, with the context that it asks for.

    Args:
        statistics: opens the store of second moments; called only when some are needed.
    """

    def metrics(layers: Sequence[int]) -> Mapping[int, Metric]:
        return statistics().metrics(layers)

    if isinstance(backend, TakesContext):
        backend.take(BackendContext(metrics=metrics, directory=directory))
    backend.open(model)


def rebuild(edited: EditedModel, ledger: Ledger) -> None:
    """Make what is active in a ledger the state of a model.

    Raises:
        RunError: what the ledger holds does not fit the model's weights, or is not finite; the model is as it was.
    """
    for entry in ledger.entries:  # undone ones, too: a redo finds them checked
        for solved in (entry, *ledger.revisions(entry.batch)):
            _check(solved, edited.model, f"{ledger.directory or 'The ledger'}, batch {entry.batch}")
    if active := ledger.active():
        edited.rebuild(active)


def _check(entry: LedgerEntry, model: LanguageModel, where: str) -> None:
    for address, found, expected in misfits(model, entry.changes):
        raise RunError(
            f"{where}: the change of {address} is {by(found)}, in '{model.name}' the weight is {by(expected)} (out, "
            "in). It was not made for this model."
        )
    for address, change in entry.changes.items():
        if not change.is_finite():
            raise RunError(f"{where}: the change of {address} holds NaN or Inf.")
    for request_id, known in entry.known.items():
        for kind, tensors, side in (("value", known.values, 0), ("key", known.keys, 1)):
            for address, tensor in tensors.items():
                width = model.as_out_in(address, model.weight(address)).shape[side]
                if tuple(tensor.shape) != (width,) or not tensor.isfinite().all():
                    raise RunError(
                        f"{where}: the {kind} of the edit '{request_id}' at {address} has to be {width} finite numbers."
                    )


def by(shape: Sequence[int]) -> str:
    """A shape in words: ``32 by 64``."""
    return " by ".join(map(str, shape)) or "a single number"


class RawBackend:
    """Writes ``base + Σ changes`` into each touched weight, summed in float64 and rounded once.

    The base of every touched weight is kept, and the sum always runs from it over the active changes in their order. A
    weight therefore depends on the active changes alone, not on how they came to be active: leaving one out and summing
    again gives the bits that the others give when applied alone.
    """

    def __init__(self) -> None:
        self._model: LanguageModel | None = None
        self._base: dict[str, Tensor] = {}
        self._active: list[Changes] = []

    def open(self, model: LanguageModel) -> None:
        """Take charge of a model that no change has touched."""
        self._model, self._base, self._active = model, {}, []

    def apply(self, changes: Changes) -> None:
        """Add one batch's changes behind those already active."""
        self._active.append(changes)
        self._write(changes)

    def rebuild(self, active: Sequence[Changes]) -> None:
        """Make exactly ``active``, in this order, the model's state."""
        self._active = list(active)
        self._write({*self._base, *(address for changes in active for address in changes)})

    def trial(self, changes: Changes) -> AbstractContextManager[None]:
        """The model with ``changes`` added to its weights, inside the block only."""
        return applied(self._opened, changes)

    @property
    def _opened(self) -> LanguageModel:
        if self._model is None:
            raise RuntimeError("RawBackend.open was not called")
        return self._model

    def _write(self, addresses: Iterable[str]) -> None:
        model = self._opened
        for address in sorted(addresses):
            weight = model.weight(address)
            if address not in self._base:
                self._base[address] = weight.detach().clone()
            mine = [changes[address] for changes in self._active if address in changes]
            if mine:
                add_changes(model, address, mine, base=self._base[address])
            else:
                with torch.no_grad():
                    weight.copy_(self._base[address])
