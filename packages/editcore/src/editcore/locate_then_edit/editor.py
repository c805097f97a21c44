"""The steps of every locate-then-edit method: keys, targets, and one solve per layer.

A method defines how one layer is solved; everything else is here (:class:`LocateThenEdit`). Several layers share a
fact's residual as in MEMIT (arXiv 2210.07229, section 4.3). Each layer takes an equal part of the residual that is
left. Keys and residuals are measured anew once the layers below have their changes.

Shapes: ``n`` edits, ``contexts`` templates, ``d_in``, ``d_out`` the widths of the edited projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from editcore._util.stopwatch import Stages
from editcore.interfaces.changes import FactoredDelta, Written
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import NumericalError, RequestError
from editcore.interfaces.protocols import EditContext
from editcore.interfaces.values import EditBatch, HeldKey, Proposal
from editcore.locate_then_edit.activations import ActivationReader, KeyWeighting, ResidualKey, kept_keys
from editcore.locate_then_edit.batch_targets import BatchTargets, ResidualKind
from editcore.locate_then_edit.groups import Group, groups_of
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.key_memory import KeyMemory
from editcore.locate_then_edit.preparation import Prepared, first_token_metric, prepare
from editcore.locate_then_edit.problem import (
    FactsAtLayer,
    LayerProblem,
    held_keys_at,
    moment_weight,
    moment_weight_name,
)
from editcore.locate_then_edit.rounds import unsaid_rows
from editcore.locate_then_edit.shared_keys import facts_by_key, requests_by_value, rows_with_a_subject_in_common
from editcore.locate_then_edit.solved import SolvedBatch, SolvedGroup, SolvedLayer
from editcore.locate_then_edit.windows import Windows
from editcore.second_moments.accumulator import Accumulator
from editcore.second_moments.linalg import Metric, Update, hold_at, solve_update

if TYPE_CHECKING:
    from editcore.interfaces.history import LedgerEntry
    from editcore.models import LanguageModel

__all__ = ["LocateThenEdit"]


@documented
class LocateThenEdit:
    """A locate-then-edit editor. A method sets its :attr:`name` and overrides :meth:`solve` or the properties where it
    differs.

    By default :meth:`solve` is :func:`editcore.second_moments.solve_update` with :attr:`ridge`.
    """

    name: ClassVar[str]
    """The name under which it is announced; error messages begin with it."""
    right_from_keys: ClassVar[bool] = False
    """True if the left factor of the solve has one column per request and the right factor depends only on keys and
    weights. A batch can then be solved from the ledger without some of its facts (:meth:`resolve`)."""

    def __init__(self, hparams: LocateThenEditHParams) -> None:
        self.hparams = hparams
        self._prepared: Prepared | None = None
        self._written: frozenset[str] = frozenset()
        """Names of the weights that this run's active edits change."""
        # The solve's facts have weight 1/λ beside the price; with λ = 0 no finite weight is like theirs.
        self._memory = KeyMemory(weight=1 / (self.ridge or 1.0)) if hparams.memory == "keys" else None

    # A method may override these.

    def solve(self, problem: LayerProblem) -> Update:
        """The change of one layer. This is where methods differ."""
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
        """λ of the solve; 0 makes every fact a constraint. ``mom2_update_weight = "auto"`` depends on it, too."""
        return 0.0

    @property
    def prior_weight(self) -> float | Literal["auto"]:
        """w of the prior w·C; ``auto``: found from the keys of the first batch, or of every batch without a memory."""
        return self.hparams.mom2_update_weight

    def prior(self, model: LanguageModel, layer: int, context: EditContext) -> Metric:
        """What the prior weighs with w: the second moment C of the layer's keys."""
        return self.moment(model, layer, context)

    @property
    def key_weighting(self) -> KeyWeighting:
        """How keys of the contexts are averaged."""
        return self.hparams.key_weighting

    @property
    def residual_key(self) -> ResidualKey:
        """The key to which the solve gives the residual. ``mean``: the mean key over the contexts, which the solve is
        given. ``prompt``: the bare prompt's key; the solved change is then rescaled for it
        (:func:`editcore.second_moments.hold_at`; λ must be 0)."""
        return "mean"

    @property
    def residual_kind(self) -> ResidualKind:
        """What a new fact asks for. ``shift``: δ on top of the present output for its key. ``value``: the bare prompt's
        value h₀ + δ. The two differ by W(k_bare − k) if the key is a mean over contexts."""
        return "shift"

    @property
    def low_fraction_advice(self) -> str:
        """Advice for the user if the median fact gets only a small part of its residual; empty if no setting helps."""
        return "Lower mom2_update_weight or set it to 'auto'."

    # All methods share these.

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Check the layers, fetch second moments and fix the context templates. The model must be unedited.

        Raises:
            HParamsError: a layer does not exist, the settings do not fit the model, or they ask for a tracing of the
                model and there is none.
        """
        self._prepared = prepare(model, self.hparams, context, owner=self.name)
        return self._prepared.provenance()

    def prepared(self, model: LanguageModel, context: EditContext) -> Prepared:
        """What :meth:`prepare` learnt. If it has not been called, it is called now."""
        if self._prepared is None:
            self.prepare(model, context)
        assert self._prepared is not None
        return self._prepared

    def recall(self, history: Sequence[LedgerEntry]) -> None:
        """See :class:`editcore.Remembers`: which weights have been written, and at which keys."""
        self._written = frozenset(name for entry in history for name in entry.changes)
        if self._memory is not None:
            self._memory.recall(history)

    def absorb(self, entry: LedgerEntry) -> None:
        """See :class:`editcore.Remembers`: one more batch has been written."""
        self._written |= entry.changes.keys()
        if self._memory is not None:
            self._memory.absorb(entry)

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Solve one batch, layer by layer. The model has its old bits again when this returns or raises.

        Raises:
            RequestError: the batch is empty.
            SubjectNotFoundError: a subject is not found in its tokens.
            NumericalError: a value is not finite.
        """
        if not batch.requests:
            raise RequestError("There is nothing to edit: the batch is empty.")
        clock = Stages()
        cut, windows = Windows.cut(model, batch, self.hparams.target_window)
        solved = self._solve_batch(model, cut, windows, clock, context)
        for _ in range(1, self.hparams.solve_rounds):
            with context.trial(solved.changes):
                with clock.stage("targets"):
                    rows = unsaid_rows(model, cut, solved, but=windows)
                if not rows:
                    break
                part = replace(cut.keep(rows), known={})
                further = self._solve_batch(model, part, Windows(), clock, context)
            solved = self._solve_batch(model, cut, windows, clock, context, found=solved.moved(further))
        known, evidence = solved.known(), solved.evidence()
        return Proposal(
            changes=solved.changes,
            evidence=tuple(windows.evidence_of(request, evidence) for request in batch.requests),
            # A fact has one key at a weight, so the ledger has none of a fact in windows.
            known={request.id: known[request.id] for request in batch.requests if request.id in known},
            diagnostics=solved.diagnostics(objective=self.hparams.calculate_objective_value),
            notes=solved.notes(self.hparams, self.low_fraction_advice),
            seconds=clock.seconds,
        )

    def _solve_batch(
        self,
        model: LanguageModel,
        batch: EditBatch,
        windows: Windows,
        clock: Stages,
        context: EditContext,
        *,
        found: Sequence[BatchTargets] | None = None,
    ) -> SolvedBatch:
        """Solve all groups of a batch.

        Args:
            found: the targets of each group; left out, they are optimised.
        """
        groups = groups_of(
            model, batch, windows, self.hparams, self.prepared(model, context), self.key_weighting, seed=context.seed
        )
        solved: list[SolvedGroup] = []
        changes: dict[str, FactoredDelta] = {}
        # Lower layers come first, because the residuals of upper layers are measured with the lower changes in place.
        for number, group in enumerate(groups):
            targets = found[number] if found else None
            solved.append(self._solve_group(model, group, changes, clock, context, found=targets))
            changes |= solved[-1].changes
        return SolvedBatch(solved)

    def _solve_group(
        self,
        model: LanguageModel,
        group: Group,
        below: Mapping[str, FactoredDelta],
        clock: Stages,
        context: EditContext,
        *,
        found: BatchTargets | None = None,
    ) -> SolvedGroup:
        """Solve the facts of one group, on a model that has the changes ``below`` in place.

        Args:
            found: their targets; left out, they are optimised.
        """
        hparams, prepared, batch, layers = self.hparams, self.prepared(model, context), group.batch, group.layers
        with context.trial(below) if hparams.layer_rule == "blue" else nullcontext():
            with clock.stage("keys"):
                sharing = self._sharing(model, group, context)
            with clock.stage("targets"):
                values = requests_by_value(batch, {model.layout.weight_name(layer) for layer in layers}, sharing)
                targets = found or BatchTargets.of(
                    model, values, layers[-1], hparams, prepared, context, windows=group.windows
                )
        weights = torch.tensor(batch.weights, dtype=torch.float64)
        changes = dict(below)
        solved: list[SolvedLayer] = []
        reader = ActivationReader(
            model,
            hparams,
            prepared.templates,
            key_weighting=group.key_weighting,
            residual_key=self.residual_key,
            # If prefixes can be cached, a block reads nothing but the residual stream from lower blocks.
            resume=len(layers) > 1 and prepared.cache_prefixes.get(layers[-1], False),
            windows=group.windows,
        )
        for number, layer in enumerate(layers):
            name = model.layout.weight_name(layer)
            with context.trial(changes):
                with clock.stage("keys"):
                    kept = kept_keys(batch, name, targets.row) if self._keys_stay(model, layer, prepared, below) else {}
                    activations = reader.read(batch, layer, deepest=layers[-1], kept=kept).averaged(sharing)
                residuals = targets.residuals(
                    model,
                    batch,
                    name=name,
                    activations=activations,
                    share=1 / (len(layers) - number),
                    kind=self.residual_kind,
                )
                weight_norm = float(model.weight(name).float().norm())
            with clock.stage("solve"):
                facts = FactsAtLayer(
                    keys=activations.keys,
                    residuals=residuals,
                    weights=weights.to(activations.keys),
                    rewritten=group.facts,
                )
                problem = self._problem(model, layer, facts, batch.held, context)
                update = self.solve(problem)
                if self.residual_key == "prompt":
                    update = hold_at(update, activations.keys, activations.residual_keys, problem.metric)
            if not update.delta.is_finite():
                raise NumericalError(f"The update of {name} holds NaN or Inf; nothing was applied.")
            changes[name] = update.delta
            solved.append(SolvedLayer(problem, activations, update, weight_norm))
        return SolvedGroup(batch, targets, solved, sum(len(rows) - 1 for rows in sharing))

    def _sharing(self, model: LanguageModel, group: Group, context: EditContext) -> list[list[int]]:
        """Rows of a group's facts that share a key at its first layer; facts with a key of their own are left out."""
        batch, layer = group.batch, group.layers[0]
        rows = rows_with_a_subject_in_common(batch, but=group.windows)
        if not rows or self.hparams.shared_key_cosine is None:
            return []
        reader = ActivationReader(
            model,
            self.hparams,
            self.prepared(model, context).templates,
            key_weighting=group.key_weighting,
            residual_key=self.residual_key,
            resume=False,
            windows=group.windows,
        )
        alike = batch.without({request.id for row, request in enumerate(batch.requests) if row not in rows})
        keys = reader.read(alike, layer, deepest=layer, kept={}).keys
        groups = facts_by_key(keys, self.moment(model, layer, context), cosine=self.hparams.shared_key_cosine)
        return [[rows[member] for member in members] for members in groups if len(members) > 1]

    def moment(self, model: LanguageModel, layer: int, context: EditContext) -> Metric:
        """C, the second moment of a layer's keys. At a first-token layer it is computed when a fact first needs it."""
        prepared = self.prepared(model, context)
        if layer not in prepared.metrics:
            prepared.metrics[layer] = first_token_metric(model, layer, self.hparams, context)
        return prepared.metrics[layer]

    def _keys_stay(
        self, model: LanguageModel, layer: int, prepared: Prepared, below: Mapping[str, FactoredDelta]
    ) -> bool:
        """Whether the ledger's keys of earlier facts at ``layer`` are what a forward pass would give.

        Keys depend only on the weights below. With ``residual_key = "prompt"`` the keys in the ledger are not those
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

        For Δ = R (KᵀC'⁻¹K + Λ)⁻¹KᵀC'⁻¹ the ledger has K and, as the left factor, R. Taking fewer columns of both gives
        what :meth:`propose` would have given for those requests at the time, without running the model. The solve must
        be of this form (:attr:`right_from_keys`), and its residuals must belong to the keys that it is given.

        Returns:
            ``None`` if keys of upper layers depend on changes of lower layers that would differ. This is so for facts
            of several layers, and if a fact that is left out was written below others. With a memory, too: the batch
            then depends on what was active when it came.
        """
        if not self.right_from_keys or self.residual_key == "prompt" or self._memory is not None:
            return None
        ids, wanted = [request.id for request in entry.requests], set(rows)
        if any(name not in entry.known or len(entry.known[name].keys) != 1 for name in ids):
            return None
        depths = [max(map(model.layout.layer_of, entry.known[name].keys)) for name in ids]
        if any(depth < max(depths) for row, depth in enumerate(depths) if row not in wanted):
            return None
        return self._solve_stored(model, entry, rows, {}, context)

    def solve_at_stored_keys(
        self,
        model: LanguageModel,
        entry: LedgerEntry,
        rows: Sequence[int],
        missing: Mapping[str, Tensor],
        context: EditContext,
    ) -> Written | None:
        """See :class:`editcore.SolvesAtStoredKeys`. The left factor in the ledger is R = V − W K, scaled as the batch
        was; on weights without M it is R + M K. The prior keeps the weight that it had.

        Returns:
            ``None`` if the solve is not of the form that :meth:`resolve` needs.
        """
        if not self.right_from_keys or self.residual_key == "prompt":
            return None
        return self._solve_stored(model, entry, rows, missing, context, same_prior=True)

    def _solve_stored(
        self,
        model: LanguageModel,
        entry: LedgerEntry,
        rows: Sequence[int],
        missing: Mapping[str, Tensor],
        context: EditContext,
        *,
        same_prior: bool = False,
    ) -> Written | None:
        """Solve some requests of a batch for their stored keys; see :meth:`solve_at_stored_keys`.

        Args:
            same_prior: whether the prior keeps the weight that it had; otherwise it is found from the remaining keys.
        """
        ids, wanted = [request.id for request in entry.requests], set(rows)
        changes: dict[str, FactoredDelta] = {}
        for weight, change in entry.changes.items():
            members = [row for row, name in enumerate(ids) if name in entry.known and weight in entry.known[name].keys]
            if not isinstance(change, FactoredDelta) or change.rank != len(members):
                return None
            columns = [column for column, row in enumerate(members) if row in wanted]
            if not columns:
                continue
            layer = model.layout.layer_of(weight)
            place, chosen = model.place(layer), [members[column] for column in columns]
            keys = torch.stack([entry.known[ids[row]].keys[weight] for row in chosen]).to(place)
            left = change.left[:, columns].to(place)
            if weight in missing:
                left = left.double() + entry.scale * (missing[weight].to(place) @ keys.double().T)
            facts = FactsAtLayer(
                keys=keys,
                residuals=left.T,
                weights=torch.tensor([entry.weights[row] for row in chosen], dtype=torch.float64, device=place),
                rewritten=[entry.requests[row].fact_key for row in rows],
            )
            recorded = entry.diagnostics.get(moment_weight_name(layer)) if same_prior else None
            problem = self._problem(model, layer, facts, entry.held, context, prior_weight=recorded)
            right = self.solve(problem).delta.right
            changes[weight] = FactoredDelta(left.to(right), right)
        return Written(changes=changes)

    def _problem(
        self,
        model: LanguageModel,
        layer: int,
        facts: FactsAtLayer,
        held: Sequence[HeldKey],
        context: EditContext,
        *,
        prior_weight: float | None = None,
    ) -> LayerProblem:
        base, name = self.prior(model, layer, context), model.layout.weight_name(layer)
        memory, weight = self._memory, prior_weight
        if weight is None and memory is not None:
            weight = memory.moment_weight(layer)
        if weight is None:
            weight = moment_weight(self.prior_weight, facts.keys, base, self.ridge, self.hparams.mom2_auto_fraction)

        def priced() -> Metric:
            return base.scaled(weight=weight, ridge=self.hparams.update_norm_lambda)

        if memory is None:
            prior = metric = priced()
        else:
            prior, metric = memory.sum_at(name, weight, priced, rewritten=facts.rewritten)
            held = [key for key in held if key.request_id not in memory.ids]
        held_keys, held_weights = held_keys_at(held, name, base.width)
        # w·(C + Σ μ kkᵀ) + …: besides w times its mean over text, the objective has w Σ μ ‖Δk‖² over the held facts.
        accumulator = Accumulator(metric)
        accumulator.update(held_keys, weight * held_weights)
        return LayerProblem(
            layer=layer,
            name=name,
            keys=facts.keys,
            residuals=facts.residuals,
            weights=facts.weights,
            text=self.moment(model, layer, context),
            moment_weight=weight,
            priced=prior,
            metric=accumulator.metric,
            held_keys=held_keys,
            held_weights=held_weights,
        )
