"""The backend: the active edits form one adapter beside the weights, and other adapters can be attached."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from editcore import (
    BackendContext,
    Changes,
    FactoredDelta,
    HParamsError,
    PluginError,
    UnknownNameError,
    WeightChange,
)
from editcore.models import add_changes, in_float64, rounded
from editcore.second_moments import Metric
from torch import nn

from edit_lora.adapter import EDITS, Adapter, check_name, combine
from edit_lora.attached import read_attached
from edit_lora.factors import check_factors, factored
from edit_lora.hparams import LoraHParams
from edit_lora.overlay import Overlay
from edit_lora.reduction import Reduction, reduce, without_moment
from edit_lora.targets import Target, Targets, seen_from

if TYPE_CHECKING:
    from editcore import LanguageModel
    from torch import Tensor

__all__ = ["Attached", "LoraBackend"]

_UntiedEnd = tuple[Target, Target, list[FactoredDelta]]
"""Two ends of a tied weight, the first of which names it, and the changes that only the second one has."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attached:
    """An adapter that is attached beside the edits, and its strength."""

    adapter: Adapter
    scale: float


class LoraBackend:
    """Keeps the sum of the active changes as a peft adapter at each edited module, linear modules and embeddings alike.

    By default the adapter is exact: B holds the left factors side by side, A the right ones; a dense change is
    decomposed into singular vectors. With ``lora_rank``, each weight's adapter is cut from the exact sum whenever the
    sum changes, so that nothing depends on earlier cuts. The base weights are not written to, unless ``allow_fallback``
    puts the edits of a weight there. A weight that several modules share, such as tied embeddings, gets an adapter at
    each of them.

    A session's backend is ``session.backend``: :meth:`attach` puts other adapters beside the edits. They stay when
    edits are taken out, until :meth:`detach`.
    """

    def __init__(self, hparams: LoraHParams) -> None:
        self.hparams = hparams
        self._context: BackendContext | None = None
        self._metrics: dict[int, Metric] = {}
        self._active: list[Changes] = []
        self._held: dict[str, Reduction] = {}
        self._base: dict[str, Tensor] = {}
        """The original values of those weights that the edits were written into (``allow_fallback``)."""
        self._attached: dict[str, Attached] = {}
        self._factors: dict[int, tuple[WeightChange, FactoredDelta]] = {}
        """The factors of dense changes by the change's id. The change is kept too, so that no other object gets its
        id."""
        self._warned = False
        """Whether :func:`without_moment` was already logged."""

    def take(self, context: BackendContext) -> None:
        """Keep the context: it gives second moments, for a bounded rank, and the run directory with the attached
        adapters."""
        self._context = context

    def open(self, model: LanguageModel) -> None:
        """Take charge of an unedited model, and attach the adapters of its run."""
        self._model, self._targets = model, Targets(model.hf)
        self._overlay = Overlay(model.hf, self._targets)
        layout = model.layout
        self._layers = {layout.weight_name(layer): layer for layer in range(layout.num_layers)}
        self._metrics, self._active, self._held, self._base, self._attached = {}, [], {}, {}, {}
        self._factors, self._warned = {}, False
        if self._context is not None and self._context.directory is not None:
            for name, kept in read_attached(self._context.directory).items():
                self.attach(name, kept.adapter(), scale=kept.scale, force=kept.forced)

    def apply(self, changes: Changes) -> None:
        """Add the changes of a batch to those that are active.

        Raises:
            ModelError: an adapter cannot hold one of them: it changes a vector, a slice of a stack, or a weight of a
                module that is not an ``nn.Linear``, ``Conv1D`` or ``nn.Embedding``; the model is as it was.
            NumericalError: a rank leaves out too much (``lora_residual_threshold``); the model is as it was.
        """
        self._set_active([*self._active, changes], changes)

    def rebuild(self, active: Sequence[Changes]) -> None:
        """Give the model exactly the changes ``active``, in this order.

        Raises:
            ModelError, NumericalError: as :meth:`apply`.
        """
        self._set_active(list(active), {*self._held, *(name for changes in active for name in changes)})

    @contextmanager
    def trial(self, changes: Changes) -> Iterator[None]:
        """Add ``changes`` to the edits, inside the block only, with the adapter cut as :meth:`apply` would cut it.

        Raises:
            ModelError, NumericalError: as :meth:`apply`.
        """
        before, held = self._active, {name: self._held.get(name) for name in changes}
        self.apply(changes)
        try:
            yield
        finally:
            self._active = before
            for name, found in held.items():
                self._clear(name)
                if found is not None:
                    self._put(name, found)

    def statistics(self) -> dict[str, float | int | None]:
        """For results: ranks, and by each measure the smallest share of a change that is kept at any weight.

        A measure that is not known at every weight is ``None``.
        """
        held = self._held.values()
        return {
            "modules": len(held),
            "raw_modules": len(self._base),
            "exact_rank": max((reduction.exact_rank for reduction in held), default=0),
            "rank": max((reduction.delta.rank for reduction in held if not reduction.fell_back), default=0),
            "kept_frobenius": _least([reduction.kept_frobenius for reduction in held]),
            "kept_weighted": _least([reduction.kept_weighted for reduction in held]),
            "kept_keys": _least([reduction.kept_keys for reduction in held]),
        }

    @contextmanager
    def written(self) -> Iterator[None]:
        """Put all adapters into the model's weights and take the wrappers away, inside the block only.

        Each weight is the base's plus all changes, summed in float64 and rounded once. Where attached adapters change
        the ends of a tied weight differently, each end has a weight of its own inside the block. An adapter at the
        output head alone is such a case.
        """
        attached, untied = self._attached_to_weights()
        names = sorted({*self._held, *attached})
        with ExitStack() as stack:
            stack.callback(self._restore, {name: self._model.weight(name).detach().clone() for name in names})
            stack.enter_context(self._overlay.removed())
            for first, end, deltas in untied:
                stack.enter_context(self._own_weight(first, end, deltas))
            for name in names:
                inside = name in self._held and name not in self._base
                edits = self._in_weight(name, self._held[name]) if inside else []
                add_changes(self._model, name, [*edits, *attached.get(name, [])])
            yield

    def _attached_to_weights(self) -> tuple[dict[str, list[FactoredDelta]], list[_UntiedEnd]]:
        """The changes of the attached adapters: by weight name, and for each end that needs a weight of its own."""
        changes: dict[str, list[FactoredDelta]] = {}
        untied: list[_UntiedEnd] = []
        adapters = [
            self._targets.by_module(attached.adapter.scaled(attached.scale).factors)
            for attached in self._attached.values()
        ]
        groups = {ends[0].path: ends for factors in adapters for path in factors for ends in [self._targets.ends(path)]}
        for ends in groups.values():
            concerned = [factors for factors in adapters if any(end.path in factors for end in ends)]
            first, *others = ends
            changes[f"{first.path}.weight"] = [factors[first.path] for factors in concerned if first.path in factors]
            if not all(self._targets.changed_alike(factors, ends) for factors in concerned):
                untied += [
                    (first, end, [factors[end.path] for factors in concerned if end.path in factors]) for end in others
                ]
        return changes, untied

    @contextmanager
    def _own_weight(self, first: Target, end: Target, deltas: Sequence[FactoredDelta]) -> Iterator[None]:
        """Give an end of a tied weight a weight of its own, inside the block only: base, edits and ``deltas``.

        Args:
            first: the end that names the weight.
            deltas: as ``end`` sees them.
        """
        name = f"{first.path}.weight"
        module = self._targets.module(end.path)
        shared = module.weight
        total = shared.detach().double()
        total = total if end.kind == "linear" else total.T
        if name in self._held and name not in self._base:
            edits = self._held[name].delta
            scaled = FactoredDelta(edits.left * self.hparams.lora_scale, edits.right)
            total = total + in_float64(seen_from(scaled, first, end), total)
        for delta in deltas:
            total = total + in_float64(delta, total)
        own = total if end.kind == "linear" else total.T
        own = rounded(own, self._model.weights.type_of(name)).to(shared.dtype)
        module.weight = nn.Parameter(own.contiguous(), requires_grad=False)
        try:
            yield
        finally:
            module.weight = shared

    @property
    def attached(self) -> Mapping[str, Attached]:
        """The adapters beside the edits, by name."""
        return dict(self._attached)

    def attach(self, name: str, adapter: Adapter, *, scale: float = 1.0, force: bool = False) -> None:
        """Put an adapter beside the edits.

        Raises:
            HParamsError: the name is taken, or peft does not allow it.
            ModelError: the adapter was made for another base (``force`` overrides), or does not fit the modules.
        """
        self._check_free(name, self._attached)
        adapter.check_base(self._model.name, self._model.base_fingerprint, force=force)
        adapter.check_modules(self._targets)
        for path, delta in adapter.factors.items():
            self._overlay.put(name, path, delta, scale=scale)
        self._attached[name] = Attached(adapter, scale)

    def detach(self, name: str) -> None:
        """Take an attached adapter off.

        Raises:
            UnknownNameError: there is none of that name.
        """
        for path in self._find(name).adapter.factors:
            self._overlay.take(name, path)
        del self._attached[name]

    def scale(self, name: str, scale: float) -> None:
        """Set the strength of an attached adapter.

        Raises:
            UnknownNameError: there is none of that name.
        """
        found = self._find(name)
        for path in found.adapter.factors:
            self._overlay.rescale(name, path, scale)
        self._attached[name] = replace(found, scale=scale)

    def combine(self, names: Sequence[str], name: str) -> None:
        """Replace attached adapters by one with the same effect, named ``name``: peft's ``cat``.

        Raises:
            UnknownNameError: there is no adapter of one of the names.
        """
        found = [self._find(attached) for attached in names]
        made = combine([attached.adapter for attached in found], [attached.scale for attached in found])
        self._check_free(name, self._attached.keys() - set(names))
        for attached in names:
            self.detach(attached)
        self.attach(name, made, force=True)  # the parts were checked

    def _check_free(self, name: str, taken: Collection[str]) -> None:
        check_name(name)
        if name in taken:
            raise HParamsError(f"The name '{name}' is taken; the model has {', '.join(sorted(taken))}. Give another.")

    def _find(self, name: str) -> Attached:
        if name not in self._attached:
            raise UnknownNameError("adapter", name, self._attached)
        return self._attached[name]

    def _set_active(self, active: list[Changes], names: Mapping[str, object] | set[str]) -> None:
        """Make ``active`` the edits.

        Args:
            names: of the weights that differ from before; the others keep their adapters.
        """
        by_weight = {name: [changes[name] for changes in active if name in changes] for name in sorted(names)}
        for name, changes in by_weight.items():
            self._check(name, changes)
        found = {name: self._reduce(name, changes) for name, changes in by_weight.items() if changes}  # may refuse
        self._active = active
        alive = {id(change) for changes in active for change in changes.values()}
        self._factors = {key: kept for key, kept in self._factors.items() if key in alive}
        for name in by_weight:
            self._clear(name)
            if name in found:
                self._put(name, found[name])

    def _check(self, name: str, changes: Sequence[WeightChange]) -> None:
        for change in changes:
            check_factors({name: change}, whose=f"The edits of {self._model.name}")
        self._ends(name)

    def _ends(self, name: str) -> tuple[Target, ...]:
        """The modules that need an adapter if a weight changes; the module that names the weight comes first."""
        self._model.weight(name)  # refuses what is not there
        return self._targets.of_weight(name)

    def _reduce(self, name: str, changes: Sequence[WeightChange]) -> Reduction:
        factors = [self._factored(change) for change in changes]
        layer = self._layers.get(name)
        found = reduce(factors, self.hparams, None if layer is None else lambda: self._metric(layer), name=name)
        if not found.whole:
            kept, of = (found.kept_frobenius, "of ‖Δ‖²")
            if found.kept_weighted is not None:
                kept, of = (found.kept_weighted, "on ordinary text")
            _log.info("%s: rank %d of %d keeps %.1f %% %s", name, found.delta.rank, found.exact_rank, 100 * kept, of)
        if layer is None and (not found.whole or found.fell_back) and not self._warned:
            if warning := without_moment(self.hparams, name):
                _log.warning("lora: %s", warning)
            self._warned = True
        if found.fell_back:
            _log.warning("%s: rank %s leaves out too much; its edits are written into the weight", name,
                         self.hparams.lora_rank)  # fmt: skip
        return found

    def _factored(self, change: WeightChange) -> FactoredDelta:
        """The change as factors, on the model's device. Those of a dense change are kept while it is active."""
        if isinstance(change, FactoredDelta):
            return factored(change.to(self._model.device))
        if id(change) not in self._factors:
            self._factors[id(change)] = (change, factored(change.to(self._model.device)))
        return self._factors[id(change)][1]

    def _put(self, name: str, found: Reduction) -> None:
        self._held[name] = found
        if found.fell_back:
            self._base[name] = self._model.weight(name).detach().clone()
            add_changes(self._model, name, self._in_weight(name, found))
            return
        alpha, scale = self.hparams.lora_alpha, self.hparams.lora_scale
        first, *others = self._ends(name)
        for end in (first, *others):
            self._overlay.put(EDITS, end.path, seen_from(found.delta, first, end), alpha=alpha, scale=scale)

    def _clear(self, name: str) -> None:
        self._held.pop(name, None)
        for end in self._ends(name):
            self._overlay.take(EDITS, end.path)
        if name in self._base:
            self._restore({name: self._base.pop(name)})

    def _in_weight(self, name: str, found: Reduction) -> list[WeightChange]:
        """What to add to a weight. Where nothing is cut, these are the changes themselves, so that the sum has the same
        bits as with the backend raw."""
        changes: list[WeightChange] = [found.delta]
        if found.whole:
            changes = [active[name] for active in self._active if name in active]
        return [change.scaled(self.hparams.lora_scale) for change in changes]

    @torch.no_grad()
    def _restore(self, bits: Mapping[str, Tensor]) -> None:
        for name, saved in bits.items():
            self._model.weight(name).copy_(saved)

    def _metric(self, layer: int) -> Metric:
        if layer not in self._metrics:
            if self._context is None:
                raise PluginError("lora: a bounded rank needs second moments, and the backend was given no context.")
            with ExitStack() as stack:  # moments that are not cached are computed by running the unedited model
                now = {name: self._model.weight(name).detach().clone() for name in self._base}
                stack.callback(self._restore, now)
                self._restore(self._base)
                stack.enter_context(self._overlay.removed())
                self._metrics[layer] = self._context.metrics([layer])[layer]
        return self._metrics[layer]


def _least(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return min(known) if known and len(known) == len(shares) else None
