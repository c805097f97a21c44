"""The way of every locate-then-edit method: keys, targets, and one solve per layer.

A method is how one layer is solved; everything else is here (:class:`LocateThenEdit`). Several layers share a fact's
residual as MEMIT does (arXiv 2210.07229, section 4.3): each layer takes an equal part of what is left, keys and
residuals are measured anew once the layers below have theirs.

Shapes: ``n`` edits, ``contexts`` templates, ``d_in``, ``d_out`` the widths of the edited projection.
"""

from __future__ import annotations

import random
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from editcore.interfaces.changes import FactoredDelta, Written
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError, NumericalError, RequestError
from editcore.interfaces.protocols import EditContext
from editcore.interfaces.values import (
    EditBatch,
    EditEvidence,
    EditRequest,
    HeldKey,
    KnownTarget,
    Proposal,
)
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.located import traced_layer
from editcore.locate_then_edit.targets import Targets, optimise_targets, tails_fit
from editcore.locate_then_edit.templates import sample_context_templates
from editcore.models.capture import Climb, capture, project
from editcore.models.tokens import TokenRow, lookup_row
from editcore.second_moments.linalg import Metric, Update, hold_at, solve_update

if TYPE_CHECKING:
    from editcore.interfaces.history import LedgerEntry
    from editcore.models import LanguageModel

__all__ = ["LayerProblem", "LocateThenEdit", "LocateThenEditHParams", "Prepared"]

HeldAt = Literal["keys", "bare"]
Asks = Literal["shift", "value"]
KeyWeighting = Literal["grouped", "mean", "prompt"]

_LOW_FRACTION = 0.5
"""Below this median fraction of the residual, a batch is unlikely to say what it was told; the user is warned."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProblem:
    """What one layer is asked to solve. All tensors are float64, on the device of the layer."""

    layer: int
    """Number of the block."""
    name: str
    """Address of the weight, for error messages and for :meth:`StatisticsStore.derived`."""
    keys: Tensor
    """K, a row per fact, ``[n, d_in]``."""
    residuals: Tensor
    """R, what each fact asks for on top of what its key gives now, ``[n, d_out]``."""
    weights: Tensor
    """Weight of each fact, ``[n]``."""
    text: Metric
    """C, the second moment of the unedited model's keys."""
    moment_weight: float
    """w, ``mom2_update_weight`` as a number."""
    priced: Metric
    """w·C + ``update_norm_lambda``·I."""
    metric: Metric
    """C', what a change is priced by: ``priced`` and w Σ μ kkᵀ over the held keys."""
    held_keys: Tensor
    """Keys of earlier facts that the change shall leave alone, ``[h, d_in]``."""
    held_weights: Tensor
    """μ of each of them, ``[h]``."""


@documented
@dataclass(frozen=True, slots=True)
class Prepared:
    """What was learnt from the unedited model."""

    templates: tuple[str, ...]
    """Contexts of the keys; ``{}`` stands for the prompt."""
    metrics: dict[int, Metric]
    """By layer, the second moment C of the unedited model's keys; of ``first_token`` once a fact needs it."""
    layers: tuple[int, ...]
    """Those that may be edited; ``layer_selection`` says how many of them a batch takes."""
    first_token: tuple[int, ...] = ()
    """Those for facts that are looked up at the first of all tokens; empty where they are treated like all others."""
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
    first_token = hparams.first_token_layers or ()
    for layer in (*hparams.layers, *first_token):
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
    if hparams.clamp_norm == "stream" and model.layout.norm_placement == "post":
        raise HParamsError(
            f'{owner}: clamp_norm is "stream", but in {model.name} a norm follows the edited projection, so a value is '
            'not added to the stream as it is. Set clamp_norm to "output".'
        )
    layers = hparams.layers
    if hparams.layer_selection == "traced":
        layers = (traced_layer(model, layers, owner=owner),)
    templates = hparams.context_templates
    if templates is None:
        templates = sample_context_templates(
            model, seed=context.seed, count=hparams.context_count, length=hparams.context_length
        )
    if first_token and min(layers) <= max(first_token):
        first_token = ()
    return Prepared(templates, _metrics(model, layers, hparams, context), layers, first_token)


def _metrics(
    model: LanguageModel, layers: Sequence[int], hparams: LocateThenEditHParams, context: EditContext
) -> dict[int, Metric]:
    if hparams.mom2_adjustment:
        return context.statistics.metrics(layers)
    # C = I, where the text is not to be asked.
    return {layer: Metric.identity(model.layout.d_ff, device=model.place(layer)) for layer in layers}


def _first_token_metric(
    model: LanguageModel, layer: int, hparams: LocateThenEditHParams, context: EditContext
) -> Metric:
    """What a change costs where facts are looked up at the first token: half on text, half on texts' first tokens.

    In a text one token in a thousand is the first, and all of those have a part in common that no other has. By C alone
    that part is nearly free, and an edit that uses it hits every text.
    """
    text = _metrics(model, [layer], hparams, context)[layer]
    if not hparams.mom2_adjustment:
        return text
    special = set(model.tokenizer.all_special_ids)
    ids = [one for one in range(min(len(model.tokenizer), model.layout.vocab_size)) if one not in special]
    opening = [TokenRow((one,), 0, 1) for one in ids[:: 1 + (len(ids) - 1) // _FIRST_TOKENS]]

    def moment(text: Metric) -> dict[str, Tensor]:
        total = torch.zeros_like(text.matrix)
        for start in range(0, len(opening), _TOGETHER):
            keys = capture(model, opening[start : start + _TOGETHER], [layer])[layer].inputs.double()
            total += keys.T @ keys
        return {"moment": total / len(opening)}

    # Kept beside C: a run that is resumed has the bits of the unedited model.
    [first] = context.statistics.derived(layer, f"first-token-moment-{_FIRST_TOKENS}", moment).values()
    return Metric((text.matrix + first) / 2)


_TOGETHER = 2048
"""Of them at a time."""
_FIRST_TOKENS = 8192
"""Tokens of the vocabulary, evenly over it, that are asked for what they give as a text's first."""


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


@documented
class LocateThenEdit:
    """An editor of this kind. A method gives its :attr:`name` and what differs of the properties and :meth:`solve`.

    Without a change it is the shared solve of :func:`editcore.second_moments.solve_update` with :attr:`ridge`.
    """

    name: ClassVar[str]
    """As it is announced; error messages begin with it."""
    right_from_keys: ClassVar[bool] = False
    """True if the solve's left factor has one column per request, and its right factor depends on keys and weights
    alone. A batch without some of its facts is then solved from the ledger (:meth:`resolve`)."""

    def __init__(self, hparams: LocateThenEditHParams) -> None:
        self.hparams = hparams
        self._prepared: Prepared | None = None
        self._written: frozenset[str] = frozenset()
        """Names of the weights that this run's active edits change."""

    # What methods may change

    def solve(self, problem: LayerProblem) -> Update:
        """The change of one layer: the method itself."""
        return solve_update(
            problem.keys,
            problem.residuals,
            problem.metric,
            ridge=self.ridge,
            tikhonov=self.hparams.tikhonov,
            weights=problem.weights,
        )

    @property
    def ridge(self) -> float:
        """λ of the solve, which turns ``mom2_update_weight = "auto"`` into a number; 0 makes every fact a
        constraint."""
        return 0.0

    @property
    def key_weighting(self) -> KeyWeighting:
        """How keys of the contexts are averaged."""
        return self.hparams.key_weighting

    @property
    def held_at(self) -> HeldAt:
        """The key that gets the residual: the one the solve is given (the mean over the contexts), or the bare
        prompt's, to which the solved change is then rescaled (:func:`editcore.second_moments.hold_at`; λ must be 0)."""
        return "keys"

    @property
    def asks(self) -> Asks:
        """What a new fact asks for: δ more than its key gives now (``shift``), or the bare prompt's value h₀ + δ
        (``value``). The two differ by W(k_bare − k) where the key is a mean over contexts."""
        return "shift"

    @property
    def low_fraction_advice(self) -> str:
        """What to do when the solve gives the median fact little of its residual; empty where nothing can be set."""
        return "Lower mom2_update_weight or set it to 'auto'."

    # The way that all of them share

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Check the layers, fetch second moments and fix the context templates, of the unedited model.

        Raises:
            HParamsError: a layer does not exist, the settings do not fit the model, or a tracing of it is asked for and
                is not there.
        """
        self._prepared = prepare(model, self.hparams, context, owner=self.name)
        return self._prepared.provenance()

    def prepared(self, model: LanguageModel, context: EditContext) -> Prepared:
        """What :meth:`prepare` learnt; of a model that it was not shown, it is learnt now."""
        if self._prepared is None:
            self.prepare(model, context)
        assert self._prepared is not None
        return self._prepared

    def recall(self, history: Sequence[LedgerEntry]) -> None:
        """See :class:`editcore.Remembers`: which weights have been written."""
        self._written = frozenset(name for entry in history for name in entry.changes)

    def absorb(self, entry: LedgerEntry) -> None:
        """The same for a batch that was written after those."""
        self._written |= entry.changes.keys()

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Solve one batch, layer by layer; the model is back to the bit when this returns or raises.

        Raises:
            RequestError: the batch is empty.
            SubjectNotFoundError: a subject is not found in its tokens.
            NumericalError: a value is not finite.
        """
        if not batch.requests:
            raise RequestError("There is nothing to edit: the batch is empty.")
        prepared, clock = self.prepared(model, context), _Clock({})
        groups: list[_Group] = []
        changes: dict[str, FactoredDelta] = {}
        # The lower layers first: what is asked of the upper ones is measured with them in place.
        for layers, part, key_weighting in self._groups(model, batch, prepared, context):
            group = self._solved(model, part, layers, key_weighting, changes, clock, context)
            groups.append(group)
            changes |= group.changes
        known: dict[str, KnownTarget] = {}
        evidence: dict[str, EditEvidence] = {}
        for group in reversed(groups):  # of a fact that is in two, what is said of its bare prompt comes last
            known |= {name: _both(known.get(name), one) for name, one in group.known().items()}
            found = group.asked.evidence(group.batch, group.solved)
            evidence |= {one.request_id: _told(evidence.get(one.request_id), one) for one in found}
        notes = [note for group in groups for note in group.notes(self.hparams, self.low_fraction_advice)]
        return Proposal(
            changes=changes,
            evidence=tuple(evidence[request.id] for request in batch.requests),
            known={request.id: known[request.id] for request in batch.requests},
            diagnostics={
                name: value
                for group in groups
                for name, value in group.diagnostics(objective=self.hparams.calculate_objective_value).items()
            },
            notes=tuple(dict.fromkeys(notes)),
            seconds=clock.seconds,
        )

    def _groups(
        self, model: LanguageModel, batch: EditBatch, prepared: Prepared, context: EditContext
    ) -> Iterator[tuple[tuple[int, ...], EditBatch, KeyWeighting]]:
        """Layers, the facts that are written there, and in which contexts their keys are."""
        ids = {request.id for request in batch.requests}
        first = {
            request.id
            for request in batch.requests
            if prepared.first_token and lookup_row(model, request, fact_token=self.hparams.fact_token).lookup == 0
        }
        if first:
            yield prepared.first_token, batch.without(ids - first), "prompt"
        rest = batch
        if len(prepared.templates) == 1:
            rest = batch.without(first)
        elif first:  # what is the bare prompt of the others stands behind a context for these
            behind = prepared.templates[1]
            requests = [
                one.model_copy(update={"prompt": behind.replace("{}", one.prompt)}) if one.id in first else one
                for one in batch.requests
            ]
            rest = replace(batch, requests=tuple(requests))
        if rest.requests:
            layers = _chosen_layers(self.hparams.layer_selection, prepared.layers, batch, context.seed)
            yield layers, rest, self.key_weighting

    def _solved(
        self,
        model: LanguageModel,
        batch: EditBatch,
        layers: Sequence[int],
        key_weighting: KeyWeighting,
        below: Mapping[str, FactoredDelta],
        clock: _Clock,
        context: EditContext,
    ) -> _Group:
        """Facts that are written at the same layers, on a model that has the changes ``below`` already."""
        hparams, prepared = self.hparams, self.prepared(model, context)
        with clock.stage("targets"):
            asked = _Asked.optimise(model, batch, layers, hparams, prepared, context)
        weights = torch.tensor(batch.weights, dtype=torch.float64)
        changes = dict(below)
        solved: list[_SolvedLayer] = []
        # Where prefix caches fit, no block reads more of the lower ones than the residual stream.
        keep = len(layers) > 1 and prepared.shortcuts.get(layers[-1], False)
        looking = _Looking(
            model, hparams, prepared.templates, key_weighting=key_weighting, held_at=self.held_at, keep=keep
        )
        for number, layer in enumerate(layers):
            name = model.layout.weight_name(layer)
            with context.trial(changes):
                with clock.stage("keys"):
                    stay = self._keys_stay(model, layer, prepared, below)
                    kept = _kept_keys(batch, name, asked.row) if stay else {}
                    seen = _see(looking, batch, layer, layers[-1], kept=kept)
                share = 1 / (len(layers) - number)
                residuals = asked.residuals(batch, name, seen, share=share, asks=self.asks, model=model)
                weight_norm = float(model.weight(name).float().norm())
            with clock.stage("solve"):
                text = self._metric(model, layer, context)
                problem = self._problem(layer, name, seen.keys, residuals, weights, text, batch.held)
                update = self.solve(problem)
                if self.held_at == "bare":
                    update = hold_at(update, seen.keys, seen.held_keys, problem.metric)
            if not update.delta.is_finite():
                raise NumericalError(f"The update of {name} holds NaN or Inf; nothing was applied.")
            changes[name] = update.delta
            solved.append(_SolvedLayer(problem, seen, update, weight_norm))
        return _Group(batch, asked, solved)

    def _metric(self, model: LanguageModel, layer: int, context: EditContext) -> Metric:
        """What a change of a layer is priced by; at a first-token layer it is computed when a fact first needs it."""
        prepared = self.prepared(model, context)
        if layer not in prepared.metrics:
            prepared.metrics[layer] = _first_token_metric(model, layer, self.hparams, context)
        return prepared.metrics[layer]

    def _keys_stay(
        self, model: LanguageModel, layer: int, prepared: Prepared, below: Mapping[str, FactoredDelta]
    ) -> bool:
        """Whether what the ledger has of earlier keys at ``layer`` is what a forward pass would give: keys depend on
        the weights below alone. Bare keys that hold a value are kept in place of those that the solve is given."""
        if self.held_at != "keys":
            return False
        if layer in prepared.first_token:
            return layer == prepared.first_token[0]
        lower = {model.layout.weight_name(one) for one in prepared.first_token}
        return layer == min(prepared.layers) and lower.isdisjoint(self._written | below.keys())

    def resolve(
        self, model: LanguageModel, entry: LedgerEntry, rows: Sequence[int], context: EditContext
    ) -> Written | None:
        """Solve some requests of a batch again, from their stored keys and residuals; see :class:`editcore.Resolves`.

        Of Δ = R (KᵀC'⁻¹K + Λ)⁻¹KᵀC'⁻¹ the ledger has K and, as the left factor, R. Fewer columns of both give what
        :meth:`propose` would have given for those requests at the time, without running the model. The solve must be of
        this form (:attr:`right_from_keys`), and must hold its residuals at the keys that it is given.

        Returns:
            ``None`` where keys of upper layers depend on what lower ones got: for facts of several layers, and where a
            fact is left out that was written below others.
        """
        if not self.right_from_keys or self.held_at != "keys":
            return None
        ids = [request.id for request in entry.requests]
        if any(one not in entry.known or len(entry.known[one].keys) != 1 for one in ids):
            return None
        depth = [max(model.layout.layer_of(name) for name in entry.known[one].keys) for one in ids]
        if any(one < max(depth) for row, one in enumerate(depth) if row not in set(rows)):
            return None
        changes: dict[str, FactoredDelta] = {}
        for name, change in entry.changes.items():
            members = [row for row, one in enumerate(ids) if name in entry.known[one].keys]
            if not isinstance(change, FactoredDelta) or change.rank != len(members):
                return None
            columns = [column for column, row in enumerate(members) if row in set(rows)]
            if not columns:
                continue
            layer = model.layout.layer_of(name)
            place, text = model.place(layer), self._metric(model, layer, context)
            chosen = [members[column] for column in columns]
            keys = torch.stack([entry.known[ids[row]].keys[name] for row in chosen]).to(place)  # [n, d_in]
            residuals = change.left.T[columns].to(place)  # [n, d_out]
            weights = torch.tensor([entry.weights[row] for row in chosen], dtype=torch.float64, device=place)
            right = self.solve(self._problem(layer, name, keys, residuals, weights, text, entry.held)).delta.right
            changes[name] = FactoredDelta(change.left[:, columns].to(right), right)
        return Written(changes=changes)

    def _problem(
        self,
        layer: int,
        name: str,
        keys: Tensor,
        residuals: Tensor,
        weights: Tensor,
        text: Metric,
        held: Sequence[HeldKey],
    ) -> LayerProblem:
        weight = _moment_weight(self.hparams, keys, text, self.ridge)
        priced = text.scaled(weight=weight, ridge=self.hparams.update_norm_lambda)
        held_keys, held_weights = _held(held, name, text.width)
        return LayerProblem(
            layer=layer,
            name=name,
            keys=keys,
            residuals=residuals,
            weights=weights.to(keys),
            text=text,
            moment_weight=weight,
            priced=priced,
            # w·(C + Σ μ kkᵀ) + …: the objective gets w Σ μ ‖Δk‖² over the held facts beside w times its mean over text.
            metric=priced.plus(held_keys, weight * held_weights) if len(held_keys) else priced,
            held_keys=held_keys,
            held_weights=held_weights,
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
    outputs = project(model, name, keys)
    # A known fact asks for a value, not for what the layers below left of δ: its stream is not looked at.
    parts.append(_Seen(keys, keys, outputs, outputs, torch.zeros_like(outputs)))
    return _Seen.join(parts, torch.tensor([*looked, *kept]).argsort())


def _held(held: Sequence[HeldKey], name: str, width: int) -> tuple[Tensor, Tensor]:
    """Keys ``[h, width]`` and weights ``[h]`` of the held facts that have a key at this weight. One that has none was
    written elsewhere, and this weight's change does not move it here.

    Raises:
        NumericalError: a key does not fit the weight.
    """
    here = [one for one in held if name in one.keys and one.weight > 0]
    for one in here:
        if one.keys[name].shape != (width,):
            raise NumericalError(
                f"The stored key of '{one.request_id}' (batch {one.batch}) has the shape "
                f"{list(one.keys[name].shape)}, but {name} takes {width} numbers: it comes from another model."
            )
    weights = torch.tensor([one.weight for one in here], dtype=torch.float64)
    if not here:
        return torch.empty(0, width, dtype=torch.float64), weights
    return torch.stack([one.keys[name].double() for one in here]), weights


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
        key_weighting: KeyWeighting,
        held_at: HeldAt,
        keep: bool,
    ) -> None:
        """``keep``: whether the next layer may begin where the last one ended."""
        self.model, self.hparams, self.held_at = model, hparams, held_at
        self.key_weighting: KeyWeighting = key_weighting
        self.templates = templates[:1] if key_weighting == "prompt" else templates
        self.climb = Climb(model, keep_bytes=_KEPT_BYTES if keep else 0)

    def at(self, requests: Mapping[int, EditRequest], layer: int, deepest: int) -> _Seen:
        """Some facts, by their row in the batch."""
        bare = self.climb.capture(self._rows(requests, range(1)), sorted({layer, deepest}))
        seen = [bare[layer]]
        if len(self.templates) > 1:  # of which only the bare prompts go on to the deepest layer
            contexts = self._rows(requests, range(1, len(self.templates)))
            seen.append(self.climb.capture(contexts, [layer])[layer])
        shares = context_weights(len(self.templates), self.key_weighting).to(self.model.place(layer))

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


def context_weights(count: int, weighting: KeyWeighting) -> Tensor:
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
        asks: Asks,
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
        costs = _costs(solved)
        for row, request in enumerate(batch.requests):
            figures = {
                **(self._found(row, request, batch) or self._stored(row, first)),
                "key_norm": float(first.seen.keys[row].norm()),
                "key_energy": float(first.update.energies[row] * first.problem.moment_weight),
                "fraction_reached": float(first.update.fractions[row]),
            }
            if costs is not None:
                figures["preservation_cost"] = float(costs[row])
            yield EditEvidence(request_id=request.id, replayed=row >= batch.num_new, figures=figures)

    def known(self, row: int, request: EditRequest, batch: EditBatch, solved: Sequence[_SolvedLayer]) -> KnownTarget:
        """Key and value that a fact was solved with, and how its target was found."""
        return KnownTarget(
            keys={one.problem.name: one.seen.held_keys[row].cpu() for one in solved},
            values={one.problem.name: (one.seen.outputs[row] + one.problem.residuals[row]).cpu() for one in solved},
            figures=self._found(row, request, batch),
        )

    def _found(self, row: int, request: EditRequest, batch: EditBatch) -> Mapping[str, float]:
        """How the target of a fact was found; empty if it was known without that.

        ``steps`` of the optimiser, ``target_loss`` and ``target_probability`` at its end (the mean over contexts of the
        probability per token), ``delta_norm`` ‖δ‖ and ``value_norm`` ‖h₀‖.
        """
        place = self.row.get(request.id)
        if place is None or self.targets is None:
            return batch.known[request.id].figures if row < batch.num_new else {}
        return {
            "steps": float(self.targets.steps[place]),
            "target_loss": self.targets.losses[place],
            "target_probability": self.targets.probabilities[place],
            "delta_norm": float(self.targets.deltas[place].norm()),
            "value_norm": float(self.targets.base[place].norm()),
        }

    def _stored(self, row: int, first: _SolvedLayer) -> Mapping[str, float]:
        """What a fact with a stored value asked of the first layer."""
        return {
            "delta_norm": float(first.problem.residuals.norm(dim=1)[row]),
            "value_norm": float(first.seen.outputs[row].norm()),
        }

    def notes(self) -> tuple[str, ...]:
        return self.targets.notes if self.targets else ()


_NOWHERE = KnownTarget(keys={}, values={})


def _costs(solved: Sequence[_SolvedLayer]) -> Tensor | None:
    """Parts of tr(Δ C Δᵀ) by fact, summed over layers, ``[n]`` float64; ``None`` if a left factor is not one column per
    fact."""
    if any(one.update.delta.rank != len(one.problem.keys) for one in solved):
        return None
    return torch.stack([one.problem.text.cost_parts(one.update.delta).cpu() for one in solved]).sum(0)


def _stored_value(known: KnownTarget, name: str, request: EditRequest) -> Tensor:
    if name not in known.values:
        raise NumericalError(
            f"The stored value of '{request.text}' is for {', '.join(known.values)}, not for {name}: "
            "it was edited with other layers. Edit it anew instead of replaying it."
        )
    return known.values[name]


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

    problem: LayerProblem
    seen: _Seen
    update: Update
    weight_norm: float
    """‖W‖ before the update (Frobenius)."""

    def diagnostics(self) -> dict[str, float]:
        """Named ``layer_<n>_<what>``."""
        numbers = {
            "condition": self.update.condition,
            "dependent_directions": float(self.update.dependent),
            "moment_condition": self.problem.priced.condition(),
            "moment_jitter": self.problem.priced.jitter,
            "moment_weight": self.problem.moment_weight,
            "relative_change": self.update.delta.norm() / self.weight_norm,
        }
        if self.update.alignments is not None:
            numbers["key_alignment"] = float(self.update.alignments.abs().min())
        return {f"layer_{self.problem.layer}_{key}": value for key, value in numbers.items()}

    def objective(self, batch: EditBatch) -> dict[str, float]:
        """EMMET's objective, term by term: mean squared change over the text, over new and old edits the mean squared
        distance to the value asked for, and over held facts the mean squared change."""
        num_new, delta = batch.num_new, self.update.delta
        keys = self.seen.held_keys
        reached = (keys @ delta.right.T.to(keys)) @ delta.left.T.to(keys)
        missed = (reached - self.problem.residuals).square().sum(1)  # [n]
        numbers = {
            "preservation_distance": self.problem.text.cost(delta),
            "new_edit_distance": float(missed[:num_new].mean()) if num_new else 0.0,
            "old_edit_distance": float(missed[num_new:].mean()) if num_new < len(missed) else 0.0,
        }
        if held := [one.keys[self.problem.name] for one in batch.held if self.problem.name in one.keys]:
            right = torch.stack(held).to(delta.right) @ delta.right.T  # [h, rank]
            numbers["held_change"] = float((right @ delta.left.T.to(right)).square().sum(1).mean())
        return {f"layer_{self.problem.layer}_{key}": value for key, value in numbers.items()}

    def notes(self, low_fraction_advice: str) -> Iterator[str]:
        """Sentences about a solve that the user should know of."""
        median = float(self.update.fractions.median())
        if median < _LOW_FRACTION:
            yield (
                f"The solve gives the median fact {median:.0%} of its residual: the second moment's weight "
                f"({self.problem.moment_weight:g}) is large for this model's keys. {low_fraction_advice}".rstrip()
            )
        if self.update.dependent:
            yield (
                f"{self.update.dependent} of {len(self.problem.keys)} keys depend on the others (one subject twice?); "
                "their facts share one value in the least-squares sense."
            )

    def warnings(self, hparams: LocateThenEditHParams) -> Iterator[str]:
        """Signs that the solve is not to be trusted to the last digits."""
        if self.update.condition > hparams.warn_condition:
            yield (
                f"The edit system of layer {self.problem.layer} has the condition number {self.update.condition:.1e} "
                f"(warn_condition is {hparams.warn_condition:.0e}): keys of its {len(self.problem.keys)} facts are "
                "nearly dependent. A Tikhonov term bounds it, such as tikhonov = 1e-6."
            )


def _both(one: KnownTarget | None, other: KnownTarget) -> KnownTarget:
    """Keys and values of a fact that is written at two places; how its target was found, of the other."""
    if one is None:
        return other
    return KnownTarget(
        keys={**other.keys, **one.keys}, values={**other.values, **one.values}, figures=other.figures or one.figures
    )


def _told(one: EditEvidence | None, other: EditEvidence) -> EditEvidence:
    """Figures of such a fact: the other's; what it costs at both places, and the lesser part that it got."""
    if one is None:
        return other
    figures = {**one.figures, **other.figures}
    for name, together in (("preservation_cost", sum), ("fraction_reached", min)):
        if name in one.figures and name in other.figures:
            figures[name] = together((one.figures[name], other.figures[name]))
    return replace(other, figures=figures)


@dataclass(frozen=True, slots=True)
class _Group:
    """Facts of a batch that were written at the same layers."""

    batch: EditBatch
    asked: _Asked
    solved: Sequence[_SolvedLayer]

    @property
    def changes(self) -> dict[str, FactoredDelta]:
        return {one.problem.name: one.update.delta for one in self.solved}

    def known(self) -> dict[str, KnownTarget]:
        """By request id, the key and the value that a fact was solved with, and how its target was found."""
        return {
            request.id: self.asked.known(row, request, self.batch, self.solved)
            for row, request in enumerate(self.batch.requests)
        }

    def diagnostics(self, *, objective: bool) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for one in self.solved:
            numbers |= one.diagnostics()
            if objective:
                numbers |= one.objective(self.batch)
        return numbers

    def notes(self, hparams: LocateThenEditHParams, low_fraction_advice: str) -> Iterator[str]:
        yield from self.asked.notes()
        yield from self.solved[0].notes(low_fraction_advice)
        for one in self.solved:
            yield from one.warnings(hparams)
