"""Whether the model says a fact that was just written when it is given the bare prompt.

The optimisation may have ended at a low probability, the solve may have reached only a part of the fact's residual, or
the bare prompt may differ too much from the contexts in which the value was found. None of these raises an error. So it
is measured, for every editor, in one forward pass over the new facts of a batch, before the batch is entered into the
ledger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from editcore.evaluation.scoring import score_targets
from editcore.interfaces.values import EditBatch, EditEvidence, EditRequest

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["not_said", "with_said_figures"]

_LOW = 0.5
"""An optimisation that ends below this ``target_probability`` counts as failed."""
_NAMED = 3
"""Most facts that a sentence names."""


def with_said_figures(
    model: LanguageModel, batch: EditBatch, evidence: Sequence[EditEvidence]
) -> tuple[EditEvidence, ...]:
    """The evidence with two more figures for each new fact, and for each replayed one about a subject of a new fact,
    measured on the model in its present state.

    ``said`` is 1 if every token of the target is the likeliest one after the bare prompt, else 0. ``said_probability``
    is exp of the mean log-probability of those tokens.
    """
    subjects = {request.subject_key for request in batch.new_requests} - {""}
    replayed = batch.requests[batch.num_new :]
    asked = [*batch.new_requests, *(request for request in replayed if request.subject_key in subjects)]
    targets = score_targets(
        model,
        [request.text for request in asked],
        [request.target_new for request in asked],
        joins=[request.join for request in asked],
    )
    found = {
        request.id: {"said": float(target.correct), "said_probability": math.exp(-target.nll)}
        for request, target in zip(asked, targets, strict=True)
    }
    known = {fact.request_id for fact in evidence}
    more = [EditEvidence(request_id=request.id) for request in batch.new_requests if request.id not in known]
    return tuple(
        replace(fact, figures={**fact.figures, **found.get(fact.request_id, {})}) for fact in (*evidence, *more)
    )


def not_said(requests: Iterable[EditRequest], evidence: Iterable[EditEvidence]) -> str:
    """A few sentences about facts that the model did not say right after they were written, and what may help; empty if
    there are none."""
    figures = {fact.request_id: fact.figures for fact in evidence if "said" in fact.figures}
    measured = [request for request in requests if request.id in figures]
    missing = [request for request in measured if not figures[request.id]["said"]]
    if not missing:
        return ""
    missing.sort(key=lambda request: figures[request.id]["said_probability"])
    named = [
        f"'{request.text}' → '{request.target_new}' (probability {figures[request.id]['said_probability']:.2g})"
        for request in missing[:_NAMED]
    ]
    if len(missing) > _NAMED:
        named.append(f"{len(missing) - _NAMED} more")
    count = f"{len(missing)} of {len(measured)} facts are" if len(measured) > 1 else "The fact is"
    it_was = "they were" if len(measured) > 1 else "it was"
    sentence = f"{count} not what the model says to the bare prompt right after {it_was} written: {', '.join(named)}."
    ended = [
        figures[request.id]["target_probability"] for request in missing if "target_probability" in figures[request.id]
    ]
    low = sum(probability < _LOW for probability in ended)
    of = "" if len(missing) in (low, len(ended) - low) else f" of {{}} of the {len(missing)}"
    return " ".join(
        [
            sentence,
            *([f"The optimisation{of.format(low)} {_ENDED_LOW}"] if low else []),
            *([f"The optimisation{of.format(len(ended) - low)} {_REACHED}"] if len(ended) > low else []),
        ]
    )


_ENDED_LOW = "ended low, too: allow more steps or a larger change, choose other layers, or reword the prompt."
_REACHED = (
    "had reached the target in its contexts: the solve gave the fact less, or the bare prompt has another effect than "
    "the prompt after a context."
)
