"""A batch without one of its facts is what it would have been without that fact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import Changes, EditSession, Resolves, SessionConfig
from editcore.ledger.states import LeftOut
from editcore.testing import tiny_model, tiny_requests

REQUESTS = tiny_requests(6)
Open = Callable[..., EditSession]


@pytest.fixture
def open_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a session of emmet on a new tiny model in float64."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join(request.text for request in tiny_requests(80)) * 4, encoding="utf-8")

    def _open(**emmet: Any) -> EditSession:
        settings = {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 3, **emmet}
        return EditSession.open(
            tiny_model(dtype=torch.float64),
            SessionConfig(editor="emmet", settings={"emmet": settings}, corpus=str(corpus), corpus_tokens=2000),
        )

    return _open


def dense(changes: Changes) -> dict[str, torch.Tensor]:
    return {name: change.dense() for name, change in changes.items()}


@pytest.mark.parametrize(
    "emmet",
    [
        {},
        {"emmet_lambda": 0.5},
        {"emmet_lambda": 0.5, "mom2_update_weight": "auto"},
        {"emmet_lambda": 0.1, "update_norm_lambda": 0.3},
    ],
)
def test_the_rest_of_a_batch_is_what_it_would_have_been(open_session: Open, emmet: dict[str, Any]) -> None:
    """Against the editor itself, which is given the rest and its targets on the model of that time."""
    session = open_session(**emmet)
    session.edit(REQUESTS[:2])
    session.edit(REQUESTS[2:])
    first, whole = session.ledger.entries
    for gone in ({REQUESTS[2].id}, {REQUESTS[3].id, REQUESTS[5].id}):
        rows = whole.kept_rows(gone)
        found = session.solve_without(whole, LeftOut(frozenset((whole.batch, name) for name in gone)))[0].changes
        fresh = open_session(**emmet)
        fresh.edit(first.requests, known=first.known)
        rest = [whole.requests[row] for row in rows]
        fresh.edit(rest, known=whole.known)
        expected = fresh.ledger.entries[-1].changes
        for name, change in dense(expected).items():
            # Known targets ask for W k + δ, from which W k is taken away again: two roundings in float64.
            torch.testing.assert_close(found[name].dense(), change, rtol=1e-9, atol=1e-11)
            assert (found[name].dense() - whole.changes[name].dense()).abs().max() > 1e-6


def test_what_a_gate_scaled_stays_scaled(open_session: Open) -> None:
    session = open_session()
    session.edit(REQUESTS[:3])
    [entry] = session.ledger.entries
    editor = session._editor
    assert isinstance(editor, Resolves)
    halved = replace(entry, changes={name: change.scaled(0.5) for name, change in entry.changes.items()})
    whole, half = (editor.resolve(session.model, batch, [0, 2], session.context) for batch in (entry, halved))
    assert whole is not None
    assert half is not None
    for name, change in whole.changes.items():
        torch.testing.assert_close(half.changes[name].dense(), change.dense() / 2, rtol=1e-12, atol=0)


def test_several_layers_are_proposed_again(open_session: Open) -> None:
    session = open_session(layers=[0, 1])
    session.edit(REQUESTS[:2])
    session.edit(REQUESTS[2:5])
    before = {name: tensor.clone() for name, tensor in session.model.hf.state_dict().items()}
    first, second = session.ledger.entries
    editor = session._editor
    assert isinstance(editor, Resolves)
    assert editor.resolve(session.model, second, [0], session.context) is None
    found = session.solve_without(second, LeftOut(frozenset({(second.batch, REQUESTS[3].id)})))[0].changes
    fresh = open_session(layers=[0, 1])
    fresh.edit(first.requests, known=first.known)
    fresh.edit([REQUESTS[2], REQUESTS[4]], known=second.known)
    for name, change in dense(fresh.ledger.entries[-1].changes).items():
        torch.testing.assert_close(found[name].dense(), change, rtol=1e-6, atol=1e-9)
    after = session.model.hf.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
