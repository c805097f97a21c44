"""The editor: ROME's rank-one change, within the steps that all locate-then-edit methods share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from editcore import EditBatch, EditContext, Proposal
from editcore.locate_then_edit import KeyWeighting, LocateThenEdit, ResidualKey, ResidualKind

from edit_rome.hparams import RomeHParams

if TYPE_CHECKING:
    from editcore import LanguageModel

__all__ = ["RomeEditor"]


class RomeEditor(LocateThenEdit):
    """Rank-one model editing: ΔW = r (C⁻¹k)ᵀ / (k'ᵀC⁻¹k), ROME's equation 2.

    ``r`` is what the fact asks of the projection's output, ``C`` the second moment of the unedited model's keys. ``k``
    and ``k'`` are the same key, except with ``key_mode = "original"``. There ``k`` is the mean over the contexts and
    ``k'`` the bare prompt's key, as in the reference code and unlike the paper.

    Departure from the reference code: C⁻¹k is found by a solve, and C is never inverted.
    """

    name = "rome"
    hparams: RomeHParams

    @property
    def key_weighting(self) -> KeyWeighting:
        """Only the bare prompt's key with ``key_mode = "prompt"``."""
        return "prompt" if self.hparams.key_mode == "prompt" else self.hparams.key_weighting

    @property
    def residual_key(self) -> ResidualKey:
        """The bare prompt's key with ``key_mode = "original"``."""
        return "prompt" if self.hparams.key_mode == "original" else "mean"

    @property
    def residual_kind(self) -> ResidualKind:
        """As ``mean_asks`` says, with ``key_mode = "mean"``."""
        return self.hparams.mean_asks if self.hparams.key_mode == "mean" else "shift"

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Solve one fact on the model as it is now."""
        proposal = super().propose(model, batch, context)
        return replace(proposal, notes=(*proposal.notes, *self._warnings(proposal.diagnostics)))

    def _warnings(self, diagnostics: Mapping[str, float]) -> Iterator[str]:
        """Warnings of an edit that may disable the model, so that it generates no sensible text (arXiv 2403.07175,
        section 3)."""
        for name, number in diagnostics.items():
            if name.endswith("relative_change") and number > self.hparams.warn_relative_change:
                yield (
                    f"This edit may disable the model: its change is {number:.3g} times as long as the weight "
                    f"(warn_relative_change is {self.hparams.warn_relative_change:g}). Lower clamp_norm_factor, edit "
                    "another layer, or undo it."
                )
            if name.endswith("key_alignment") and number < self.hparams.warn_key_alignment:
                yield (
                    "This edit may disable the model: the original code divides by the product of the mean key and the "
                    f"bare prompt's, whose cosine in C⁻¹ is {number:.2g} here (warn_key_alignment is "
                    f"{self.hparams.warn_key_alignment:g}). Use key_mode = 'mean'."
                )
