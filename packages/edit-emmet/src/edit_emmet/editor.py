"""The editor: EMMET's solve, within the steps that all locate-then-edit methods share."""

from __future__ import annotations

from editcore.locate_then_edit import LocateThenEdit

from edit_emmet.hparams import EmmetHParams

__all__ = ["EmmetEditor"]


class EmmetEditor(LocateThenEdit):
    """Equality-constrained mass editing: ΔW = R (KᵀC'⁻¹K + λ·diag(1/w))⁻¹ KᵀC'⁻¹, C' = w₂·C + update_norm_lambda·I.

    ``R`` holds what each fact asks of the projection's output, ``K`` its mean key over the context templates, ``C`` the
    second moment of the unedited model's keys. With λ = 0 this is the paper's closed form (eq. 13).

    Departures from the reference code: λ is the same for one fact and for many; the residual is measured where the
    projection writes, before any norm that follows; C' is factorised, never inverted.
    """

    name = "emmet"
    right_from_keys = True
    hparams: EmmetHParams

    @property
    def ridge(self) -> float:
        """λ, ``emmet_lambda``."""
        return self.hparams.emmet_lambda
