"""The first level of judgement: a score for each fact from the figures of the solve, without running the model.

A fact i of a batch asks for the residual rᵢ at its key, and gets the share fᵢ of it. Its gain is

    gᵢ = pᵢ · min(1, s fᵢ)

with pᵢ the probability its target had at the end of the optimisation (1 where none was needed) and s the scale on the
change. The batch's change Δ = Σ rᵢuᵢᵀ costs tr(Δ C Δᵀ) on ordinary text, of which the fact's part is
cᵢ = Σⱼ (rᵢᵀrⱼ)(uᵢᵀC uⱼ) (the figure ``preservation_cost`` of its evidence). With m the median cost of the facts of this
batch and of the active ones, its preservation is

    hᵢ = 1 / (1 + s² cᵢ / (κ m))

and its score, with weights w₁ + w₂ = 1,

    scoreᵢ = gᵢ^w₁ · hᵢ^w₂ .

Gain and cost are the two terms of EMMET's objective (arXiv 2403.14236, eq. 9). Combining them into one number per fact
is this project's idea. The score is a product because neither term makes up for a lack of the other. The cost is
compared with the run's own median because the scale of C differs between models and layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from editcore import EditEvidence

__all__ = ["FactScore", "reference_cost", "score_facts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FactScore:
    """One fact's score and its terms."""

    gain: float
    preservation: float
    score: float
    cost_ratio: float
    """Its preservation cost divided by the median one."""

    def figures(self) -> dict[str, float]:
        """The terms by name."""
        return {
            "score": self.score,
            "gain": self.gain,
            "preservation": self.preservation,
            "cost_ratio": self.cost_ratio,
        }


def reference_cost(costs: Iterable[float]) -> float:
    """m: the median of the positive costs, the lower one of two; 0 if there is none.

    >>> reference_cost([3.0, 1.0, 0.0, 500.0, 2.0])
    2.0
    """
    positive = [cost for cost in costs if cost > 0]
    return statistics.median_low(positive) if positive else 0.0


def score_facts(
    evidence: Sequence[EditEvidence],
    *,
    reference: float,
    weights: Sequence[float],
    cost_ratio: float,
    scale: float = 1.0,
) -> Mapping[str, FactScore]:
    """The score of each fact, by request id. A figure that the editor does not give counts as the best: a probability,
    a share or a preservation of 1.

    Args:
        reference: m, as :func:`reference_cost` gives it.
        weights: of gain and preservation, of any sum.
        cost_ratio: κ.
        scale: s, the factor on the change.
    """
    gain_weight = weights[0] / sum(weights)
    found = {}
    for fact in evidence:
        probability = fact.figures.get("target_probability", 1.0)
        gain = probability * min(1.0, max(0.0, scale * fact.figures.get("fraction_reached", 1.0)))
        cost = scale**2 * max(0.0, fact.figures.get("preservation_cost", 0.0))
        ratio = cost / reference if reference > 0 else 0.0
        preservation = 1 / (1 + ratio / cost_ratio)
        score = gain**gain_weight * preservation ** (1 - gain_weight)
        found[fact.request_id] = FactScore(gain=gain, preservation=preservation, score=score, cost_ratio=ratio)
    return found
