"""The built-in backend, which writes changes into the weights; and how any backend is opened and filled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from editcore.interfaces.changes import Changes
from editcore.interfaces.errors import RunError
from editcore.interfaces.protocols import Backend, BackendContext, TakesContext
from editcore.models.edited import EditedModel
from editcore.models.weights import split_address
from editcore.models.writing import in_float64, misfits, rounded

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.interfaces.history import LedgerEntry
    from editcore.ledger.ledger import Ledger
    from editcore.models import LanguageModel
    from editcore.second_moments.linalg import Metric
    from editcore.second_moments.statistics import StatisticsStore

__all__ = ["RawBackend", "open_backend", "rebuild", "shape_in_words"]


def open_backend(
    backend: Backend,
    model: LanguageModel,
    *,
    statistics: Callable[[], StatisticsStore],
    directory: Path | None = None,
) -> None:
    """Give a backend an unedited model, and the context that it asks for.

    Args:
        statistics: opens the store of second moments; called only when some are needed.
    """

    def metrics(layers: Sequence[int]) -> Mapping[int, Metric]:
        return statistics().metrics(layers)

    if isinstance(backend, TakesContext):
        backend.take(BackendContext(metrics=metrics, directory=directory))
    backend.open(model)


def rebuild(edited: EditedModel, ledger: Ledger) -> None:
    """Write the active batches of a ledger into a model.

    Raises:
        RunError: what the ledger holds does not fit the model's weights, or is not finite; the model is as it was.
    """
    for entry in ledger.entries:  # undone batches too, so that a redo need not check them
        for solved in (entry, *ledger.revisions(entry.batch)):
            _check(solved, edited.model, f"{ledger.directory or 'The ledger'}, batch {entry.batch}")
    if active := ledger.active():
        edited.rebuild(active)


def _check(entry: LedgerEntry, model: LanguageModel, where: str) -> None:
    for address, found, expected in misfits(model, entry.changes):
        raise RunError(
            f"{where}: the change of {address} is {shape_in_words(found)}, in '{model.name}' the weight is "
            f"{shape_in_words(expected)} (out, in). It was not made for this model."
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


def shape_in_words(shape: Sequence[int]) -> str:
    """A shape in words: ``32 by 64``."""
    return " by ".join(map(str, shape)) or "a single number"


class RawBackend:
    """Writes ``base + Σ changes`` into each touched weight, summed in float64 and rounded once.

    The base of every touched weight is kept. The sum always starts from it and adds the active changes in their order:
    ((base + first) + second) + …. A weight therefore depends on the active changes alone, not on the way to them.
    Leaving one change out gives the bits that the others give when applied alone. A weight on trial has the bits that
    it would have if the change were applied.

    Memory: every weight that an active change ever touched keeps, on its device, its base in its own type and its sum
    in float64. The next batch is added to that sum. All sums together take at most a quarter of the memory of the
    model's weights. A weight whose sum does not fit is summed anew with each batch: the bits are the same, and the time
    grows with the number of batches.
    """

    def __init__(self) -> None:
        self._model: LanguageModel | None = None
        self._base: dict[str, Tensor] = {}
        self._active: list[Changes] = []
        self._sums: dict[str, tuple[int, Tensor]] = {}
        """By address: how many of the active changes are in the sum, and base + those changes, float64."""
        self._max_sum_bytes = 0
        """Bytes that all sums together may take."""

    def open(self, model: LanguageModel) -> None:
        """Take a model that no change has touched."""
        self._model, self._base, self._active, self._sums = model, {}, [], {}
        self._max_sum_bytes = sum(parameter.nbytes for parameter in model.hf.parameters()) // 4

    def apply(self, changes: Changes) -> None:
        """Add the changes of one batch to those that are active."""
        self._active.append(changes)
        try:
            self._write(changes)
        except BaseException:
            self._active.pop()
            self._sums.clear()  # some of them include the change already
            self._write(self._base)
            raise

    def rebuild(self, active: Sequence[Changes]) -> None:
        """Make exactly ``active``, in this order, the model's state."""
        self._active = list(active)
        self._sums.clear()
        self._write({*self._base, *(address for changes in active for address in changes)})

    @contextmanager
    def trial(self, changes: Changes) -> Iterator[None]:
        """Inside the block, the model has ``changes`` on top of the active ones, with the bits that :meth:`apply` would
        write."""
        model, active, known = self._opened, self._active, set(self._base)
        saved = {address: model.weight(address).detach().clone() for address in changes}
        try:
            self._active = [*active, changes]
            self._write(changes, keep=False)
            yield
        finally:
            self._active = active
            self._base = {address: base for address, base in self._base.items() if address in known}
            with torch.no_grad():
                for address, bits in saved.items():
                    model.weight(address).copy_(bits)

    @property
    def _opened(self) -> LanguageModel:
        if self._model is None:
            raise RuntimeError("RawBackend.open was not called")
        return self._model

    def _write(self, addresses: Collection[str], *, keep: bool = True) -> None:
        """Write base and active changes into the weights at ``addresses``.

        Args:
            keep: whether to keep the sums for the next batch.
        """
        model = self._opened
        for address in addresses:
            if address not in self._base:
                self._take_base(model, address)
        summed_whole = {name for name in self._base if split_address(name)[1] is None}
        done: set[str] = set()
        for address in sorted(addresses):
            name = split_address(address)[0]
            target = name if name in summed_whole else address
            if target not in done:
                done.add(target)
                self._write_sum(model, target, keep=keep)

    def _take_base(self, model: LanguageModel, address: str) -> None:
        """Keep the bits that a weight has before its first change. A part that was changed earlier has its own base
        already."""
        name, index = split_address(address)
        if index is not None and name in self._base:
            self._base[address] = self._base[name][index]
            return
        base = model.weight(address).detach().clone()
        if index is None:
            for other, bits in self._base.items():
                whole, place = split_address(other)
                if whole == name and place is not None:
                    base[place] = bits
                    self._sums.pop(other, None)  # from here on the whole weight is summed
        self._base[address] = base

    @torch.no_grad()
    def _write_sum(self, model: LanguageModel, address: str, *, keep: bool) -> None:
        """Add the active changes of a weight and of its parts to the base, in their order."""
        weight, base = model.weight(address), self._base[address]
        done, total = (self._sums.pop if keep else self._sums.get)(address, (0, None))
        if total is not None and not keep:
            total = total.clone()
        for changes in self._active[done:]:
            for other, change in changes.items():
                name, index = split_address(other)
                if other != address and name != address:
                    continue
                if total is None:
                    total = base.to(torch.float64, copy=True)
                place = total if other == address else total[index]
                place += model.as_out_in(other, in_float64(change, total))
        weight.copy_(base if total is None else rounded(total, model.weights.type_of(address)))
        if total is None or not keep:
            return
        if total.nbytes + sum(kept.nbytes for _, kept in self._sums.values()) <= self._max_sum_bytes:
            self._sums[address] = len(self._active), total
