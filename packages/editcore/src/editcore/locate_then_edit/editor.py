"""The way of every locate-then-edit method: keys, targets, and one solve per layer.

A method is how one layer is solved; everything else is here (:class:`LocateThenEdit`). Several layers share a fact's
residual as MEMIT does (arXiv 2210.07229, section 4.3): each layer takes an equal part of what is left, keys and
residuals are measured anew once the layers below have theirs.

Shapes: ``n`` edits, ``contexts`` templates, ``d_in``, ``d_out`` the widths of the edited projection.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from editcore.interfaces.changes import FactoredDelta, Written
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import NumericalError, RequestError
from editcore.interfaces.protocols import EditContext
from editcore.interfaces.values import EditBatch, EditEvidence, HeldKey, KnownTarget, Proposal
from editcore.locate_then_edit.activations import ActivationReader, KeyWeighting, ResidualKey, kept_keys
from editcore.locate_then_edit.batch_targets import BatchTargets, ResidualKind
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.preparation import Prepared, first_token_metric, prepare
from editcore.locate_then_edit.problem import FactsAtLayer, LayerProblem, held_keys_at, moment_weight
from editcore.locate_then_edit.solved import SolvedGroup, SolvedLayer, joined_evidence, joined_targets
from editcore.models.tokens import lookup_row
from editcore.second_moments.linalg import Metric, Update, hold_at, solve_update

if TYPE_CHECKING:
    from editcore.interfaces.history import LedgerEntry
    from editcore.models import LanguageModel

__all__ = ["LocateThenEdit"]


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
    def residual_key(self) -> ResidualKey:
        """The key that gets the residual: the mean over the contexts, which the solve is given (``mean``), or the bare
        prompt's (``prompt``), to which the solved change is then rescaled
        (:func:`editcore.second_moments.hold_at`; λ must be 0)."""
        return "mean"

    @property
    def residual_kind(self) -> ResidualKind:
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
        clock = _Clock({})
        groups: list[SolvedGroup] = []
        changes: dict[str, FactoredDelta] = {}
        # The lower layers first: what is asked of the upper ones is measured with them in place.
        for group in self._groups(model, batch, context):
            solved = self._solved(model, group, changes, clock, context)
            groups.append(solved)
            changes |= solved.changes
        known: dict[str, KnownTarget] = {}
        evidence: dict[str, EditEvidence] = {}
        for solved in reversed(groups):  # a fact may be in two groups; its bare prompt is in the lower one
            for name, target in solved.known().items():
                known[name] = joined_targets(known.get(name), target)
            for found in solved.evidence():
                evidence[found.request_id] = joined_evidence(evidence.get(found.request_id), found)
        notes = [note for solved in groups for note in solved.notes(self.hparams, self.low_fraction_advice)]
        return Proposal(
            changes=changes,
            evidence=tuple(evidence[request.id] for request in batch.requests),
            known={request.id: known[request.id] for request in batch.requests},
            diagnostics={
                name: value
                for solved in groups
                for name, value in solved.diagnostics(objective=self.hparams.calculate_objective_value).items()
            },
            notes=tuple(dict.fromkeys(notes)),
            seconds=clock.seconds,
        )

    def _groups(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Iterator[_Group]:
        """The facts of a batch by the layers that they are written at, lower layers first.

        A fact that is looked up at the first of all tokens is written twice: its bare prompt at the first-token layers,
        and its prompt behind a context at the usual ones.
        """
        prepared = self.prepared(model, context)
        ids = {request.id for request in batch.requests}
        first = {
            request.id
            for request in batch.requests
            if prepared.first_token and lookup_row(model, request, fact_token=self.hparams.fact_token).lookup == 0
        }
        if first:
            yield _Group(batch.without(ids - first), prepared.first_token, "prompt")
        usual = batch
        if len(prepared.templates) == 1:
            usual = batch.without(first)
        elif first:
            behind = prepared.templates[1]
            requests = [
                request.model_copy(update={"prompt": behind.replace("{}", request.prompt)})
                if request.id in first
                else request
                for request in batch.requests
            ]
            usual = replace(batch, requests=tuple(requests))
        if usual.requests:
            layers = _chosen_layers(self.hparams.layer_selection, prepared.layers, batch, context.seed)
            yield _Group(usual, layers, self.key_weighting)

    def _solved(
        self,
        model: LanguageModel,
        group: _Group,
        below: Mapping[str, FactoredDelta],
        clock: _Clock,
        context: EditContext,
    ) -> SolvedGroup:
        """Solve facts that are written at the same layers, on a model that has the changes ``below`` already."""
        hparams, prepared, batch, layers = self.hparams, self.prepared(model, context), group.batch, group.layers
        with clock.stage("targets"):
            targets = BatchTargets.of(model, batch, layers, hparams, prepared, context)
        weights = torch.tensor(batch.weights, dtype=torch.float64)
        changes = dict(below)
        solved: list[SolvedLayer] = []
        reader = ActivationReader(
            model,
            hparams,
            prepared.templates,
            key_weighting=group.key_weighting,
            residual_key=self.residual_key,
            # Where prefixes can be cached, a block reads nothing of the lower ones but the residual stream.
            resume=len(layers) > 1 and prepared.cache_prefixes.get(layers[-1], False),
        )
        for number, layer in enumerate(layers):
            name = model.layout.weight_name(layer)
            with context.trial(changes):
                with clock.stage("keys"):
                    kept = kept_keys(batch, name, targets.row) if self._keys_stay(model, layer, prepared, below) else {}
                    seen = reader.read(batch, layer, deepest=layers[-1], kept=kept)
                residuals = targets.residuals(
                    model, batch, name=name, seen=seen, share=1 / (len(layers) - number), kind=self.residual_kind
                )
                weight_norm = float(model.weight(name).float().norm())
            with clock.stage("solve"):
                facts = FactsAtLayer(keys=seen.keys, residuals=residuals, weights=weights.to(seen.keys))
                problem = self._problem(model, layer, facts, batch.held, context)
                update = self.solve(problem)
                if self.residual_key == "prompt":
                    update = hold_at(update, seen.keys, seen.residual_keys, problem.metric)
            if not update.delta.is_finite():
                raise NumericalError(f"The update of {name} holds NaN or Inf; nothing was applied.")
            changes[name] = update.delta
            solved.append(SolvedLayer(problem, seen, update, weight_norm))
        return SolvedGroup(batch, targets, solved)

    def _metric(self, model: LanguageModel, layer: int, context: EditContext) -> Metric:
        """What a change of a layer is priced by; at a first-token layer it is computed when a fact first needs it."""
        prepared = self.prepared(model, context)
        if layer not in prepared.metrics:
            prepared.metrics[layer] = first_token_metric(model, layer, self.hparams, context)
        return prepared.metrics[layer]

    def _keys_stay(
        self, model: LanguageModel, layer: int, prepared: Prepared, below: Mapping[str, FactoredDelta]
    ) -> bool:
        """Whether the ledger's keys of earlier facts at ``layer`` are what a forward pass would give.

        Keys depend on the weights below alone. With ``residual_key = "prompt"`` the ledger has other keys than those
        that the solve is given.
        """
        if self.residual_key == "prompt":
            return False
        if layer in prepared.first_token:
            return layer == prepared.first_token[0]
        lower = {model.layout.weight_name(number) for number in prepared.first_token}
        return layer == min(prepared.layers) and lower.isdisjoint(self._written | below.keys())

    def resolve(
        self, model: LanguageModel, entry: LedgerEntry, rows: Sequence[int], context: EditContext
    ) -> Written | None:
        """Solve some requests of a batch again, from their stored keys and residuals; see :class:`editcore.Resolves`.

        Of Δ = R (KᵀC'⁻¹K + Λ)⁻¹KᵀC'⁻¹ the ledger has K and, as the left factor, R. Fewer columns of both give what
        :meth:`propose` would have given for those requests at the time, without running the model. The solve must be of
        this form (:attr:`right_from_keys`), and its residuals must be those of the keys that it is given.

        Returns:
            ``None`` where keys of upper layers depend on what lower ones got: for facts of several layers, and where a
            fact is left out that was written below others.
        """
        if not self.right_from_keys or self.residual_key == "prompt":
            return None
        ids, wanted = [request.id for request in entry.requests], set(rows)
        if any(name not in entry.known or len(entry.known[name].keys) != 1 for name in ids):
            return None
        depths = [max(map(model.layout.layer_of, entry.known[name].keys)) for name in ids]
        if any(depth < max(depths) for row, depth in enumerate(depths) if row not in wanted):
            return None
        changes: dict[str, FactoredDelta] = {}
        for weight, change in entry.changes.items():
            members = [row for row, name in enumerate(ids) if weight in entry.known[name].keys]
            if not isinstance(change, FactoredDelta) or change.rank != len(members):
                return None
            columns = [column for column, row in enumerate(members) if row in wanted]
            if not columns:
                continue
            layer = model.layout.layer_of(weight)
            place, chosen = model.place(layer), [members[column] for column in columns]
            facts = FactsAtLayer(
                keys=torch.stack([entry.known[ids[row]].keys[weight] for row in chosen]).to(place),
                residuals=change.left.T[columns].to(place),
                weights=torch.tensor([entry.weights[row] for row in chosen], dtype=torch.float64, device=place),
            )
            right = self.solve(self._problem(model, layer, facts, entry.held, context)).delta.right
            changes[weight] = FactoredDelta(change.left[:, columns].to(right), right)
        return Written(changes=changes)

    def _problem(
        self,
        model: LanguageModel,
        layer: int,
        facts: FactsAtLayer,
        held: Sequence[HeldKey],
        context: EditContext,
    ) -> LayerProblem:
        text, name = self._metric(model, layer, context), model.layout.weight_name(layer)
        weight = moment_weight(self.hparams, facts.keys, text, self.ridge)
        priced = text.scaled(weight=weight, ridge=self.hparams.update_norm_lambda)
        held_keys, held_weights = held_keys_at(held, name, text.width)
        return LayerProblem(
            layer=layer,
            name=name,
            keys=facts.keys,
            residuals=facts.residuals,
            weights=facts.weights,
            text=text,
            moment_weight=weight,
            priced=priced,
            # w·(C + Σ μ kkᵀ) + …: the objective gets w Σ μ ‖Δk‖² over the held facts beside w times its mean over text.
            metric=priced.plus(held_keys, weight * held_weights) if len(held_keys) else priced,
            held_keys=held_keys,
            held_weights=held_weights,
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """Facts of a batch that are written at the same layers."""

    batch: EditBatch
    layers: tuple[int, ...]
    key_weighting: KeyWeighting


def _chosen_layers(selection: str, layers: tuple[int, ...], batch: EditBatch, seed: int) -> tuple[int, ...]:
    if selection != "random":
        return layers
    # A string seed, because it is hashed with sha512: nearby batches draw independently.
    return (random.Random(f"layer:{seed}:{batch.index}").choice(layers),)
