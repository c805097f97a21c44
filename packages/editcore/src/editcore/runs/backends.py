"""The built-in backend, which writes deltas into the weights; and how any backend is opened, filled and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from editcore.interfaces.errors import RunError
from editcore.interfaces.protocols import Backend, BackendContext, OverlaysWeights, TakesContext
from editcore.interfaces.values import FactoredDelta
from editcore.models.writing import add_delta, misfits

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.interfaces.history import LedgerEntry
    from editcore.ledger.ledger import Ledger
    from editcore.models import LanguageModel
    from editcore.second_moments.linalg import Metric
    from editcore.second_moments.statistics import StatisticsStore

__all__ = ["RawBackend", "open_backend", "rebuild", "save_edited"]


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


def rebuild(backend: Backend, model: LanguageModel, ledger: Ledger) -> None:
    """Make what is active in a ledger the state of a model, in whose charge ``backend`` is already.

    Raises:
        RunError: what the ledger holds does not fit the model's weights, or is not finite; the model is as it was.
    """
    for entry in ledger.entries:  # undone ones, too: a redo finds them checked
        for solved in (entry, *ledger.revisions(entry.batch)):
            _check(solved, model, f"{ledger.directory or 'The ledger'}, batch {entry.batch}")
    if history := ledger.history():
        backend.rebuild([entry.deltas for entry in history])


def _check(entry: LedgerEntry, model: LanguageModel, where: str) -> None:
    for name, found, expected in misfits(model, entry.deltas):
        raise RunError(
            f"{where}: the change of {name} is {found[0]} by {found[1]}, in '{model.name}' the weight is "
            f"{expected[0]} by {expected[1]} (out, in). It was not made for this model."
        )
    for name, delta in entry.deltas.items():
        if not delta.is_finite():
            raise RunError(f"{where}: the change of {name} holds NaN or Inf.")
    for request_id, known in entry.known.items():
        for kind, tensors, side in (("value", known.values, 0), ("key", known.keys, 1)):
            for name, tensor in tensors.items():
                width = model.as_out_in(name, model.weight(name)).shape[side]
                if tuple(tensor.shape) != (width,) or not tensor.isfinite().all():
                    raise RunError(
                        f"{where}: the {kind} of the edit '{request_id}' at {name} has to be {width} finite numbers."
                    )


def save_edited(model: LanguageModel, backend: Backend, directory: Path) -> None:
    """Write the model with its edits as a folder that ``from_pretrained`` loads, whatever the backend.

    Raises:
        ModelError: the folder cannot be written.
    """
    with backend.written() if isinstance(backend, OverlaysWeights) else contextlib.nullcontext():
        model.save(directory)


class RawBackend:
    """Writes ``base + Σ left @ right`` into each touched weight, summed in float64 and rounded once.

    The base weight of every touched module is kept, and the sum always runs from it over the active deltas in their
    order. A weight therefore depends on the active deltas alone, not on how they came to be active: leaving one out
    and summing again gives the bits that the others give when applied alone.
    """

    def __init__(self) -> None:
        self._model: LanguageModel | None = None
        self._base: dict[str, Tensor] = {}
        self._active: list[Mapping[str, FactoredDelta]] = []

    def open(self, model: LanguageModel) -> None:
        """Take charge of a model that no delta has touched."""
        self._model, self._base, self._active = model, {}, []

    def apply(self, deltas: Mapping[str, FactoredDelta]) -> None:
        """Add one batch's deltas behind those already active."""
        self._active.append(deltas)
        self._write(deltas)

    def rebuild(self, active: Sequence[Mapping[str, FactoredDelta]]) -> None:
        """Make exactly ``active``, in this order, the model's state."""
        self._active = list(active)
        self._write({*self._base, *(name for deltas in active for name in deltas)})

    def _write(self, names: Mapping[str, FactoredDelta] | set[str]) -> None:
        if self._model is None:
            raise RuntimeError("RawBackend.open was not called")
        for name in sorted(names):
            weight = self._model.weight(name)
            if name not in self._base:
                self._base[name] = weight.detach().clone()
            mine = [deltas[name] for deltas in self._active if name in deltas]
            if mine:
                add_delta(self._model, name, mine, base=self._base[name])
            else:
                with torch.no_grad():
                    weight.copy_(self._base[name])
