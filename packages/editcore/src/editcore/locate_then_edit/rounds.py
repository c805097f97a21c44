"""Which facts of a batch are solved again, because the model does not say them after the solve (``solve_rounds``)."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from editcore.evaluation.scoring import score_targets
from editcore.interfaces.values import EditBatch
from editcore.locate_then_edit.solved import SolvedBatch

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["unsaid_rows"]


def unsaid_rows(model: LanguageModel, batch: EditBatch, solved: SolvedBatch, *, but: Container[str]) -> list[int]:
    """Rows of the facts to optimise again, ascending: those that the model, in its present state, does not say after
    the bare prompt, and those that share a value with one of them. Only facts whose value was optimised count.

    Args:
        but: ids of requests that are not asked.
    """
    optimised = {name for group in solved.groups for name in group.targets.row}
    rows = [row for row, request in enumerate(batch.requests) if request.id in optimised and request.id not in but]
    requests = [batch.requests[row] for row in rows]
    found = score_targets(
        model,
        [request.text for request in requests],
        [request.target_new for request in requests],
        joins=[request.join for request in requests],
    )
    unsaid = {request.id for request, target in zip(requests, found, strict=True) if not target.correct}
    sharing = {name for group in solved.groups for name, facts in group.targets.facts_of_value.items() if facts > 1}
    subjects = {request.subject_key for request in requests if request.id in unsaid & sharing}
    return [
        row
        for row, request in zip(rows, requests, strict=True)
        if request.id in unsaid or (request.id in sharing and request.subject_key in subjects)
    ]
