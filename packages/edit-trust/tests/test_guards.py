"""Guards on a proposed change: the projection, the limit, and what undo and resume make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edit_trust.guards import guarded, limited, most_used_directions, projected
from edit_trust.hparams import TrustHParams
from editcore import DenseDelta, EditSession, FactoredDelta, VectorDelta
from editcore.testing import tiny_model, tiny_requests
from torch import Tensor

Open = Callable[..., EditSession]
FACTS = tiny_requests(6)
GUARDS = {"trust_project": 0.5, "trust_max_change": 0.05}


def random_matrix(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * torch.linspace(1, 9, columns)


def change_of(session: EditSession) -> Tensor:
    name = session.model.layout.weight_name(1)
    return sum((entry.changes[name].dense() for entry in session.ledger.history()), torch.zeros(()))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize("share", [0.5, 0.9, 1e-6])
def test_the_directions_are_those_of_spheres_definition(shape: tuple[int, int], share: float) -> None:
    """Eigenvectors of (1/d) Σ ŵŵᵀ over the normalised rows, from the largest on, while their sum is at most η."""
    weight = random_matrix(*shape)
    moment = np.zeros((shape[1], shape[1]))
    for row in weight.numpy():
        moment += np.outer(row, row) / (row @ row) / shape[0]
    values, vectors = np.linalg.eigh(moment)
    chosen: list[np.ndarray] = []
    total = 0.0
    for place in reversed(range(shape[1])):
        total += values[place]
        if total > share:  # the trace is 1
            break
        chosen.append(vectors[:, place])
    found = most_used_directions(weight, share=share)
    assert found.shape == (shape[1], len(chosen))
    expected = sum((np.outer(direction, direction) for direction in chosen), np.zeros_like(moment))
    np.testing.assert_allclose((found @ found.T).numpy(), expected, atol=1e-12)
    if share == 0.9:
        assert 1 < len(chosen) < min(shape)


def test_a_projected_change_keeps_what_is_at_right_angles_and_the_share_of_the_rest() -> None:
    left, right, weight = random_matrix(6, 3), random_matrix(3, 10), random_matrix(7, 10)
    directions = most_used_directions(weight, share=0.8)
    found = projected(FactoredDelta(left, right), directions, strength=0.3)
    assert isinstance(found, FactoredDelta)
    assert found.left is left
    along = directions @ directions.T
    expected = left @ right - 0.3 * (left @ right) @ along
    torch.testing.assert_close(found.dense(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.dense() @ directions, 0.7 * (left @ right) @ directions, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        projected(DenseDelta(left @ right), directions, strength=0.3).dense(), expected, rtol=1e-12, atol=1e-12
    )
    bias = VectorDelta(right[0])
    assert projected(bias, directions, strength=0.3) is bias


def test_a_long_change_is_scaled_to_the_limit_and_a_short_one_is_left() -> None:
    model = tiny_model(dtype=torch.float64)
    name, other_name = model.layout.weight_name(0), model.layout.weight_name(1)
    weight = model.weight(name).detach()
    length = float(weight.norm())
    left, right = random_matrix(weight.shape[0], 2), random_matrix(2, weight.shape[1])
    long = FactoredDelta(left, right * (0.4 * length / (left @ right).norm()))
    short = FactoredDelta(left, right * 1e-9)
    found = guarded(model, {name: long, other_name: short}, TrustHParams(trust_max_change=0.1))
    assert found is not None
    assert found.changes[name].norm() == pytest.approx(0.1 * length, rel=1e-9)
    torch.testing.assert_close(found.changes[name].dense(), long.dense() / 4, rtol=1e-9, atol=1e-12)
    assert found.changes[other_name] is short
    assert found.diagnostics == {"guard_scale": pytest.approx(0.25)}
    [note] = found.notes
    assert note == f"The change of {name} is 0.4 times as long as the weight; trust_max_change scales it to 0.1."
    assert limited(DenseDelta(left), 0.5).dense().equal(left / 2)
    assert guarded(model, {name: long}, TrustHParams()) is None


def test_what_is_written_is_the_editors_change_after_both_guards(open_session: Open) -> None:
    plain, session = open_session(plugins=()), open_session(trust=GUARDS)
    weight = plain.model.weight(plain.model.layout.weight_name(1)).detach().double().clone()
    for opened in (plain, session):
        opened.edit(FACTS[:2])
    directions = most_used_directions(weight, share=0.5)
    expected = change_of(plain) - 0.5 * change_of(plain) @ directions @ directions.T
    expected *= 0.05 * weight.norm() / expected.norm()
    torch.testing.assert_close(change_of(session), expected, rtol=1e-6, atol=1e-9)
    [entry] = session.ledger.batches
    assert entry.diagnostics["guard_scale"] < 1
    assert 0 < entry.diagnostics["guard_kept"] < 1
    assert entry.diagnostics["guard_directions"] == directions.shape[1] > 0
    assert any("trust_max_change" in note for note in entry.notes)


@pytest.mark.parametrize("own", [{}, {"memory": "keys", "emmet_lambda": 0.1}], ids=["resolve", "propose"])
@pytest.mark.parametrize("trust", [GUARDS, {**GUARDS, "trust_enable": False}], ids=["judged", "unjudged"])
def test_after_an_undo_the_rest_is_guarded_as_if_it_had_come_alone(
    open_session: Open, own: dict[str, Any], trust: dict[str, Any]
) -> None:
    session, alone = open_session(trust=trust, own=own), open_session(trust=trust, own=own)
    session.edit(FACTS[:4], batch_size=2)
    before = change_of(session)
    session.undo(FACTS[3].id)
    session.undo(FACTS[0].id)
    alone.edit(FACTS[1:2])
    name = alone.model.layout.weight_name(1)
    first = session.ledger.history()[0].changes[name].dense()
    torch.testing.assert_close(first, change_of(alone), rtol=1e-4, atol=1e-7)
    limit = 0.05 * alone.model.weight(name).detach().double().norm()
    assert all(entry.changes[name].norm() <= limit * 1.01 for entry in session.ledger.history())
    for fact in (FACTS[0], FACTS[3]):
        session.redo(fact.id)
    torch.testing.assert_close(change_of(session), before, rtol=0, atol=0)


def test_the_order_of_undoing_makes_no_difference(open_session: Open) -> None:
    results = []
    for order in ((FACTS[0], FACTS[3]), (FACTS[3], FACTS[0])):
        session = open_session(trust=GUARDS)
        session.edit(FACTS[:4], batch_size=2)
        for fact in order:
            session.undo(fact.id)
        results.append(change_of(session))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_resumed_run_guards_alike(open_session: Open, tmp_path: Path) -> None:
    whole = open_session(trust=GUARDS, directory=tmp_path / "whole")
    whole.edit(FACTS[:4], batch_size=2)
    part = open_session(trust=GUARDS, directory=tmp_path / "part")
    part.edit(FACTS[:2])
    part.close()
    resumed = open_session(trust=GUARDS, directory=tmp_path / "part")
    resumed.edit(FACTS[2:4])
    assert change_of(resumed).equal(change_of(whole))


def test_the_rest_of_a_scaled_batch_is_guarded_before_it_is_scaled(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([["too much"], []])  # whole, the batch breaks a limit; halved, it does not
    monkeypatch.setattr("edit_trust.measure.Measurement.failures", lambda *_args: next(answers))
    session = open_session(trust={"trust_max_change": 0.05, "trust_action": "scale", "trust_scale": 0.5})
    name = session.model.layout.weight_name(1)
    half = 0.5 * 0.05 * float(session.model.weight(name).detach().norm())
    session.edit(FACTS[:2])
    assert session.ledger.batches[0].scale == 0.5
    assert session.ledger.history()[0].changes[name].norm() == pytest.approx(half, rel=1e-6)
    session.undo(FACTS[0].id)
    assert session.ledger.history()[0].changes[name].norm() == pytest.approx(half, rel=1e-6)
