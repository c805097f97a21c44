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
    """Which key is the fact's. ``mean``: the mean over the contexts, wherever a key is used (ROME's equation 2, and
    r-ROME's code). ``prompt``: the bare prompt's, wherever a key is used (p-ROME). ``original``: as ROME's code has it,
    written along C⁻¹k of the mean but divided by its product with the bare prompt's key, which now and then is near
    zero: then the edit disables the model."""
    mean_asks: Literal["shift", "value"] = "shift"
    """What the mean key gets with ``key_mode = "mean"``: δ more than it gives now, which is how δ was optimised in
    every context, or the bare prompt's value h₀ + δ, as in r-ROME's code. The two differ by W(k_bare − k)."""
    key_weighting: Literal["grouped", "mean", "prompt"] = "mean"
    """How keys of the contexts are averaged. ROME, eq. 3: all alike."""
    context_count: Annotated[int, Field(ge=0, le=100)] = 20
    """Contexts to sample beside the bare prompt. ROME's reference code: 20."""
    warn_relative_change: Annotated[float, Field(gt=0)] = 1.0
    """‖ΔW‖ / ‖W‖ (Frobenius) above which an edit is reported as disabling. At 1 the one direction of ΔW outweighs all
    those of W taken together, so that ΔW decides the output even of keys that have little of that direction."""
    warn_key_alignment: Annotated[float, Field(ge=0, le=1)] = 0.1
    """|cos| in C⁻¹ between the mean key and the bare prompt's, below which ``key_mode = "original"`` is reported as
    disabling. A fact written along one and held at the other costs 1/cos² times what it has to: at 0.1, 100 times."""

    @model_validator(mode="after")
    def _one_layer(self) -> RomeHParams:
        if len(self.layers) > 1 and self.layer_selection == "all":
            raise ValueError(
                f'each fact is written into one layer, found {list(self.layers)}; add layer_selection = "random" to '
                "draw one of them for each"
            )
        return self
