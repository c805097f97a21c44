"""The editor: MEMIT's solve inside the shared way of locate-then-edit methods."""

from __future__ import annotations

from editcore.locate_then_edit import LocateThenEdit

from edit_memit.hparams import MemitHParams

__all__ = ["MemitEditor"]


class MemitEditor(LocateThenEdit):
    """Mass editing over several layers: in each, ΔW = R Kᵀ (w·C + KKᵀ)⁻¹, MEMIT's equation 14.

    ``R`` holds an equal share of what is left of each fact's residual for this layer and those above it, ``K`` the mean
    keys over the context templates, both measured with the layers below already changed; ``C`` is the second moment of
    the unedited model's keys.

    Departures from the reference code: the residual is measured where the projection writes, before any norm behind it;
    the n × n form of the same solve is used while a batch is smaller than the projection is wide.
    """

    name = "memit"
    right_from_keys = True
    hparams: MemitHParams

    @property
    def ridge(self) -> float:
        """1: MEMIT's strength is in the weight of C alone, ``mom2_update_weight``."""
        return 1.0
