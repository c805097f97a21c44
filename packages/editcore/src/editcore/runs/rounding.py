"""How much of a batch survives rounding: a change smaller than a weight's last digit is lost when it is written.

Shapes: ``n`` new facts of a batch, ``d_in`` and ``d_out`` the widths of a written weight, ``k`` a fact's key, ``r`` its
residual, the change that it asks of the weight's output for ``k``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from editcore.interfaces.changes import Changes
from editcore.interfaces.errors import EditcoreError
from editcore.interfaces.protocols import OverlaysWeights
from editcore.interfaces.values import EditBatch, KnownTarget, Proposal
from editcore.models import LanguageModel
from editcore.models.capture import project
from editcore.models.edited import EditedModel
from editcore.models.writing import in_float64
from editcore.plugins.calls import resolve
from editcore.plugins.registry import Plugins

__all__ = ["RoundingCheck"]

_MIN_KEPT = 0.9
"""A fact that keeps less than this share of its planned change is reported."""


@dataclass(frozen=True, slots=True)
class _FactsAtWeight:
    """The new facts of a batch that have a key at one weight."""

    ids: Sequence[str]
    """Of their requests."""
    keys: Tensor
    """``[n, d_in]`` float64."""
    residuals: Tensor
    """r, ``[n, d_out]`` float64."""
    noise: Tensor
    """‖r‖² that may come from the rounding of the model's own outputs alone, (2 ε ‖v‖)² for the value v, ``[n]``."""
    before: Tensor
    """W k of the weight before the batch, without bias, ``[n, d_out]`` float64."""


class RoundingCheck:
    """Measures how much of a batch survives rounding.

    Made before the batch is written, it keeps the outputs that the weights give for the new facts. :meth:`compared`
    then compares them with the outputs after writing. Only weights of fewer digits than float32 are measured, because
    no edit is lost in others.
    """

    def __init__(self, edited: EditedModel, batch: EditBatch, proposal: Proposal) -> None:
        self._edited = edited
        known = {
            request.id: proposal.known[request.id] for request in batch.new_requests if request.id in proposal.known
        }
        narrow = [
            address
            for address in proposal.changes
            if edited.model.weights.type_of(address).itemsize < torch.float32.itemsize
        ]
        found = {address: _facts_at(edited.model, address, known) for address in narrow}
        self._at = {address: facts for address, facts in found.items() if facts is not None}

    def compared(self, proposal: Proposal, changes: Changes, *, plugins: Plugins) -> Proposal:
        """The proposal with figures and a note on how much of its change is in the weights.

        The evidence of each new fact gets ``fraction_written``, Σ⟨(W_after − W_before) k, r⟩ / Σ⟨r, r⟩ over the weights
        that it was written into, unless it asked for no more than the rounding of the model's own outputs. Where a fact
        keeps less than 0.9 of its change Δ, measured as Σ⟨(W_after − W_before) k, Δ k⟩ / Σ⟨Δ k, Δ k⟩, a note says so
        and how to avoid it.

        Args:
            changes: what was written, as the ledger keeps it.
        """
        fractions, kept = self._measured(changes)
        notes = proposal.notes
        if any(share < _MIN_KEPT for share in kept):
            notes = (*notes, self._note(kept, plugins))
        evidence = [
            replace(evidence, figures={**evidence.figures, "fraction_written": fractions[evidence.request_id]})
            if evidence.request_id in fractions
            else evidence
            for evidence in proposal.evidence
        ]
        return replace(proposal, evidence=tuple(evidence), notes=notes)

    def _measured(self, changes: Changes) -> tuple[dict[str, float], list[float]]:
        """``fraction_written`` by request id, and the share of its change that each fact keeps."""
        sums: dict[str, Tensor] = {}
        for address, facts in self._at.items():
            moved = _outputs(self._edited.model, address, facts.keys) - facts.before
            if isinstance(self._edited.backend, OverlaysWeights) and not moved.any():
                continue  # the backend keeps the change beside the weight, where it is not rounded
            planned = facts.keys @ in_float64(changes[address], facts.keys).T
            pairs = [
                (moved, facts.residuals),
                (facts.residuals, facts.residuals),
                (moved, planned),
                (planned, planned),
            ]
            parts = torch.stack([*((left * right).sum(1) for left, right in pairs), facts.noise], dim=1).cpu()  # [n, 5]
            for name, part in zip(facts.ids, parts, strict=True):
                sums[name] = sums.get(name, torch.zeros_like(part)) + part
        fractions, kept = {}, []
        for name, (written, wanted, along, planned, noise) in ((name, total.tolist()) for name, total in sums.items()):
            if wanted > noise:
                fractions[name] = written / wanted
            if planned > noise / 64:  # a smaller change cannot move the last digit of an output
                kept.append(along / planned)
        return fractions, kept

    def _note(self, kept: Sequence[float], plugins: Plugins) -> str:
        dtype = str(self._edited.model.dtype).removeprefix("torch.")
        few = sum(share < _MIN_KEPT for share in kept)
        beside = [f", or keep the edits beside the weights with --backend {name}" for name in _overlaying(plugins)[:1]]
        return (
            f"The weights have too few digits for this batch: in {dtype}, {few} of {len(kept)} facts keep less than "
            f"{_MIN_KEPT:.0%} of their change (the median fact {median(kept):.0%}). Load the model with --dtype float32"
            f"{''.join(beside)}."
        )


def _overlaying(plugins: Plugins) -> list[str]:
    """Names of the backends that keep changes beside the weights. A backend that cannot be imported is left out."""
    found = []
    for name, spec in plugins.backends().items():
        with suppress(EditcoreError):
            made = resolve(spec.target)
            if isinstance(made, type) and issubclass(made, OverlaysWeights):
                found.append(name)
    return found


def _facts_at(model: LanguageModel, address: str, known: Mapping[str, KnownTarget]) -> _FactsAtWeight | None:
    """The facts of ``known`` that have key and value at a weight; ``None`` if there are none."""
    here = {name: target for name, target in known.items() if address in target.keys and address in target.values}
    if not here:
        return None
    weight = model.weight(address)
    keys, values = (
        torch.stack([named[address].to(weight.device, torch.float64) for named in tensors])
        for tensors in ([target.keys for target in here.values()], [target.values for target in here.values()])
    )
    noise = (2 * torch.finfo(model.weights.type_of(address)).eps * values.norm(dim=1)).square()
    return _FactsAtWeight(
        tuple(here), keys, values - project(model, address, keys), noise, _outputs(model, address, keys)
    )


@torch.no_grad()
def _outputs(model: LanguageModel, address: str, keys: Tensor) -> Tensor:
    return keys @ model.as_out_in(address, model.weight(address)).to(keys).T
