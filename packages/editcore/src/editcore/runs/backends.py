"""The built-in backend, which writes changes into the weights; and how any backend is opened and filled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from editcore.interfaces.changes import Changes, FactoredDelta
from editcore.interfaces.errors import RunError
from editcore.interfaces.protocols import Backend, BackendContext, TakesContext
from editcore.ledger.tensors import TensorNames, change_at
from editcore.models.edited import EditedModel
from editcore.models.weights import split_address
from editcore.models.writing import in_float64, misfits, rounded
from editcore.runs.running_sums import use_sums

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.ledger.ledger import Ledger
    from editcore.ledger.reading import StoredTensors
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
    """Write the active batches of a ledger into a model. From here on, tensors of the ledger are refused as they are
    read, if they do not fit the model's weights or are not finite.

    Raises:
        RunError: a tensor does not fit; the model is as it was.
    """
    if ledger.reader is not None:
        ledger.reader.check = partial(_check, edited.model)
    if active := ledger.active():
        use_sums(edited, ledger)
        edited.rebuild(active)


def _check(model: LanguageModel, stored: StoredTensors, tensors: Mapping[str, Tensor]) -> None:
    """Refuse the tensors of a file that do not fit a model."""
    with stored.problems():
        names = TensorNames.of(tensors, stored.ids)
        changes = {address: change_at(address, tensors) for address in names.changes}
    for address, found, expected in misfits(model, changes):
        raise RunError(
            f"{stored.where}: the change of {address} is {shape_in_words(found)}, in '{model.name}' the weight is "
            f"{shape_in_words(expected)} (out, in). It was not made for this model."
        )
    for address, change in changes.items():
        if not change.is_finite():
            raise RunError(f"{stored.where}: the change of {address} holds NaN or Inf.")
    for request_id, (row, keys, values) in names.known.items():
        for kind, addresses, side in (("value", values, 0), ("key", keys, 1)):
            for address in addresses:
                tensor = tensors[f"{kind}/{row}/{address}"]
                width = model.as_out_in(address, model.weight(address)).shape[side]
                if tuple(tensor.shape) != (width,) or not tensor.isfinite().all():
                    raise RunError(
                        f"{stored.where}: the {kind} of the edit '{request_id}' at {address} has to be {width} finite "
                        "numbers."
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
    grows with the number of batches. Sums are kept while the model is unedited for a moment.
    """

    def __init__(self) -> None:
        self._model: LanguageModel | None = None
        self._base: dict[str, Tensor] = {}
        self._active: list[Changes] = []
        self._summed: list[Changes] = []
        """What the sums are over. It may differ from the active changes while there are none."""
        self._sums: dict[str, tuple[int, Tensor]] = {}
        """By address: how many of the summed changes are in the sum, and base + those changes, float64. The others do
        not touch the address."""
        self._without_sum: set[str] = set()
        """Changed weights whose sum is not kept."""
        self._max_sum_bytes = 0
        """Bytes that all sums together may take."""

    def open(self, model: LanguageModel) -> None:
        """Take a model that no change has touched."""
        self._model, self._base, self._active = model, {}, []
        self._forget_sums()
        self._max_sum_bytes = sum(parameter.nbytes for parameter in model.hf.parameters()) // 4

    def apply(self, changes: Changes) -> None:
        """Add the changes of one batch to those that are active."""
        before = self._active
        self._make_active([*before, changes])
        try:
            self._write(changes)
        except BaseException:
            self._active = before
            self._forget_sums()  # some of them include the change already
            self.rebuild(before)
            raise

    def rebuild(self, active: Sequence[Changes]) -> None:
        """Make exactly ``active``, in this order, the model's state."""
        if not active:
            self._active = []
            self._restore()
            return
        self._make_active(active)
        self._write({*self._base, *(address for changes in active for address in changes)})

    @contextmanager
    def trial(self, changes: Changes) -> Iterator[None]:
        """Inside the block, the model has ``changes`` on top of the active ones, with the bits that :meth:`apply` would
        write."""
        model, active, known = self._opened, self._active, set(self._base)
        saved = {address: model.weight(address).detach().clone() for address in changes}
        if not active:
            self._forget_sums()
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

    def take_sums(self, summed: Sequence[Changes], sums: Mapping[str, Tensor]) -> None:
        """Use sums that are known already, when changes that begin with ``summed`` are made active. The model is
        unedited.

        Args:
            sums: as :meth:`sums` gave them.
        """
        model = self._opened
        self._forget_sums()
        for address, total in sums.items():
            self._take_base(model, address)
            self._sums[address] = len(summed), total.to(self._base[address].device)
        self._summed = list(summed)

    def sums(self) -> Mapping[str, Tensor] | None:
        """Base + active changes of every changed weight, in the shape in which the weight is stored, float64; ``None``
        if some of them are not kept. They change with the next batch."""
        if self._without_sum or not _same(self._active, self._summed):
            return None
        return {address: total for address, (_, total) in self._sums.items()}

    def change_of(self, address: str) -> Tensor | None:
        """The sum of the active changes of a weight, in its stored shape, float64; ``None`` if no sum of it is kept."""
        if address not in self._sums or not _same(self._active, self._summed):
            return None
        _, total = self._sums[address]
        return total - self._base[address].to(total)

    @property
    def _opened(self) -> LanguageModel:
        if self._model is None:
            raise RuntimeError("RawBackend.open was not called")
        return self._model

    def _forget_sums(self) -> None:
        self._summed, self._sums, self._without_sum = [], {}, set()

    def _make_active(self, active: Sequence[Changes]) -> None:
        """Note what is active from here on, and keep the sums over its beginning."""
        common = _common(active, self._summed)
        self._sums = {address: found for address, found in self._sums.items() if found[0] <= common}
        self._active = list(active)
        self._summed = list(active)

    @torch.no_grad()
    def _restore(self) -> None:
        """Write the base of every weight."""
        for address, base in self._base.items():
            self._opened.weight(address).copy_(base)

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
        targets = []
        for address in sorted(addresses):
            name = split_address(address)[0]
            targets.append(name if name in summed_whole else address)
        group: dict[str, _Sum] = {}
        for target in dict.fromkeys(targets):
            done, total = (self._sums.pop if keep else self._sums.get)(target, (0, None))
            group[target] = _Sum(done, total.clone() if total is not None and not keep else total)
            room = self._max_sum_bytes - sum(kept.nbytes for _, kept in self._sums.values())
            if sum(8 * self._base[address].numel() for address in group) >= room:
                self._write_sums(group, keep=keep)
                group = {}
        self._write_sums(group, keep=keep)
        if keep:
            parts = {address for address in self._without_sum if split_address(address)[1] is not None}
            self._without_sum -= {part for part in parts if split_address(part)[0] in summed_whole}

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
                    if self._sums.pop(other, None) is not None:  # from here on the whole weight is summed
                        self._without_sum.add(other)
        self._base[address] = base

    @torch.no_grad()
    def _write_sums(self, sums: Mapping[str, _Sum], *, keep: bool) -> None:
        """Add the active changes of several weights and of their parts to the bases, in their order. Each batch is read
        once for all of them."""
        model = self._opened
        first = min((found.done for found in sums.values()), default=0)
        products: dict[tuple[object, ...], Tensor] = {}
        for position, changes in enumerate(self._active[first:], start=first):
            for other in changes:
                name, index = split_address(other)
                target = other if other in sums else name
                found = sums.get(target)
                if found is None or position < found.done:
                    continue
                if found.total is None:
                    found.total = self._base[target].to(torch.float64, copy=True)
                place, change = found.total if other == target else found.total[index], changes[other]
                # Products of a shape have one place: new ones, between tensors that stay, would tear the heap.
                place_of_product = (*change.shape, found.total.device)
                added = in_float64(change, found.total, products.get(place_of_product))
                if isinstance(change, FactoredDelta):
                    products[place_of_product] = added
                place += model.as_out_in(other, added)
        for address, found in sums.items():
            weight, total = model.weight(address), found.total
            weight.copy_(self._base[address] if total is None else rounded(total, model.weights.type_of(address)))
            if not keep:
                continue
            self._without_sum.discard(address)
            if total is None:
                continue
            if total.nbytes + sum(kept.nbytes for _, kept in self._sums.values()) <= self._max_sum_bytes:
                self._sums[address] = len(self._active), total
            else:
                self._without_sum.add(address)


@dataclass(slots=True)
class _Sum:
    """The sum at one weight while it grows."""

    done: int
    """How many of the active changes are in it."""
    total: Tensor | None
    """float64; ``None`` if none of them touches the weight."""


def _common(first: Sequence[Changes], second: Sequence[Changes]) -> int:
    """How many changes two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours is not theirs), min(len(first), len(second)))


def _same(first: Sequence[Changes], second: Sequence[Changes]) -> bool:
    return len(first) == len(second) == _common(first, second)
