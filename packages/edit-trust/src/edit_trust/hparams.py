"""Hyperparameters of trust; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from editcore import HParams
from pydantic import Field, model_validator

__all__ = ["TrustHParams"]

_Share = Annotated[float, Field(ge=0, le=1)]
_Weight = Annotated[float, Field(ge=0)]


class TrustHParams(HParams):
    """What a fact and a batch must show before they are kept, and what becomes of those that do not."""

    trust_enable: bool = True
    """False accepts every batch unseen; ``on_conflict`` stays in force."""
    trust_threshold: _Share = 0.5
    """Least closed-form score of a new fact, gain^w₁ · preservation^w₂ (0 is the worst, 1 the best); 0 accepts all."""
    trust_weights: Annotated[tuple[_Weight, ...], Field(min_length=2, max_length=2)] = (0.5, 0.5)
    """Weights of gain and preservation in the score; they are divided by their sum."""
    trust_cost_ratio: Annotated[float, Field(gt=0)] = 10.0
    """Preservation cost, in units of the run's median fact, at which a fact's preservation is one half."""
    trust_action: Literal["rollback", "scale"] = "rollback"
    """What happens to a batch that fails: ``rollback`` looks for the facts that do the harm and leaves them out;
    ``scale`` first tries the whole batch with its change scaled by ``trust_scale``."""
    trust_scale: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Factor on the change of a batch, tried once where ``trust_action`` is ``scale``."""
    on_conflict: Literal["replace", "keep", "error"] = "replace"
    """What happens to a request for a fact (subject and prompt) that is active or comes earlier in its batch, whatever
    its target: ``replace`` takes the newer request, ``keep`` stays with the older one, ``error`` ends the run."""

    trust_measure: bool = True
    """Apply each batch on trial and measure it; False leaves it at the closed-form score."""
    trust_heldout_samples: Annotated[int, Field(ge=0)] = 16
    """Held-out prompts whose next-token distributions are compared, and earlier facts that are asked again, at most; 0
    asks neither."""
    trust_heldout: Annotated[str, Field(min_length=1)] = "worldfacts"
    """Where held-out prompts come from: a data set or a file of records, whose neighbourhood prompts are drawn."""
    trust_text: Annotated[str, Field(min_length=1)] = "docs"
    """Text for perplexity: docs (the prose of Python's documentation), hf:NAME or a file."""
    trust_text_tokens: Annotated[int, Field(ge=0)] = 256
    """Tokens of it; 0 leaves perplexity out."""
    trust_min_efficacy: _Share = 0.5
    """Least share of the new facts that the model says with the batch in it."""
    trust_min_retention: _Share = 0.75
    """Least share of the sampled earlier facts, of those that the model said before the batch, that it still says."""
    trust_max_kl: Annotated[float, Field(gt=0)] = 0.5
    """Largest mean KL divergence of the held-out prompts' next token, from before the batch to after it, in nats."""
    trust_max_perplexity_ratio: Annotated[float, Field(gt=0)] = 1.2
    """Largest perplexity with the batch over perplexity before it."""
    trust_max_norm_growth: Annotated[float, Field(gt=0)] = 0.25
    """Largest ‖W + Δ‖ / ‖W‖ − 1 of an edited weight."""
    trust_looks: Annotated[int, Field(ge=0)] = 12
    """Most parts of a failing batch that are solved and measured to find the facts that do the harm. What has not been
    cleared by then is left out."""

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
