"""The editor: MEMIT's solve, within the steps that all locate-then-edit methods share."""

from __future__ import annotations

from editcore.locate_then_edit import LocateThenEdit

from edit_memit.hparams import MemitHParams, MemitSeqHParams

__all__ = ["MemitEditor", "MemitSeqEditor"]


class MemitEditor(LocateThenEdit):
    """Mass editing over several layers: in each, ΔW = R Kᵀ (w·C + KKᵀ)⁻¹, MEMIT's equation 14.

    ``R`` holds a share of what each fact's residual still lacks: 1/n of it where this layer and those above it are n.
    ``K`` holds the mean keys over the context templates. Both are measured with the layers below already changed. ``C``
    is the second moment of the unedited model's keys.

    Departures from the reference code: the residual is measured where the projection writes, before any norm that
    follows; the n × n form of the same solve is used for a batch of fewer facts than the projection is wide.
    """

    name = "memit"
    right_from_keys = True
    hparams: MemitHParams

    @property
    def ridge(self) -> float:
        """1: MEMIT is regularised by the weight of C alone, ``mom2_update_weight``."""
        return 1.0


class MemitSeqEditor(MemitEditor):
    """MEMIT in sequence: ΔW = R Kᵀ (w·C + λI + Σ KKᵀ)⁻¹, the sum over all batches up to this one.

    ``R`` is measured with all earlier batches in place. For one layer, and for the same keys and values, the batches
    give what one batch of all their facts would (arXiv 2605.26670).

    Departures from the reference code: those of MEMIT.
    """

    name = "memit-seq"
    hparams: MemitSeqHParams
