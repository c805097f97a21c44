"""What joins a batch in each mode, what it costs, and how targets are kept fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_replay.buffer import EditRecord
from edit_replay.extension import ReplayExtension
from editcore import EditorSpec, EditRequest, EditSession, NumericalError, Plugins
from editcore.evaluation import score_targets
from editcore.testing import tiny_requests

Open = Callable[..., EditSession]
ReplayOf = Callable[[EditSession], ReplayExtension]

REQUESTS = tiny_requests(12)


def old_change(session: EditSession) -> float:
    """Largest ‖Δk‖ of the last batch over the facts of the first one, at their keys of then."""
    first, last = session.ledger.entries[0], session.ledger.entries[-1]
    return max(
        float((delta.dense() @ first.known[request.id].keys[name]).norm())
        for request in first.new_requests
        for name, delta in last.changes.items()
    )


def held(session: EditSession) -> list[list[str]]:
    return [[key.request_id for key in entry.held] for entry in session.ledger.entries]


def replayed(session: EditSession) -> list[list[str]]:
    return [[request.id for request in entry.requests[entry.num_new :]] for entry in session.ledger.entries]


# Which facts, in which mode


def test_statistics_hold_every_earlier_fact_and_replay_none(open_session: Open) -> None:
    session = open_session(replay={"replay_mode": "statistics", "replay_rate": 9})
    session.edit(REQUESTS[:9], batch_size=3)
    ids = [request.id for request in REQUESTS]
    assert replayed(session) == [[], [], []]
    assert [sorted(names) for names in held(session)] == [[], sorted(ids[:3]), sorted(ids[:6])]
    assert all(key.weight == 0.002 for entry in session.ledger.entries for key in entry.held)


def test_requests_hold_none(open_session: Open) -> None:
    session = open_session(replay={"replay_mode": "requests", "replay_rate": 1})
    session.edit(REQUESTS[:6], batch_size=3)
    assert held(session) == [[], []]


def test_both_hold_what_they_do_not_replay(open_session: Open) -> None:
    session = open_session(replay={"replay_mode": "both", "replay_rate": 0.5})
    session.edit(REQUESTS, batch_size=4)
    ids = {request.id for request in REQUESTS}
    for number, (ours, theirs) in enumerate(zip(replayed(session), held(session), strict=True)):
        assert len(ours) == (2 if number else 0)
        assert not set(ours) & set(theirs)
        assert set(ours) | set(theirs) == {request.id for request in REQUESTS[: 4 * number]} & ids


def test_left_out_the_rate_is_zero_where_all_keys_are_held(open_session: Open) -> None:
    session = open_session(replay={"replay_mode": "both"})
    session.edit(REQUESTS[:6], batch_size=3)
    assert replayed(session) == [[], []]
    assert [len(names) for names in held(session)] == [0, 3]


def test_an_editor_that_cannot_hold_keys_gets_facts_instead(
    open_session: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    specs = Plugins.editor

    def without(plugins: Plugins, name: str) -> EditorSpec:
        spec = specs(plugins, name)
        return replace(spec, capabilities=replace(spec.capabilities, uses_held=False))

    monkeypatch.setattr(Plugins, "editor", without)
    session = open_session(replay={"replay_mode": "both"})
    session.edit(REQUESTS[:6], batch_size=3)
    assert [len(names) for names in replayed(session)] == [0, 2]
    assert held(session) == [[], []]
    assert "held keys" not in caplog.text


def test_statistics_change_old_facts_less_than_no_replay(open_session: Open) -> None:
    changes = []
    for weight in (0.0, 1.0, 1000.0):
        session = open_session(replay={"replay_mode": "statistics", "replay_statistics_weight": weight})
        session.edit(REQUESTS[:9], batch_size=3)
        changes.append(old_change(session))
    assert changes[0] > changes[1] > changes[2]
    assert changes[2] < 0.2 * changes[0]


@pytest.mark.parametrize("mode", ["requests", "statistics", "both"])
def test_a_subject_that_is_edited_anew_is_neither_replayed_nor_held(
    open_session: Open, replay_of: ReplayOf, mode: str
) -> None:
    """Its key would stand in the way of the very update that the batch is about."""
    session = open_session(replay={"replay_mode": mode, "replay_rate": 9, "replay_duplicates": "subject"})
    session.edit(REQUESTS[:3])
    new_fact = EditRequest(subject=REQUESTS[0].subject, prompt="{} was seen in", target_new="Oslo")
    session.edit([new_fact])
    found = {*replayed(session)[-1], *held(session)[-1]} - {REQUESTS[0].id}  # the session adds it, as a fact
    assert found == {request.id for request in REQUESTS[1:3]}
    assert REQUESTS[0].id not in held(session)[-1]
    assert [record.request for record in replay_of(session).buffer.records] == [*REQUESTS[1:3], new_fact]
    assert replay_of(session).statistics()["replacements"] == 1


def test_by_fact_a_subject_may_have_several_facts(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_rate": 9})
    session.edit(REQUESTS[:3])
    new_fact = EditRequest(subject=REQUESTS[0].subject, prompt="{} was seen in", target_new="Oslo")
    session.edit([new_fact])
    assert len(replayed(session)[-1]) == 3
    assert len(replay_of(session).buffer) == 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 2, 2]),  # 0.5 · √(4 · 4) = 2, 0.5 · √(4 · 8) = 2.8 of at most 2
        ({"adaptive_max": 100}, [0, 2, 3]),
        ({"adaptive_max": 100, "replay_rate": 2.0}, [0, 4, 8]),  # no more than there are
        ({"adaptive_min": 4, "adaptive_max": 5, "replay_rate": 0.1}, [0, 4, 4]),
        ({"adaptive_min": 0, "replay_rate": 0.0}, [0, 0, 0]),
    ],
)
def test_adaptive_merging_follows_buffer_and_batch_within_bounds(
    open_session: Open, settings: dict[str, Any], expected: list[int]
) -> None:
    session = open_session(replay={"replay_adaptive": True, "adaptive_max": 2, **settings})
    session.edit(REQUESTS, batch_size=4)
    assert [len(names) for names in replayed(session)] == expected


@pytest.mark.parametrize("mode", ["statistics", "both"])
@pytest.mark.parametrize("check", ["value", "model"])
def test_a_resumed_run_holds_and_measures_the_same(
    open_session: Open, replay_of: ReplayOf, tmp_path: Path, mode: str, check: str
) -> None:
    replay = {
        "replay_mode": mode,
        "replay_strategy": "priority",
        "replay_buffer_size": 5,
        "replay_check": check,
        "replay_refresh": 0.4,
        "replay_adaptive": True,
    }
    whole = open_session(replay=replay)
    whole.edit(REQUESTS, batch_size=3)
    interrupted = open_session(replay=replay, directory=tmp_path / "run")
    interrupted.edit(REQUESTS[:6], batch_size=3)
    resumed = open_session(replay=replay, directory=tmp_path / "run")
    assert replay_of(resumed).statistics() == replay_of(interrupted).statistics()
    resumed.edit(REQUESTS[6:], batch_size=3)
    assert (replayed(resumed), held(resumed)) == (replayed(whole), held(whole))
    assert replay_of(resumed).statistics() == replay_of(whole).statistics()
    for name, delta in whole.ledger.entries[-1].changes.items():
        assert torch.equal(resumed.ledger.entries[-1].changes[name].dense(), delta.dense())


@pytest.mark.parametrize("mode", ["statistics", "both"])
def test_what_is_undone_is_no_longer_held(open_session: Open, replay_of: ReplayOf, mode: str) -> None:
    session = open_session(replay={"replay_mode": mode})
    session.edit(REQUESTS[:6], batch_size=3)
    before = replay_of(session).statistics()
    session.undo(REQUESTS[1].id)
    session.edit(REQUESTS[6:9])
    assert REQUESTS[1].id not in held(session)[-1] + replayed(session)[-1]
    session.undo(batches=[2])
    session.redo(REQUESTS[1].id)
    assert replay_of(session).statistics() == before


# What it costs


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Rows and layers of every forward pass that looks for keys."""
    from editcore.models.capture import LayerByLayerCapture

    found: list[tuple[int, list[int]]] = []
    original = LayerByLayerCapture.capture

    def capture(self: LayerByLayerCapture, rows: Any, layers: Any) -> Any:
        # Names of the value optimisation's own look at h₀ are numbers, those of a batch's facts are not.
        if not any(isinstance(name, int) for name in rows):
            found.append((len(rows), list(layers)))
        return original(self, rows, layers)

    monkeypatch.setattr(LayerByLayerCapture, "capture", capture)
    return found


def test_a_replayed_fact_of_one_layer_needs_no_forward_pass(
    open_session: Open, looks: list[tuple[int, list[int]]], replay_of: ReplayOf
) -> None:
    session = open_session(replay={"replay_rate": 4})
    session.edit(REQUESTS[:6], batch_size=3)
    assert looks == [(3, [1]), (3, [1])]
    first = session.ledger.entries[0].known
    for record in replay_of(session).buffer.records[:3]:
        assert record.access_count == 1
        assert all(torch.equal(key, first[record.request.id].keys[name]) for name, key in record.known.keys.items())


def test_with_several_layers_only_the_upper_ones_are_looked_at_again(
    open_session: Open, looks: list[tuple[int, list[int]]]
) -> None:
    session = open_session(replay={"replay_rate": 4}, emmet={"layers": [0, 1]})
    session.edit(REQUESTS[:6], batch_size=3)
    assert looks == [(3, [0, 1]), (3, [1]), (3, [0, 1]), (6, [1])]


def test_a_kept_key_is_what_a_forward_pass_gives(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with every key measured anew."""
    from editcore.locate_then_edit import LocateThenEdit

    changes = []
    for measured in (False, True):
        if measured:
            monkeypatch.setattr(LocateThenEdit, "_keys_stay", lambda *_: False)
        session = open_session(replay={"replay_rate": 4})
        session.edit(REQUESTS[:9], batch_size=3)
        changes.append([delta.dense() for delta in session.ledger.entries[-1].changes.values()])
    for found, expected in zip(*changes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# Targets that no longer serve


def success(session: EditSession, record: EditRecord) -> float:
    [score] = score_targets(session.model, [record.request.text], [record.request.target_new])
    return float(torch.tensor(-score.nll).exp())


def test_a_target_that_no_longer_makes_the_model_say_it_is_optimised_anew(
    open_session: Open, replay_of: ReplayOf
) -> None:
    """The layer above changes, so that the values hold and the model says some targets less than it did."""
    session = open_session(replay={"replay_rate": 4, "replay_refresh": 0.5}, emmet={"v_num_grad_steps": 40})
    session.edit(REQUESTS[:6])
    before = {record.request.id: record for record in replay_of(session).buffer.records}
    reached = {figure.request_id: figure.figures["target_probability"] for figure in session.ledger.entries[0].evidence}
    assert {name: record.reached for name, record in before.items()} == reached
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, weight in session.model.hf.named_parameters():
            if ".layers.2.mlp" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator).to(weight))
    failing = {name for name, record in before.items() if success(session, record) < 0.5 * (record.reached or 0.0)}
    assert 0 < len(failing) < len(before)
    [result] = session.edit(REQUESTS[6:9])
    evidence = {figure.request_id: figure for figure in result.proposal.evidence}
    records = {record.request.id: record for record in replay_of(session).buffer.records}
    for name, old in before.items():
        anew = "target_loss" in evidence[name].figures
        assert anew == (name in failing)
        assert records[name].reached == (evidence[name].figures["target_probability"] if anew else old.reached)
        weight = next(iter(old.known.values))
        assert torch.equal(records[name].known.values[weight], old.known.values[weight]) != anew
    assert replay_of(session).statistics()["refreshed"] == len(failing)
    assert min(record.strength or 0.0 for record in records.values()) > 1 - 1e-6, "old and new values hold"


def test_a_value_that_has_drifted_is_aimed_at_again_and_not_optimised(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_rate": 4, "replay_refresh": 1.0, "replay_drift": 1e-3})
    session.edit(REQUESTS[:3])
    name = session.model.layout.weight_name(1)
    with torch.no_grad():
        session.model.weight(name).mul_(0.8)
    extension = replay_of(session)
    extension._check(session.model)
    assert all(record.strength is not None and record.strength < 0.99 for record in extension.buffer.records)
    [result] = session.edit(REQUESTS[3:6])
    assert all("target_loss" not in figure.figures for figure in result.proposal.evidence[3:])
    assert extension.statistics()["refreshed"] == 0


def test_facts_of_layers_drawn_at_random_are_replayed_too(open_session: Open, replay_of: ReplayOf) -> None:
    """A fact that was written at another layer is optimised at this one, for which there is no value of it."""
    session = open_session(
        replay={"replay_rate": 4, "replay_mode": "both"}, emmet={"layers": [0, 1], "layer_selection": "random"}
    )
    session.edit(REQUESTS, batch_size=2)
    drawn = {next(iter(entry.changes)) for entry in session.ledger.entries}
    assert len(drawn) == 2
    assert replay_of(session).statistics()["refreshed"]
    assert any(len(record.known.values) == 2 for record in replay_of(session).buffer.records)


# Checks


def test_success_measured_on_the_model_decides_priority(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_check": "model", "replay_strategy": "priority", "replay_rate": 0.5})
    session.edit(REQUESTS[:8], batch_size=4)
    records = replay_of(session).buffer.records
    measured = {record.request.id: success(session, record) for record in records}
    for record in records:
        assert record.success == pytest.approx(measured[record.request.id], rel=1e-6)
        assert record.priority == pytest.approx(1 - measured[record.request.id], rel=1e-6)
    worst = sorted(measured, key=lambda name: measured[name])[:2]
    session.edit(REQUESTS[8:])
    assert sorted(replayed(session)[-1]) == sorted(worst)
    assert isinstance(replay_of(session).statistics()["mean_success"], float)


def test_importance_comes_from_tags(open_session: Open, replay_of: ReplayOf) -> None:
    tags = [("a",), ("a", "b"), ()]
    tagged = [request.model_copy(update={"tags": found}) for request, found in zip(REQUESTS[:3], tags, strict=True)]
    session = open_session(replay={"replay_importance": {"a": 2.0, "b": 3.0}})
    session.edit(tagged)
    records = replay_of(session).buffer.records
    assert [record.importance for record in records] == [2.0, 6.0, 1.0]
    assert [r.priority for r in records] == [r.importance * (1 - (r.strength or 0.0)) for r in records]


# Keys and values of another model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("keys", r"The stored key of '.*' has the shape \[3\], but"),
        ("values", r"The stored value of '.*' has the shape"),
    ],
)
def test_a_kept_key_or_value_of_another_width_is_refused(
    open_session: Open, replay_of: ReplayOf, kind: str, message: str
) -> None:
    session = open_session(replay={"replay_rate": 4})
    session.edit(REQUESTS[:1])
    buffer = replay_of(session).buffer
    [record] = buffer.records
    narrow = {name: torch.ones(3, dtype=torch.float64) for name in record.known.keys}
    buffer._put(replace(record, known=replace(record.known, **{kind: narrow})))
    with pytest.raises(NumericalError, match=message):
        session.edit(REQUESTS[1:2])
    assert len(session.ledger.entries) == 1


# Weights


@pytest.mark.parametrize("editor", ["emmet", "memit"])
def test_weights_are_those_of_weighted_least_squares(open_session: Open, editor: str) -> None:
    """min Σ wᵢ ‖Δkᵢ − rᵢ‖² + λ tr(Δ C' Δᵀ) by its normal equations, for the batch that replay has joined."""
    weight, ridge, moment_weight = 7.0, {"emmet": 0.2, "memit": 1.0}[editor], 3.0
    options = {"mom2_update_weight": moment_weight, **({"emmet_lambda": ridge} if editor == "emmet" else {})}
    session = open_session(replay={"replay_rate": 4, "replay_weight": weight}, editor=editor, hparams=options)
    session.edit(REQUESTS[:6], batch_size=3)
    entry = session.ledger.entries[-1]
    [(name, delta)] = entry.changes.items()
    keys = torch.stack([entry.known[request.id].keys[name] for request in entry.requests])
    weights = torch.tensor([1.0] * 3 + [weight] * 3, dtype=torch.float64)
    moment = moment_weight * session.context.statistics.moments([1])[1]
    weighted = weights[:, None] * keys
    system = keys.T @ weighted + ridge * moment
    expected = torch.linalg.solve(system, weighted.T @ delta.left.T).T
    torch.testing.assert_close(delta.dense(), expected, rtol=1e-6, atol=1e-9)
