"""Hyperparameters of trust; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from editcore import HParams
from pydantic import Field, model_validator

__all__ = ["TrustHParams"]

_Share = Annotated[float, Field(ge=0, le=1)]
_Weight = Annotated[float, Field(ge=0)]


class TrustHParams(HParams):
    """What a fact and a batch must reach to be kept, and what happens to those that do not."""

    trust_enable: bool = True
    """False accepts every batch without a check; ``on_conflict`` still applies."""
    trust_threshold: _Share = 0.5
    """Lowest accepted closed-form score of a new fact, gain^w₁ · preservation^w₂, between 0 and 1; 0 accepts all."""
    trust_weights: Annotated[tuple[_Weight, ...], Field(min_length=2, max_length=2)] = (0.5, 0.5)
    """Weights of gain and preservation in the score; they are divided by their sum."""
    trust_cost_ratio: Annotated[float, Field(gt=0)] = 10.0
    """Preservation cost, in multiples of the run's median cost, at which a fact's preservation is one half."""
    trust_action: Literal["rollback", "scale"] = "rollback"
    """What happens to a batch that fails: ``rollback`` searches for the harmful facts and leaves them out;
    ``scale`` first tries the whole batch with its change scaled by ``trust_scale``."""
    trust_scale: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Factor on the change of a batch, tried once if ``trust_action`` is ``scale``."""
    on_conflict: Literal["replace", "keep", "error"] = "replace"
    """What happens to a request for a fact (subject and prompt) that is active or comes earlier in its batch, whatever
    its target: ``replace`` uses the newer request, ``keep`` the older one, and ``error`` ends the run."""

    trust_measure: bool = True
    """Apply each batch on trial and measure it; False uses the closed-form score only."""
    trust_heldout_samples: Annotated[int, Field(ge=0)] = 16
    """Largest number of held-out prompts whose next-token distributions are compared, and of earlier facts that are
    checked again; 0 turns both off."""
    trust_heldout: Annotated[str, Field(min_length=1)] = "worldfacts"
    """Data set or file of records whose neighbourhood prompts are the held-out prompts."""
    trust_text: Annotated[str, Field(min_length=1)] = "docs"
    """Text for perplexity: docs (the prose of Python's documentation), hf:NAME or a file."""
    trust_text_tokens: Annotated[int, Field(ge=0)] = 256
    """Length of the text for perplexity, in tokens; 0 turns perplexity off."""
    trust_min_efficacy: _Share = 0.5
    """Lowest accepted share of new facts that the model says after the batch."""
    trust_min_retention: _Share = 0.75
    """Lowest accepted share of sampled earlier facts that the model still says, among those that it said before the
    batch."""
    trust_max_kl: Annotated[float, Field(gt=0)] = 0.5
    """Largest accepted mean KL divergence between the next-token distributions of held-out prompts before and after the
    batch, in nats."""
    trust_max_perplexity_ratio: Annotated[float, Field(gt=0)] = 1.2
    """Largest accepted ratio of the perplexity after the batch to the perplexity before it."""
    trust_max_norm_growth: Annotated[float, Field(gt=0)] = 0.25
    """Largest accepted ‖W + Δ‖ / ‖W‖ − 1 of an edited weight."""
    trust_looks: Annotated[int, Field(ge=0)] = 12
    """Largest number of parts of a failing batch that are solved and measured to find the harmful facts. Facts that are
    not accepted by then are left out."""

    trust_project: _Share = 0.0
    """α: the share of every proposed change that is taken away along U, the directions that the rows of the weight use
    most: Δ (I − α U Uᵀ). 0 takes nothing away. SPHERE: 0.5. ``trust_enable`` does not matter."""
    trust_project_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """η: at most this share of their squared length have the rows, each scaled to length 1, along U. SPHERE: 0.5."""
    trust_max_change: Annotated[float, Field(gt=0)] | None = None
    """Largest ‖Δ‖ / ‖W‖ of one batch at a weight; a longer change is scaled down to it. Left out, there is no limit.
    ``trust_enable`` does not matter. Not in the papers."""

    @model_validator(mode="after")
    def _check(self) -> TrustHParams:
        if not sum(self.trust_weights) > 0:
            raise ValueError("trust_weights must not both be 0")
        if self.trust_text == "self":
            raise ValueError(
                "trust_text must not be 'self': a resumed run would sample another text from the model it has edited. "
                "Give docs, hf:NAME or a file"
            )
        return self
