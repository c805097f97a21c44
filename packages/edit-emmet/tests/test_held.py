"""Keys of earlier facts that a batch leaves alone: what the solve does with them, and what the ledger keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import (
    BatchAddition,
    BeforeBatch,
    EditSession,
    HeldKey,
    NumericalError,
    PluginError,
    SessionConfig,
    hookimpl,
)
from editcore.ledger.ledger import Ledger
from editcore.ledger.states import LeftOut
from editcore.testing import tiny_model, tiny_requests
from torch import Tensor

REQUESTS = tiny_requests(6)
WEIGHT = 0.5
Open = Callable[..., EditSession]


class Holder:
    """Holds every key of the batches before, and replays the facts of the first one if asked to."""

    def __init__(self, *, weight: float = WEIGHT, replay: bool = False) -> None:
        self.weight, self.replay = weight, replay
        self.session: EditSession | None = None

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
        assert self.session is not None
        entries = self.session.ledger.entries
        if not entries:
            return None
        held = [
            HeldKey(batch=entry.batch, request_id=request.id, keys=entry.known[request.id].keys, weight=self.weight)
            for entry in reversed(entries)
            for request in entry.new_requests
        ]
        old = entries[0].new_requests if self.replay else ()
        known = {request.id: entries[0].known[request.id] for request in old}
        return BatchAddition(requests=old, weights=(1.0,) * len(old), known=known, held=held)


@pytest.fixture
def open_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a session of emmet on a new tiny model in float64, with a holder if one is given."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join(request.text for request in tiny_requests(80)) * 4, encoding="utf-8")

    def _open(holder: Holder | None = None, *, directory: Path | None = None, **emmet: Any) -> EditSession:
        settings = {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 3, **emmet}
        session = EditSession.open(
            tiny_model(dtype=torch.float64),
            SessionConfig(editor="emmet", settings={"emmet": settings}, corpus=str(corpus), corpus_tokens=2000),
            directory=directory,
        )
        if holder is not None:
            from editcore.plugins.extensions import lifecycle

            holder.session = session
            session._lifecycle = lifecycle({"holder": holder})
        return session

    return _open


def stacked(session: EditSession, batch: int, kind: str) -> Tensor:
    """Keys or values of what a batch wrote, ``[n, width]``."""
    entry = session.ledger.entries[batch]
    return torch.stack([next(iter(getattr(entry.known[request.id], kind).values())) for request in entry.new_requests])


@pytest.mark.parametrize("emmet", [{}, {"mom2_update_weight": 7.0}, {"emmet_lambda": 0.3, "update_norm_lambda": 0.2}])
def test_the_change_is_that_of_the_summed_second_moment(open_session: Open, emmet: dict[str, Any]) -> None:
    """R (KᵀC'⁻¹K + λI)⁻¹KᵀC'⁻¹ with C' = w(C + μ Σ kkᵀ) + rI, by dense inverses."""
    session = open_session(Holder(), calculate_objective_value=True, **emmet)
    session.edit(REQUESTS[:2])
    [result] = session.edit(REQUESTS[2:5])
    [delta] = result.proposal.changes.values()
    moment = session.context.statistics.moments([1])[1]
    old, keys = stacked(session, 0, "keys"), stacked(session, 1, "keys")
    weight, ridge = emmet.get("mom2_update_weight", 1.0), emmet.get("update_norm_lambda", 0.0)
    metric = weight * (moment + WEIGHT * old.T @ old) + ridge * torch.eye(len(moment), dtype=torch.float64)
    inverse = torch.linalg.inv(metric)
    system = keys @ inverse @ keys.T + emmet.get("emmet_lambda", 0.0) * torch.eye(len(keys), dtype=torch.float64)
    expected = delta.left @ torch.linalg.inv(system) @ keys @ inverse
    torch.testing.assert_close(delta.dense(), expected, rtol=1e-6, atol=1e-9)
    change = (old @ delta.dense().T).square().sum(1).mean()
    assert result.proposal.diagnostics["layer_1_held_change"] == pytest.approx(float(change), rel=1e-6)


@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_held_facts_are_changed_less(open_session: Open, layers: list[int]) -> None:
    changes = []
    for weight in (0.0, 100.0):
        session = open_session(Holder(weight=weight), layers=layers)
        session.edit(REQUESTS[:2])
        [result] = session.edit(REQUESTS[2:5])
        [first] = [entry for entry in session.ledger.entries if entry.batch == 0]
        total = 0.0
        for name, delta in result.proposal.changes.items():
            old = torch.stack([first.known[request.id].keys[name] for request in REQUESTS[:2]])
            total += float((old @ delta.dense().T).norm())
        changes.append(total)
    assert changes[1] < 0.2 * changes[0]


def test_the_ledger_keeps_references_and_gives_the_keys_back(open_session: Open, tmp_path: Path) -> None:
    session = open_session(Holder(), directory=tmp_path / "run")
    session.edit(REQUESTS, batch_size=2)
    read = Ledger.read(tmp_path / "run").entries
    assert [len(entry.held) for entry in read] == [0, 2, 4]
    assert [(key.batch, key.request_id, key.weight) for key in read[2].held] == [
        (key.batch, key.request_id, key.weight) for key in session.ledger.entries[2].held
    ]
    for found, expected in zip(read[2].held, session.ledger.entries[2].held, strict=True):
        assert found.keys.keys() == expected.keys.keys()
        assert all(torch.equal(found.keys[name], key) for name, key in expected.keys.items())
    sizes = [path.stat().st_size for path in sorted((tmp_path / "run" / "deltas").iterdir())]
    assert max(sizes) == min(sizes), "no batch has keys of another in its file"


@pytest.mark.parametrize("layers", [[1], [0, 1]])
@pytest.mark.parametrize("replay", [False, True])
def test_a_batch_without_one_of_its_facts_still_leaves_the_keys_alone(
    open_session: Open, tmp_path: Path, layers: list[int], replay: bool
) -> None:
    """Undone, in this session or a later one, it is what the editor would have solved for the rest at the time."""
    session = open_session(Holder(replay=replay), directory=tmp_path / "run", layers=layers)
    session.edit(REQUESTS[:2])
    session.edit(REQUESTS[2:5])
    first, whole = session.ledger.entries
    gone = LeftOut(frozenset({(whole.batch, REQUESTS[3].id)}))
    found = session.solve_without(whole, gone)[0].changes
    reopened = open_session(directory=tmp_path / "run", layers=layers)
    again = reopened.solve_without(reopened.ledger.entries[1], gone)[0].changes
    fresh = open_session(Holder(replay=replay), layers=layers)
    fresh.edit(first.requests, known=first.known)
    fresh.edit([REQUESTS[2], REQUESTS[4]], known=whole.known)
    for name, delta in fresh.ledger.entries[1].changes.items():
        torch.testing.assert_close(found[name].dense(), delta.dense(), rtol=1e-8, atol=1e-10)
        assert torch.equal(again[name].left, found[name].left)
        assert torch.equal(again[name].right, found[name].right)


def test_an_undone_fact_stays_held_by_the_batches_that_held_it(open_session: Open) -> None:
    """Later batches stay as they were solved; redone, everything has its first bits."""
    session = open_session(Holder())
    session.edit(REQUESTS, batch_size=2)
    before = {name: tensor.clone() for name, tensor in session.model.hf.state_dict().items()}
    session.undo(REQUESTS[0].id)
    assert REQUESTS[0].id in {key.request_id for key in session.ledger.history()[-1].held}
    session.redo(REQUESTS[0].id)
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.hf.state_dict().items())


def test_a_key_that_the_ledger_does_not_have_is_refused(open_session: Open) -> None:
    class Stranger(Holder):
        @hookimpl
        def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
            return BatchAddition(held=[HeldKey(batch=5, request_id="x", keys={}, weight=1.0)])

    session = open_session(Stranger())
    with pytest.raises(PluginError, match="holds the key of 'x' of batch 5, which the ledger does not have"):
        session.edit(REQUESTS[:1])
    assert session.ledger.batches == []


def test_a_key_of_another_width_is_refused(open_session: Open) -> None:
    class Narrow(Holder):
        @hookimpl
        def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
            name = event.model.layout.weight_name(1)
            keys = {name: torch.ones(3, dtype=torch.float64)}
            return BatchAddition(held=[HeldKey(batch=0, request_id="x", keys=keys, weight=1.0)])

    with pytest.raises(NumericalError, match=r"key of 'x' \(batch 0\) has the shape \[3\], but .* takes 64 numbers"):
        open_session(Narrow()).edit(REQUESTS[:1])


def test_nearly_dependent_keys_are_reported_with_the_figure(open_session: Open, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        session = open_session(warn_condition=1.001)
        [result] = session.edit(REQUESTS[:3])
    condition = result.proposal.diagnostics["layer_1_condition"]
    [note] = [note for note in result.proposal.notes if "condition number" in note]
    assert f"{condition:.1e}" in note
    assert "tikhonov" in note
    assert note in caplog.text
