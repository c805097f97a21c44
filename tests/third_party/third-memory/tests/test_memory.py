"""What the memory answers is what the editor aimed at."""

from __future__ import annotations

import pytest
from editcore import EditRequest, EditSession, SessionConfig
from editcore.evaluation import score_targets
from editcore.testing import tiny_model, tiny_requests

FIRST = tiny_requests(3)
AGAIN = EditRequest(subject=FIRST[0].subject, prompt=FIRST[0].prompt, target_new="Madrid")


def test_a_fact_that_is_edited_again_has_its_newest_target() -> None:
    session = EditSession.open(
        tiny_model(), SessionConfig(editor="gated-memory", settings={"gated-memory": {"layer": 1}})
    )
    session.edit(FIRST)
    [result] = session.edit([AGAIN])
    [score] = score_targets(session.model, [AGAIN.text], ["Madrid"])
    [evidence] = result.proposal.evidence
    assert evidence.figures["target_loss"] == pytest.approx(score.nll, abs=1e-4)
    assert evidence.figures["slot"] == len(FIRST)
    session.undo(AGAIN.id)
    [first_score] = score_targets(session.model, [AGAIN.text], [FIRST[0].target_new])
    assert session.ledger.entries[0].evidence[0].figures["target_loss"] == pytest.approx(first_score.nll, abs=1e-4)
