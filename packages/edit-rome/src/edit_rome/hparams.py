"""Hyperparameters of ROME; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from editcore.locate_then_edit import LocateThenEditHParams
from pydantic import Field, model_validator

__all__ = ["RomeHParams"]


class RomeHParams(LocateThenEditHParams):
    """ROME (arXiv 2202.05262) and its variants (r-ROME and p-ROME, arXiv 2403.07175). Shared fields keep their
    meaning."""

    also_named: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "r-rome": {"key_mode": "mean", "mean_asks": "value"},
        "p-rome": {"key_mode": "prompt"},
    }

    key_mode: Literal["mean", "prompt", "original"] = "mean"
    """Key of a fact. ``mean``: the mean over the contexts (ROME's equation 2, and r-ROME's code). ``prompt``: the key
    of the bare prompt (p-ROME). ``original``: as in ROME's code, the update is along C⁻¹k of the mean key k, but is
    divided by the product of C⁻¹k with the bare prompt's key. If that product is near zero, the edit disables the
    model."""
    mean_asks: Literal["shift", "value"] = "shift"
    """With ``key_mode = "mean"``, what the update gives at the mean key. ``shift``: the present value plus δ, as δ was
    optimised in every context. ``value``: the bare prompt's value h₀ + δ, as in r-ROME's code. The two differ by
    W(k_bare − k)."""
    key_weighting: Literal["grouped", "mean", "prompt"] = "mean"
    """Weights in the average of a fact's keys. ``mean``: all equal (ROME, eq. 3). ``grouped``: the bare prompt ½, all
    other contexts together ½. ``prompt``: the bare prompt alone."""
    context_count: Annotated[int, Field(ge=0, le=100)] = 20
    """Contexts to sample in addition to the bare prompt. ROME's reference code: 20."""
    warn_relative_change: Annotated[float, Field(gt=0)] = 1.0
    """‖ΔW‖ / ‖W‖ (Frobenius) above which an edit is reported as disabling. At 1 the rank-one ΔW has the norm of
    the whole W, and dominates the output even for keys with a small component in its direction."""
    warn_key_alignment: Annotated[float, Field(ge=0, le=1)] = 0.1
    """|cos| in C⁻¹ between the mean key and the bare prompt's, below which ``key_mode = "original"`` is reported as
    disabling. The cost of such an edit is 1/cos² times the least possible: at 0.1, 100 times."""

    @model_validator(mode="after")
    def _one_layer(self) -> RomeHParams:
        if len(self.layers) > 1 and self.layer_selection == "all":
            raise ValueError(
                f'each fact is written into one layer, found {list(self.layers)}; add layer_selection = "random" to '
                "draw one of them for each"
            )
        return self
