"""Contradictions and duplicates, within a batch and with active facts."""

from __future__ import annotations

import pytest
from edit_trust.conflicts import Active, settle
from editcore import EditRequest, RequestError
from editcore.testing import tiny_requests

FIRST, SECOND = tiny_requests(2)
AGAINST = FIRST.model_copy(update={"target_new": "Vienna", "id": "against"})
AGAIN = FIRST.model_copy(update={"id": "again"})
GLUED = FIRST.model_copy(update={"id": "glued", "join": ""})
ACTIVE = {FIRST.fact_key: Active(request=FIRST, batch=3)}


@pytest.mark.parametrize(("request_", "verb"), [(AGAINST, "contradicts"), (AGAIN, "repeats"), (GLUED, "contradicts")])
def test_an_active_fact(request_: EditRequest, verb: str) -> None:
    said = f"{verb} '{FIRST.target_new}' ({FIRST.id}), active since batch 3"
    kept = settle([request_, SECOND], ACTIVE, on_conflict="keep")
    assert {name: rejection.reason for name, rejection in kept.withdrawn.items()} == {
        request_.id: f"{said}; on_conflict is keep"
    }
    replaced = settle([request_, SECOND], ACTIVE, on_conflict="replace")
    assert (replaced.withdrawn, replaced.notes) == ({}, [f"'{request_.id}' replaces an active fact: it {said}"])
    with pytest.raises(RequestError, match=rf"trust: the request '{request_.id}' .* {verb} .* --set trust.on_conflict"):
        settle([request_, SECOND], ACTIVE, on_conflict="error")


def test_within_a_batch() -> None:
    batch = [FIRST, SECOND, AGAINST, AGAIN]
    kept = settle(batch, {}, on_conflict="keep")
    assert list(kept.withdrawn) == ["against", "again"]
    assert "which comes earlier in the batch" in kept.withdrawn["against"].reason
    replaced = settle(batch, {}, on_conflict="replace")
    assert list(replaced.withdrawn) == [FIRST.id, "against"]
    assert replaced.withdrawn[FIRST.id].reason == (
        "contradicts 'Vienna' (against), which comes later in the batch; on_conflict is replace"
    )
    with pytest.raises(RequestError):
        settle(batch, {}, on_conflict="error")


def test_without_conflicts_nothing_is_said() -> None:
    for way in ("replace", "keep", "error"):
        settled = settle([FIRST, SECOND], {}, on_conflict=way)  # type: ignore[arg-type]
        assert (settled.withdrawn, settled.notes) == ({}, [])
