"""Whether a fact that was just written is what the model says to its bare prompt.

The optimisation may have ended low, the solve may have given the fact little, or the bare prompt may read otherwise
than the contexts in which the value was found. Nothing fails then, so it is measured: for every editor, in one forward
pass over the new facts of a batch, before the batch is entered into the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from editcore.evaluation.scoring import score_targets
from editcore.interfaces.values import EditBatch, EditEvidence, EditRequest

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["not_said", "with_what_is_said"]

_LOW = 0.5
"""Below this ``target_probability`` an optimisation has not found what it looked for."""
_NAMED = 3
"""Facts that a sentence names."""


def with_what_is_said(
    model: LanguageModel, batch: EditBatch, evidence: Sequence[EditEvidence]
) -> tuple[EditEvidence, ...]:
    """The evidence with two figures more for each new fact, of the model as it is now.

    ``said``: 1 if every token of the target is the likeliest one behind the bare prompt, else 0; ``said_probability``:
    exp of the mean log-probability of those tokens.
    """
    new = batch.new_requests
    joins = [one.join for one in new]
    targets = score_targets(model, [one.text for one in new], [one.target_new for one in new], joins=joins)
    found = {
        request.id: {"said": float(target.correct), "said_probability": math.exp(-target.nll)}
        for request, target in zip(new, targets, strict=True)
    }
    told = {one.request_id for one in evidence}
    return (
        *(
            EditEvidence(request_id=one.request_id, replayed=one.replayed, figures={**one.figures, **more})
            if (more := found.get(one.request_id)) is not None
            else one
            for one in evidence
        ),
        *(EditEvidence(request_id=one.id, figures=found[one.id]) for one in new if one.id not in told),
    )


def not_said(requests: Iterable[EditRequest], evidence: Iterable[EditEvidence]) -> str:
    """A sentence or two about facts that the model did not say once they were written, with what may help; empty if
    there are none."""
    figures = {one.request_id: one.figures for one in evidence if not one.replayed}
    asked = [one for one in requests if "said" in figures.get(one.id, {})]
    missing = [one for one in asked if not figures[one.id]["said"]]
    if not missing:
        return ""
    missing.sort(key=lambda one: figures[one.id]["said_probability"])
    named = [
        f"'{one.text}' → '{one.target_new}' (probability {figures[one.id]['said_probability']:.2g})"
        for one in missing[:_NAMED]
    ]
    if len(missing) > _NAMED:
        named.append(f"{len(missing) - _NAMED} more")
    low = [one for one in missing if figures[one.id].get("target_probability", 1.0) < _LOW]
    count = f"{len(missing)} of {len(asked)} facts are" if len(asked) > 1 else "The fact is"
    said = f"{count} not what the model says to the bare prompt right after it was written: {', '.join(named)}."
    if len(low) == len(missing):
        return f"{said} {_ENDED_LOW}"
    if not low:
        return f"{said} {_REACHED}"
    return f"{said} Of {len(low)} of them the optimisation ended low as well. {_ENDED_LOW} For the others: {_REACHED}"


_ENDED_LOW = (
    "The optimisation ended low, too: allow it more steps or a larger change, choose other layers, or word the prompt "
    "otherwise."
)
_REACHED = (
    "The optimisation had reached the target in its contexts, so the solve gave these facts less (facts of a batch may "
    "share a key: write them in batches of their own), or the bare prompt reads otherwise than behind a context."
)
