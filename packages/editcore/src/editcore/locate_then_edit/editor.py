"""The way of every locate-then-edit method: keys, targets, and one solve per layer.

A method is how one layer is solved; everything else is here (:class:`LocateThenEdit`). Several layers share a fact's
residual as MEMIT does (arXiv 2210.07229, section 4.3): each layer takes an equal part of what is left, keys and
residuals are measured anew once the layers below have theirs.

Shapes: ``n`` edits, ``contexts`` templates, ``d_in``, ``d_out`` the widths of the edited projection.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from editcore.interfaces.errors import HParamsError, NumericalError, RequestError
from editcore.interfaces.protocols import EditContext
from editcore.interfaces.values import (
    EditBatch,
    EditEvidence,
    EditRequest,
    FactoredDelta,
    HeldKey,
    KnownTarget,
    Proposal,
)
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.located import traced_layer
from editcore.locate_then_edit.targets import Targets, optimise_targets, tails_fit
from editcore.locate_then_edit.templates import sample_context_templates
from editcore.models.capture import Climb, project
from editcore.models.tokens import TokenRow, lookup_row
from editcore.models.writing import applied
from editcore.second_moments.linalg import Metric, Update, hold_at, solve_update

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["LayerSolver", "LocateThenEdit", "LocateThenEditHParams", "Prepared", "prepare", "propose", "resolve"]

LayerSolver = Callable[[Tensor, Tensor, Metric, Tensor], Update]
"""``(keys [n, d_in], residuals [n, d_out], metric, weights [n]) -> Update``."""

_LOW_FRACTION = 0.5
"""Below this median fraction of the residual, a batch is unlikely to say what it was told; the user is warned."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was learnt from the unedited model."""

    templates: tuple[str, ...]
    metrics: Mapping[int, Metric]
    """By layer, the second moment C of the unedited model's keys."""
    layers: tuple[int, ...]
    """Those that may be edited; ``layer_selection`` says how many of them a batch takes."""
    shortcuts: dict[int, bool] = field(default_factory=dict)
    """By layer, whether the value optimisation may compute only what δ can change; found with the first batch."""

    def provenance(self) -> dict[str, Any]:
        """What a run records of it, JSON-able."""
        return {"context_templates": list(self.templates), "layers": list(self.layers)}


def prepare(model: LanguageModel, hparams: LocateThenEditHParams, context: EditContext, *, owner: str) -> Prepared:
    """Check the layers, fetch the second moments, and fix the context templates.

    Raises:
        HParamsError: a layer does not exist, the settings do not fit the model, or a tracing of it is asked for and is
            not there.
    """
    for layer in hparams.layers:
        model.check_layer(layer, setting=owner)
    last = model.layout.num_layers - 1
    if hparams.v_loss_layer is not None and hparams.v_loss_layer != last:
        raise HParamsError(
            f"{owner}: v_loss_layer is {hparams.v_loss_layer}, but the loss is read from the model's own logits, "
            f"which {model.name} makes from its last block, {last}. Leave v_loss_layer out."
        )
    if len(hparams.layers) > 1 and hparams.layer_selection == "all" and model.layout.norm_placement == "post":
        raise HParamsError(
            f"{owner}: layers is {list(hparams.layers)}, but in {model.name} a norm follows the edited projection, so "
            "a residual cannot be spread over several layers. Give one layer, such as --set layers=[1]."
        )
    layers = hparams.layers
    if hparams.layer_selection == "traced":
        layers = (traced_layer(model, layers, owner=owner),)
    templates = hparams.context_templates
    if templates is None:
        templates = sample_context_templates(
            model, seed=context.seed, count=hparams.context_count, length=hparams.context_length
        )
    if hparams.mom2_adjustment:
        return Prepared(templates, context.statistics.metrics(layers), layers)
    # C = I, where the text is not to be asked.
    identity = Metric(torch.eye(model.layout.d_ff, dtype=torch.float64))
    return Prepared(templates, {layer: identity.to(model.place(layer)) for layer in layers}, layers)


@dataclass(slots=True)
class _Clock:
    """Wall time by stage."""

    seconds: dict[str, float]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def propose(
    model: LanguageModel,
    batch: EditBatch,
    context: EditContext,
    *,
    hparams: LocateThenEditHParams,
    prepared: Prepared,
    solve: LayerSolver,
    ridge: float,
    held_at: Literal["keys", "bare"] = "keys",
    asks: Literal["shift", "value"] = "shift",
) -> Proposal:
    """Solve one batch, layer by layer; the model is back to the bit when this returns or raises.

    Args:
        ridge: λ of the solve, which turns ``mom2_update_weight = "auto"`` into a number (0 for constraints).
        held_at: the key that gets the residual: the one the solve is given (the mean over the contexts), or the bare
            prompt's, to which the solved change is then rescaled (:func:`editcore.second_moments.hold_at`; λ must be
            0).
        asks: what a new fact asks for: δ more than its key gives now, or the bare prompt's value h₀ + δ. The two differ
            by W(k_bare − k) where the key is a mean over contexts.

    Raises:
        RequestError: the batch is empty.
        SubjectNotFoundError: a subject is not found in its tokens.
        NumericalError: a value is not finite.
    """
    if not batch.requests:
        raise RequestError("There is nothing to edit: the batch is empty.")
    clock = _Clock({})
    layers = _chosen_layers(hparams.layer_selection, prepared.layers, batch, context.seed)
    with clock.stage("targets"):
        asked = _Asked.optimise(model, batch, layers, hparams, prepared, context)
    weights = torch.tensor(batch.weights, dtype=torch.float64)
    deltas: dict[str, FactoredDelta] = {}
    solved: list[_SolvedLayer] = []
    # Where prefix caches fit, no block reads more of the lower ones than the residual stream.
    keep = len(layers) > 1 and prepared.shortcuts.get(layers[-1], False)
    looking = _Looking(model, hparams, prepared.templates, held_at=held_at, keep=keep)
    for number, layer in enumerate(layers):
        name = model.layout.weight_name(layer)
        with applied(model, deltas):
            with clock.stage("keys"):
                kept = _kept_keys(batch, name, asked.row) if _keys_stay(layer, prepared, held_at) else {}
                seen = _see(looking, batch, layer, layers[-1], kept=kept)
            share = 1 / (len(layers) - number)
            residuals = asked.residuals(batch, name, seen, share=share, asks=asks, model=model)
            weight_norm = float(model.weight(name).float().norm())
        with clock.stage("solve"):
            text = prepared.metrics[layer]
            weight = _moment_weight(hparams, seen.keys, text, ridge)
            priced = text.scaled(weight=weight, ridge=hparams.update_norm_lambda)
            metric = _holding(priced, batch.held, name, weight)
            update = solve(seen.keys, residuals, metric, weights.to(seen.keys))
            if held_at == "bare":
                update = hold_at(update, seen.keys, seen.held_keys, metric)
        if not update.delta.is_finite():
            raise NumericalError(f"The update of {name} holds NaN or Inf; nothing was applied.")
        deltas[name] = update.delta
        solved.append(_SolvedLayer(name, layer, seen, residuals, update, priced, text, weight, weight_norm))
    diagnostics: dict[str, float] = {}
    for one in solved:
        diagnostics |= one.diagnostics()
        if hparams.calculate_objective_value:
            diagnostics |= one.objective(batch)
    return Proposal(
        deltas=deltas,
        evidence=tuple(asked.evidence(batch, solved)),
        known={request.id: _known(row, solved) for row, request in enumerate(batch.requests)},
        diagnostics=diagnostics,
        notes=(*asked.notes(), *solved[0].notes(), *(note for one in solved for note in one.warnings(hparams))),
        seconds=clock.seconds,
    )


def resolve(
    model: LanguageModel,
    batch: EditBatch,
    deltas: Mapping[str, FactoredDelta],
    rows: Sequence[int],
    *,
    hparams: LocateThenEditHParams,
    prepared: Prepared,
    solve: LayerSolver,
    ridge: float,
) -> dict[str, FactoredDelta] | None:
    """Solve some requests of a batch again, from their stored keys and residuals; see :class:`editcore.Resolves`.

    Of Δ = R (KᵀC'⁻¹K + Λ)⁻¹KᵀC'⁻¹ the ledger has K and, as the left factor, R. Fewer columns of both give what
    :func:`propose` would have given for those requests at the time, without running the model. The solve must be of
    this form: one column of the left factor per request, and a right factor that depends on keys and weights alone.

    Args:
        ridge: as for :func:`propose`. Its ``held_at`` must have been ``keys``: other keys are not kept.

    Returns:
        ``None`` for a batch of several layers, where keys of the upper ones depend on what the lower ones got.
    """
    if len(deltas) != 1:
        return None
    [(name, delta)] = deltas.items()
    chosen = [batch.requests[row].id for row in rows]
    if delta.rank != len(batch) or any(name not in batch.known[one].keys for one in chosen):
        return None
    layer = model.layout.layer_of(name)
    place, text = model.place(layer), prepared.metrics[layer]
    keys = torch.stack([batch.known[one].keys[name] for one in chosen]).to(place)  # [n, d_in]
    residuals = delta.left.T[list(rows)].to(place)  # [n, d_out]
    weights = torch.tensor([batch.weights[row] for row in rows], dtype=torch.float64, device=place)
    weight = _moment_weight(hparams, keys, text, ridge)
    metric = _holding(text.scaled(weight=weight, ridge=hparams.update_norm_lambda), batch.held, name, weight)
    right = solve(keys, residuals, metric, weights).delta.right
    return {name: FactoredDelta(delta.left[:, list(rows)].to(right), right)}


class LocateThenEdit:
    """An editor of this kind. Subclasses give their :attr:`name`, and what differs of :attr:`ridge` and :meth:`solve`.

    Without a change it is the shared solve of :func:`editcore.second_moments.linalg.solve_update` with :attr:`ridge`.
    """

    name: ClassVar[str]
    """As it is announced; error messages begin with it."""
    right_from_keys: ClassVar[bool] = False
    """True if the solve's left factor has one column per request, and its right factor depends on keys and weights
    alone. A batch without some of its facts is then solved from the ledger (:func:`resolve`)."""

    def __init__(self, hparams: LocateThenEditHParams) -> None:
        self.hparams = hparams
        self._prepared: Prepared | None = None

    @property
    def ridge(self) -> float:
        """λ of the solve; 0 makes every fact a constraint."""
        return 0.0

    def solve(self, keys: Tensor, residuals: Tensor, metric: Metric, weights: Tensor) -> Update:
        """The change of one layer.

        Args:
            keys: ``[n, d_in]``
            residuals: ``[n, d_out]``
            weights: ``[n]``
        """
        tikhonov = self.hparams.tikhonov
        return solve_update(keys, residuals, metric, ridge=self.ridge, tikhonov=tikhonov, weights=weights)

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Fetch second moments and context templates from the unedited model."""
        self._prepared = prepare(model, self.hparams, context, owner=self.name)
        return self._prepared.provenance()

    def prepared(self, model: LanguageModel, context: EditContext) -> Prepared:
        """What :meth:`prepare` learnt; of a model that it was not shown, it is learnt now."""
        if self._prepared is None:
            self.prepare(model, context)
        assert self._prepared is not None
        return self._prepared

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Solve one batch on the model as it is now."""
        prepared = self.prepared(model, context)
        return propose(
            model, batch, context, hparams=self.hparams, prepared=prepared, solve=self.solve, ridge=self.ridge
        )

    def resolve(
        self,
        model: LanguageModel,
        batch: EditBatch,
        deltas: Mapping[str, FactoredDelta],
        rows: Sequence[int],
        context: EditContext,
    ) -> Mapping[str, FactoredDelta] | None:
        """Solve a batch of one layer again without some of its facts; see :class:`editcore.Resolves`."""
        if not self.right_from_keys:
            return None
        prepared = self.prepared(model, context)
        return resolve(
            model, batch, deltas, rows, hparams=self.hparams, prepared=prepared, solve=self.solve, ridge=self.ridge
        )


def _chosen_layers(selection: str, layers: tuple[int, ...], batch: EditBatch, seed: int) -> tuple[int, ...]:
    if selection != "random":
        return layers
    # A string seed, because it is hashed with sha512: nearby batches draw independently.
    return (random.Random(f"layer:{seed}:{batch.index}").choice(layers),)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the model shows at one layer for the facts of a batch."""

    keys: Tensor
    """Weighted mean over the contexts, ``[n, d_in]`` float64."""
    held_keys: Tensor
    """Keys that shall have the value asked for, ``[n, d_in]`` float64: ``keys``, or those of the bare prompts."""
    outputs: Tensor
    """W k (bias included) of ``held_keys``, ``[n, d_out]`` float64."""
    bare_outputs: Tensor
    """W k (bias included) of the bare prompts' keys, ``[n, d_out]`` float64."""
    stream: Tensor
    """Output of the deepest edited block on the bare prompt, ``[n, d_model]`` float64."""

    @classmethod
    def join(cls, parts: Sequence[_Seen], order: Tensor) -> _Seen:
        """Facts of several looks behind each other, then in ``order [n]``."""
        joined = [torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__]
        return cls(*(whole[order.to(whole.device)] for whole in joined))


def _keys_stay(layer: int, prepared: Prepared, held_at: str) -> bool:
    """Whether what the ledger has of earlier keys at ``layer`` is what a forward pass would give: keys depend on the
    weights below alone, and none of this run's edits is below its lowest layer. Bare keys that hold a value are kept in
    place of those that the solve is given."""
    return layer == min(prepared.layers) and held_at == "keys"


def _kept_keys(batch: EditBatch, name: str, fresh: Mapping[str, int]) -> dict[int, Tensor]:
    """By row, the stored keys of replayed facts that are not optimised anew."""
    return {
        row: batch.known[one.id].keys[name]
        for row, one in enumerate(batch.requests)
        if row >= batch.num_new and one.id not in fresh and name in batch.known[one.id].keys
    }


def _see(
    looking: _Looking,
    batch: EditBatch,
    layer: int,
    deepest: int,
    *,
    kept: Mapping[int, Tensor],
) -> _Seen:
    """What the model shows for all facts; those with a kept key pass through the edited projection alone."""
    looked, model = [row for row in range(len(batch)) if row not in kept], looking.model
    parts = [
        looking.at({row: batch.requests[row] for row in looked[start : start + _LOOKED_AT]}, layer, deepest)
        for start in range(0, len(looked), _LOOKED_AT)
    ]
    if not kept:
        return parts[0] if len(parts) == 1 else _Seen.join(parts, torch.arange(len(batch)))
    name = model.layout.weight_name(layer)
    d_in = model.as_out_in(name, model.weight(name)).shape[1]
    for row, key in kept.items():
        if key.shape != (d_in,):
            raise NumericalError(
                f"The stored key of '{batch.requests[row].text}' has the shape {list(key.shape)}, but {name} of "
                f"{model.name} takes {d_in} numbers: it comes from another model. Edit the fact anew."
            )
    keys = torch.stack([key.double() for key in kept.values()]).to(model.place(layer))  # [kept, d_in]
    outputs = project(model, layer, keys)
    # A known fact asks for a value, not for what the layers below left of δ: its stream is not looked at.
    parts.append(_Seen(keys, keys, outputs, outputs, torch.zeros_like(outputs)))
    return _Seen.join(parts, torch.tensor([*looked, *kept]).argsort())


def _holding(metric: Metric, held: Sequence[HeldKey], name: str, weight: float) -> Metric:
    """w·(C + Σ μ kkᵀ) + …: the objective gets w Σ μ ‖Δk‖² over the held facts beside w times its mean over the text.

    A fact that has no key at this weight was written elsewhere, and this weight's change does not move it here.

    Raises:
        NumericalError: a key does not fit the weight.
    """
    here = [one for one in held if name in one.keys and one.weight > 0]
    if not here:
        return metric
    width = len(metric.matrix)
    for one in here:
        if one.keys[name].shape != (width,):
            raise NumericalError(
                f"The stored key of '{one.request_id}' (batch {one.batch}) has the shape "
                f"{list(one.keys[name].shape)}, but {name} takes {width} numbers: it comes from another model."
            )
    keys = torch.stack([one.keys[name].double() for one in here])  # [h, d_in]
    weights = torch.tensor([one.weight for one in here], dtype=torch.float64)
    return metric.plus(keys, weight * weights)


_LOOKED_AT = 128
"""Facts whose keys in all contexts are held at a time, until their means are taken."""
_KEPT_BYTES = 2**28
"""Memory for what enters the edited block of one layer, from where the facts are looked at in the next."""


class _Looking:
    """The facts of a batch, looked at in one layer after the other."""

    def __init__(
        self,
        model: LanguageModel,
        hparams: LocateThenEditHParams,
        templates: Sequence[str],
        *,
        held_at: Literal["keys", "bare"],
        keep: bool,
    ) -> None:
        """``keep``: whether the next layer may begin where the last one ended."""
        self.model, self.hparams, self.held_at = model, hparams, held_at
        self.templates = templates[:1] if hparams.key_weighting == "prompt" else templates
        self.climb = Climb(model, keep_bytes=_KEPT_BYTES if keep else 0)

    def at(self, requests: Mapping[int, EditRequest], layer: int, deepest: int) -> _Seen:
        """Some facts, by their row in the batch."""
        bare = self.climb.capture(self._rows(requests, range(1)), sorted({layer, deepest}))
        seen = [bare[layer]]
        if len(self.templates) > 1:  # of which only the bare prompts go on to the deepest layer
            contexts = self._rows(requests, range(1, len(self.templates)))
            seen.append(self.climb.capture(contexts, [layer])[layer])
        shares = context_weights(len(self.templates), self.hparams.key_weighting).to(self.model.place(layer))

        def mean(parts: Sequence[Tensor]) -> Tensor:
            per_context = [part.double().reshape(len(requests), -1, part.shape[-1]) for part in parts]
            return torch.einsum("c,ncw->nw", shares, torch.cat(per_context, dim=1))

        # The projection is linear and the shares sum to one, so the mean output is the output of the mean key.
        keys, bare_keys, bare_outputs = (
            mean([one.inputs for one in seen]),
            seen[0].inputs.double(),
            seen[0].outputs.double(),
        )
        at_keys = self.held_at == "keys"
        return _Seen(
            keys=keys,
            held_keys=keys if at_keys else bare_keys,
            outputs=mean([one.outputs for one in seen]) if at_keys else bare_outputs,
            bare_outputs=bare_outputs,
            stream=bare[deepest].block_outputs.double().to(shares.device),
        )

    def _rows(self, requests: Mapping[int, EditRequest], numbers: Sequence[int]) -> dict[Hashable, TokenRow]:
        return {
            (place, number): lookup_row(
                self.model, request, template=self.templates[number], fact_token=self.hparams.fact_token
            )
            for place, request in requests.items()
            for number in numbers
        }


def context_weights(count: int, weighting: Literal["grouped", "mean", "prompt"]) -> Tensor:
    """Share of each context in a mean key, ``[count]`` float64, the bare prompt first.

    ``grouped``: ½ for the bare prompt, ½ for the others together (MEMIT's code). ``mean``: all alike (ROME, eq. 3).
    """
    if weighting == "mean" or count == 1:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    return torch.tensor([0.5] + [0.5 / (count - 1)] * (count - 1), dtype=torch.float64)


@dataclass(slots=True)
class _Asked:
    """What the facts of a batch ask for: δ for the new ones, stored values for those already known."""

    targets: Targets | None
    row: Mapping[str, int]
    """Row in ``targets`` by request id."""
    start: Tensor | None = None
    """The stream before the first layer of this batch was updated."""

    @classmethod
    def optimise(
        cls,
        model: LanguageModel,
        batch: EditBatch,
        layers: Sequence[int],
        hparams: LocateThenEditHParams,
        prepared: Prepared,
        context: EditContext,
    ) -> _Asked:
        names = {model.layout.weight_name(one) for one in layers}
        # A replayed fact that was written elsewhere (layers drawn at random) has no value here; the model says it as it
        # is, as a rule, so that its optimisation ends with its first evaluation.
        elsewhere = {
            one.id
            for one in batch.requests[batch.num_new :]
            if not names <= batch.known.get(one.id, _NOWHERE).values.keys()
        }
        fresh = [one for one in batch.requests if one.id not in batch.known or one.id in elsewhere]
        if not fresh:
            return cls(None, {})
        layer = layers[-1]
        if layer not in prepared.shortcuts:
            prepared.shortcuts[layer] = tails_fit(
                model, fresh[0], layer=layer, templates=prepared.templates, hparams=hparams
            )
        targets = optimise_targets(
            model,
            fresh,
            layer=layer,
            templates=prepared.templates,
            hparams=hparams,
            shortcut=prepared.shortcuts[layer],
            progress=context.progress,
        )
        return cls(targets, {request.id: row for row, request in enumerate(fresh)})

    def residuals(
        self,
        batch: EditBatch,
        name: str,
        seen: _Seen,
        *,
        share: float,
        asks: Literal["shift", "value"],
        model: LanguageModel,
    ) -> Tensor:
        """What this layer is asked to add to each fact's output, ``[n, d_out]`` float64.

        A new fact asks for its share of what is left of δ once the layers below have done theirs, on top of what its
        key gives now (``shift``) or of what the bare prompt's key gives (``value``). A known fact asks for the value it
        had at this layer when it was solved.
        """
        if self.start is None:
            self.start = seen.stream
        done = (seen.stream - self.start.to(seen.stream)) / model.layout.residual_scale
        residuals = torch.empty_like(seen.outputs)
        for row, request in enumerate(batch.requests):
            if request.id in self.row:
                assert self.targets is not None
                delta = self.targets.deltas[self.row[request.id]].double().to(done.device)
                residuals[row] = (delta - done[row]) * share
                if asks == "value":
                    residuals[row] += seen.bare_outputs[row] - seen.outputs[row]
            else:
                value = _stored_value(batch.known[request.id], name, request)
                if value.shape != seen.outputs[row].shape:
                    raise NumericalError(
                        f"The stored value of '{request.text}' has the shape {list(value.shape)}, but {name} of "
                        f"{model.name} gives {seen.outputs.shape[1]} numbers: it comes from another model. Edit the "
                        "fact anew."
                    )
                residuals[row] = value.to(done) - seen.outputs[row]
        return residuals

    def evidence(self, batch: EditBatch, solved: Sequence[_SolvedLayer]) -> Iterator[EditEvidence]:
        """Per request, in the batch's order."""
        first = solved[0]
        asked = first.residuals.norm(dim=1)
        costs = _costs(solved)
        for row, request in enumerate(batch.requests):
            place = self.row.get(request.id)
            fresh = self.targets if place is not None else None
            yield EditEvidence(
                request_id=request.id,
                replayed=row >= batch.num_new,
                steps=fresh.steps[place] if fresh and place is not None else 0,
                target_loss=fresh.losses[place] if fresh and place is not None else None,
                target_probability=fresh.probabilities[place] if fresh and place is not None else None,
                delta_norm=float(fresh.deltas[place].norm() if fresh and place is not None else asked[row]),
                value_norm=float(
                    fresh.base[place].norm() if fresh and place is not None else first.seen.outputs[row].norm()
                ),
                key_norm=float(first.seen.keys[row].norm()),
                key_energy=float(first.update.energies[row] * first.moment_weight),
                fraction_reached=float(first.update.fractions[row]),
                preservation_cost=float(costs[row]) if costs is not None else None,
            )

    def notes(self) -> tuple[str, ...]:
        return self.targets.notes if self.targets else ()


_NOWHERE = KnownTarget(keys={}, values={})


def _costs(solved: Sequence[_SolvedLayer]) -> Tensor | None:
    """Parts of tr(Δ C Δᵀ) by fact, summed over layers, ``[n]`` float64; ``None`` if a left factor is not one column per
    fact."""
    if any(one.update.delta.rank != len(one.residuals) for one in solved):
        return None
    return torch.stack([one.text.cost_parts(one.update.delta).cpu() for one in solved]).sum(0)


def _stored_value(known: KnownTarget, name: str, request: EditRequest) -> Tensor:
    if name not in known.values:
        raise NumericalError(
            f"The stored value of '{request.text}' is for {', '.join(known.values)}, not for {name}: "
            "it was edited with other layers. Edit it anew instead of replaying it."
        )
    return known.values[name]


def _known(row: int, solved: Sequence[_SolvedLayer]) -> KnownTarget:
    return KnownTarget(
        keys={one.name: one.seen.held_keys[row].cpu() for one in solved},
        values={one.name: (one.seen.outputs[row] + one.residuals[row]).cpu() for one in solved},
    )


def _moment_weight(hparams: LocateThenEditHParams, keys: Tensor, text: Metric, ridge: float) -> float:
    """w of C' = wC. ``auto``: the w at which the median key alone reaches the fraction f = q/(q + λw) of its
    residual."""
    if hparams.mom2_update_weight != "auto":
        return hparams.mom2_update_weight
    if ridge == 0:
        return 1.0  # the scale of C cancels
    energies = (keys * text.inverse_times(keys.T).T).sum(1)  # q = kᵀC⁻¹k, [n]
    fraction = hparams.mom2_auto_fraction
    return float(energies.median()) * (1 - fraction) / (fraction * ridge)


@dataclass(frozen=True, slots=True)
class _SolvedLayer:
    """One layer's numbers."""

    name: str
    layer: int
    seen: _Seen
    residuals: Tensor
    update: Update
    priced: Metric
    """C with its weight and ``update_norm_lambda``, without what the batch holds."""
    text: Metric
    """C itself."""
    moment_weight: float
    weight_norm: float

    def diagnostics(self) -> dict[str, float]:
        """Named ``layer_<n>_<what>``."""
        numbers = {
            "condition": self.update.condition,
            "dependent_directions": float(self.update.dependent),
            "moment_condition": self.priced.condition(),
            "moment_jitter": self.priced.jitter,
            "moment_weight": self.moment_weight,
            "relative_change": self.update.delta.norm() / self.weight_norm,
        }
        if self.update.alignments is not None:
            numbers["key_alignment"] = float(self.update.alignments.abs().min())
        return {f"layer_{self.layer}_{key}": value for key, value in numbers.items()}

    def objective(self, batch: EditBatch) -> dict[str, float]:
        """EMMET's objective, term by term: mean squared change over the text, over new and old edits the mean squared
        distance to the value asked for, and over held facts the mean squared change."""
        num_new, delta = batch.num_new, self.update.delta
        keys = self.seen.held_keys
        reached = (keys @ delta.right.T.to(keys)) @ delta.left.T.to(keys)
        missed = (reached - self.residuals).square().sum(1)  # [n]
        numbers = {
            "preservation_distance": self.text.cost(delta),
            "new_edit_distance": float(missed[:num_new].mean()) if num_new else 0.0,
            "old_edit_distance": float(missed[num_new:].mean()) if num_new < len(missed) else 0.0,
        }
        if held := [one.keys[self.name] for one in batch.held if self.name in one.keys]:
            right = torch.stack(held).to(delta.right) @ delta.right.T  # [h, rank]
            numbers["held_change"] = float((right @ delta.left.T.to(right)).square().sum(1).mean())
        return {f"layer_{self.layer}_{key}": value for key, value in numbers.items()}

    def notes(self) -> Iterator[str]:
        """Sentences about a solve that the user should know of."""
        median = float(self.update.fractions.median())
        if median < _LOW_FRACTION:
            yield (
                f"The solve gives the median fact {median:.0%} of its residual: the second moment's weight "
                f"({self.moment_weight:g}) is large for this model's keys. "
                "Lower mom2_update_weight or set it to 'auto'."
            )
        if self.update.dependent:
            yield (
                f"{self.update.dependent} of {len(self.residuals)} keys depend on the others (one subject twice?); "
                "their facts share one value in the least-squares sense."
            )

    def warnings(self, hparams: LocateThenEditHParams) -> Iterator[str]:
        """Signs that the solve is not to be trusted to the last digits."""
        if self.update.condition > hparams.warn_condition:
            yield (
                f"The edit system of layer {self.layer} has the condition number {self.update.condition:.1e} "
                f"(warn_condition is {hparams.warn_condition:.0e}): keys of its {len(self.residuals)} facts are nearly "
                "dependent. A Tikhonov term bounds it, such as tikhonov = 1e-6."
            )
