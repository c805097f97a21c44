"""Solved layers, and what is reported of them: evidence, known targets, diagnostics, notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editcore.interfaces.changes import FactoredDelta
from editcore.interfaces.values import EditBatch, EditEvidence, KnownTarget
from editcore.locate_then_edit.activations import LayerActivations
from editcore.locate_then_edit.batch_targets import BatchTargets
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.problem import LayerProblem
from editcore.second_moments.linalg import Update

__all__ = ["SolvedBatch", "SolvedGroup", "SolvedLayer"]

_LOW_FRACTION = 0.5
"""If the median fact reaches less than this fraction of its residual, the model is unlikely to say the facts, and the
user is warned."""


@dataclass(frozen=True, slots=True)
class SolvedLayer:
    """A layer's equation and its solution."""

    problem: LayerProblem
    activations: LayerActivations
    update: Update
    weight_norm: float
    """‖W‖ before the update (Frobenius)."""

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the solve, named ``layer_<n>_<what>``."""
        numbers = {
            "condition": self.update.condition,
            "dependent_directions": float(self.update.dependent),
            "moment_condition": self.problem.priced.condition(),
            "moment_jitter": self.problem.priced.jitter,
            "moment_weight": self.problem.moment_weight,
            "relative_change": self.update.delta.norm() / self.weight_norm,
        }
        if (subspace := self.problem.priced.subspace) is not None:
            numbers["subspace_share"] = subspace[0].shape[1] / self.problem.priced.width
        if self.update.alignments is not None:
            numbers["key_alignment"] = float(self.update.alignments.abs().min())
        return {f"layer_{self.problem.layer}_{key}": value for key, value in numbers.items()}

    def objective(self, batch: EditBatch) -> dict[str, float]:
        """EMMET's objective, term by term: the mean squared change over the text, the mean squared distance to the
        wanted value over new and over old edits, and the mean squared change over held facts."""
        num_new, delta, name = batch.num_new, self.update.delta, self.problem.name
        keys = self.activations.residual_keys
        reached = (keys @ delta.right.T.to(keys)) @ delta.left.T.to(keys)
        missed = (reached - self.problem.residuals).square().sum(1)  # [n]
        numbers = {
            "preservation_distance": self.problem.text.cost(delta),
            "new_edit_distance": float(missed[:num_new].mean()) if num_new else 0.0,
            "old_edit_distance": float(missed[num_new:].mean()) if num_new < len(missed) else 0.0,
        }
        if held := [fact.keys[name] for fact in batch.held if name in fact.keys]:
            right = torch.stack(held).to(delta.right) @ delta.right.T  # [h, rank]
            numbers["held_change"] = float((right @ delta.left.T.to(right)).square().sum(1).mean())
        return {f"layer_{self.problem.layer}_{key}": value for key, value in numbers.items()}

    def notes(self, low_fraction_advice: str, *, shared: int) -> Iterator[str]:
        """Sentences that the user should know about a solve.

        Args:
            shared: how many facts have the key and the value of another one.
        """
        median = float(self.update.fractions.median())
        if median < _LOW_FRACTION:
            yield (
                f"The solve gives the median fact {median:.0%} of its residual: the prior's weight "
                f"({self.problem.moment_weight:g}) is large for this model's keys. {low_fraction_advice}".rstrip()
            )
        if (dependent := self.update.dependent - shared) > 0:
            yield (
                f"{dependent} of {len(self.problem.keys)} keys depend on the others; what their facts ask for "
                "contradicts each other and is met in the least-squares sense only."
            )

    def warnings(self, hparams: LocateThenEditHParams) -> Iterator[str]:
        """Signs that the solve is not to be trusted to the last digits."""
        if self.update.condition > hparams.warn_condition:
            yield (
                f"The edit system of layer {self.problem.layer} has the condition number {self.update.condition:.1e} "
                f"(warn_condition is {hparams.warn_condition:.0e}): keys of its {len(self.problem.keys)} facts are "
                "nearly dependent. A Tikhonov term bounds it, such as tikhonov = 1e-6."
            )


@dataclass(frozen=True, slots=True)
class SolvedGroup:
    """Facts of a batch that were written at the same layers."""

    batch: EditBatch
    targets: BatchTargets
    layers: Sequence[SolvedLayer]
    shared: int
    """How many facts have the key and the value of another one."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of its blocks."""
        return tuple(layer.problem.layer for layer in self.layers)

    @property
    def changes(self) -> dict[str, FactoredDelta]:
        """By address of the weight."""
        return {layer.problem.name: layer.update.delta for layer in self.layers}

    def known(self) -> dict[str, KnownTarget]:
        """By request id, the key and the value that a fact was solved with, and the figures of its optimisation."""
        return {
            request.id: KnownTarget(
                keys={layer.problem.name: layer.activations.residual_keys[row].cpu() for layer in self.layers},
                values={
                    layer.problem.name: (layer.activations.outputs[row] + layer.problem.residuals[row]).cpu()
                    for layer in self.layers
                },
                figures=self.targets.figures(row, self.batch),
            )
            for row, request in enumerate(self.batch.requests)
        }

    def evidence(self) -> Iterator[EditEvidence]:
        """Per request, in the batch's order."""
        first, costs = self.layers[0], self._costs()
        for row, request in enumerate(self.batch.requests):
            stored = {  # for a fact with a stored value: what it asked of the first layer
                "delta_norm": float(first.problem.residuals[row].norm()),
                "value_norm": float(first.activations.outputs[row].norm()),
            }
            figures = {
                **(self.targets.figures(row, self.batch) or stored),
                "key_norm": float(first.activations.keys[row].norm()),
                "key_energy": float(first.update.energies[row] * first.problem.moment_weight),
                "fraction_reached": float(first.update.fractions[row]),
            }
            if costs is not None:
                figures["preservation_cost"] = float(costs[row])
            yield EditEvidence(request_id=request.id, replayed=row >= self.batch.num_new, figures=figures)

    def diagnostics(self, *, objective: bool) -> dict[str, float]:
        """Numbers of all layers, with the terms of the objective if ``objective``."""
        numbers: dict[str, float] = {}
        for layer in self.layers:
            numbers |= layer.diagnostics()
            if objective:
                numbers |= layer.objective(self.batch)
        return numbers

    def notes(self, hparams: LocateThenEditHParams, low_fraction_advice: str) -> Iterator[str]:
        """Sentences for the user."""
        yield from self.targets.notes()
        yield from self.layers[0].notes(low_fraction_advice, shared=self.shared)
        for layer in self.layers:
            yield from layer.warnings(hparams)

    def _costs(self) -> Tensor | None:
        """The share of each fact in tr(Δ C Δᵀ), summed over layers, ``[n]`` float64; ``None`` if a left factor does not
        have one column per fact."""
        if any(layer.update.delta.rank != len(layer.problem.keys) for layer in self.layers):
            return None
        return torch.stack([layer.problem.text.cost_parts(layer.update.delta).cpu() for layer in self.layers]).sum(0)


@dataclass(frozen=True, slots=True)
class SolvedBatch:
    """All groups of a batch, lower layers first."""

    groups: Sequence[SolvedGroup]

    @property
    def changes(self) -> dict[str, FactoredDelta]:
        """By address of the weight."""
        return {name: change for group in self.groups for name, change in group.changes.items()}

    def known(self) -> dict[str, KnownTarget]:
        """As :meth:`SolvedGroup.known`; a fact may be in two groups, of which the lower one has its bare prompt."""
        known: dict[str, KnownTarget] = {}
        for group in reversed(self.groups):
            for name, target in group.known().items():
                known[name] = _joined_targets(known.get(name), target)
        return known

    def evidence(self) -> dict[str, EditEvidence]:
        """By request id."""
        evidence: dict[str, EditEvidence] = {}
        for group in reversed(self.groups):
            for found in group.evidence():
                evidence[found.request_id] = _joined_evidence(evidence.get(found.request_id), found)
        return evidence

    def diagnostics(self, *, objective: bool) -> dict[str, float]:
        """As :meth:`SolvedGroup.diagnostics`."""
        return {name: value for group in self.groups for name, value in group.diagnostics(objective=objective).items()}

    def notes(self, hparams: LocateThenEditHParams, low_fraction_advice: str) -> tuple[str, ...]:
        """Sentences for the user, each once."""
        notes = [note for group in self.groups for note in group.notes(hparams, low_fraction_advice)]
        return tuple(dict.fromkeys(notes))

    def moved(self, further: SolvedBatch) -> list[BatchTargets]:
        """The targets of each group, with those that ``further`` found on the changed model added to them."""
        more = {group.numbers: group.targets for group in further.groups}
        return [group.targets.moved(more.get(group.numbers)) for group in self.groups]


def _joined_targets(behind_context: KnownTarget | None, bare: KnownTarget) -> KnownTarget:
    """Keys and values of a fact that was written twice: its bare prompt at first-token layers, its prompt behind a
    context at the others. The figures of the optimisation are those of the bare prompt."""
    if behind_context is None:
        return bare
    return KnownTarget(
        keys={**bare.keys, **behind_context.keys},
        values={**bare.values, **behind_context.values},
        figures=bare.figures or behind_context.figures,
    )


def _joined_evidence(behind_context: EditEvidence | None, bare: EditEvidence) -> EditEvidence:
    """Figures of a fact that was written twice: those of the bare prompt, but the sum of both costs and the smaller of
    both fractions."""
    if behind_context is None:
        return bare
    figures = {**behind_context.figures, **bare.figures}
    for name, joined in (("preservation_cost", sum), ("fraction_reached", min)):
        if name in behind_context.figures and name in bare.figures:
            figures[name] = joined((behind_context.figures[name], bare.figures[name]))
    return replace(bare, figures=figures)
