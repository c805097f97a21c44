"""Replay in a session: earlier facts hold, cost nothing, and come back the same after an interruption."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_replay.extension import ReplayExtension
from editcore import (
    BeforeBatch,
    EditBatch,
    EditRequest,
    EditSession,
    KnownTarget,
    PluginError,
    Plugins,
    RunError,
    UnknownNameError,
)
from editcore.testing import tiny_model, tiny_requests

Open = Callable[..., EditSession]
ReplayOf = Callable[[EditSession], ReplayExtension]

REQUESTS = tiny_requests(12)


def worst_miss(session: EditSession, known: dict[str, KnownTarget]) -> float:
    """Largest ‖W k - v‖ / ‖v‖ over facts and weights."""
    misses = [
        (session.model.projection(session.model.layout.layer_of(name))(target.keys[name]) - value).norm() / value.norm()
        for target in known.values()
        for name, value in target.values.items()
    ]
    return float(torch.stack(misses).max())


def first_solved(session: EditSession) -> dict[str, KnownTarget]:
    """By request id: key and value as of the batch that edited the fact."""
    return {
        request.id: entry.known[request.id]
        for entry in session.ledger.entries
        for request in entry.requests[: entry.num_new]
    }


def replayed_ids(session: EditSession) -> list[list[str]]:
    return [[request.id for request in entry.requests[entry.num_new :]] for entry in session.ledger.entries]


def test_replayed_facts_hold_their_first_values(open_session: Open) -> None:
    session = open_session(replay={"replay_rate": 4})
    session.edit(REQUESTS, batch_size=3)
    assert [len(ids) for ids in replayed_ids(session)] == [0, 3, 6, 9]
    assert worst_miss(session, first_solved(session)) < 1e-6


def test_without_replay_they_drift(open_session: Open) -> None:
    session = open_session(replay={"replay_rate": 0})
    session.edit(REQUESTS, batch_size=3)
    assert replayed_ids(session) == [[]] * 4
    assert worst_miss(session, first_solved(session)) > 1e-3


def test_replay_costs_no_optimisation(open_session: Open) -> None:
    session = open_session(replay={"replay_rate": 1})
    first, second = session.edit(REQUESTS[:4], batch_size=2)
    assert [evidence.replayed for evidence in second.proposal.evidence] == [False, False, True, True]
    assert all(not {"steps", "target_loss"} & figure.figures.keys() for figure in second.proposal.evidence[2:])
    assert all("target_loss" in figure.figures for figure in first.proposal.evidence)


def test_several_layers_replay_too(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_rate": 3}, emmet={"layers": [0, 1]})
    session.edit(REQUESTS[:9], batch_size=3)
    # Keys of layer 1 moved when layer 0 changed: the buffer has them as of the last batch.
    latest = {record.request.id: record.known for record in replay_of(session).buffer.records}
    assert worst_miss(session, latest) < 1e-6
    assert worst_miss(session, first_solved(session)) > 1e-3


def test_values_stay_those_first_solved_for_to_the_bit(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_rate": 4})
    session.edit(REQUESTS, batch_size=3)
    first = first_solved(session)
    for record in replay_of(session).buffer.records:
        for name, value in record.known.values.items():
            assert torch.equal(value, first[record.request.id].values[name])
    counts = [record.access_count for record in replay_of(session).buffer.records]
    assert counts == [3] * 3 + [2] * 3 + [1] * 3 + [0] * 3


def test_a_heavier_weight_brings_replayed_facts_closer(open_session: Open) -> None:
    misses = []
    for weight in (0.1, 1.0, 10.0):
        session = open_session(
            replay={"replay_rate": 3, "replay_weight": weight},
            emmet={"emmet_lambda": 0.1, "calculate_objective_value": True},
        )
        result = session.edit(REQUESTS[:6], batch_size=3)[-1]
        assert result.batch.weights == (1.0,) * 3 + (weight,) * 3
        misses.append(result.proposal.diagnostics["layer_1_old_edit_distance"])
    assert misses[0] > 1.5 * misses[1] > 1.5 * 1.5 * misses[2] > 0


def test_weights_have_no_effect_on_constraints(open_session: Open) -> None:
    results = []
    for weight in (0.1, 10.0):
        session = open_session(replay={"replay_rate": 3, "replay_weight": weight})
        results.append(session.edit(REQUESTS[:6], batch_size=3)[-1].proposal.changes)
    for name, delta in results[0].items():
        assert torch.equal(delta.dense(), results[1][name].dense())


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.0, [0, 0, 0]), (0.3, [0, 2, 2]), (0.5, [0, 2, 2]), (1.5, [0, 4, 6]), (9.0, [0, 4, 8])],
)
def test_the_rate_is_rounded_up_and_bounded_by_the_buffer(open_session: Open, rate: float, expected: list[int]) -> None:
    session = open_session(replay={"replay_rate": rate})
    session.edit(REQUESTS, batch_size=4)
    assert [len(ids) for ids in replayed_ids(session)] == expected


def test_a_fact_edited_anew_is_replaced_not_replayed(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_rate": 9})
    session.edit(REQUESTS[:3])
    again = EditRequest(subject=REQUESTS[0].subject, prompt=REQUESTS[0].prompt, target_new="Oslo")
    session.edit([again])
    assert sorted(replayed_ids(session)[-1]) == sorted(request.id for request in REQUESTS[1:3])
    kept = [record.request for record in replay_of(session).buffer.records]
    assert kept == [*REQUESTS[1:3], again]
    assert replay_of(session).statistics()["replacements"] == 1


@pytest.mark.parametrize("strategy", ["random", "priority", "recent"])
@pytest.mark.parametrize("eviction", ["fifo", "lru"])
def test_a_resumed_run_goes_on_as_if_uninterrupted(
    open_session: Open, replay_of: ReplayOf, tmp_path: Path, strategy: str, eviction: str
) -> None:
    replay = {
        "replay_rate": 0.7,
        "replay_buffer_size": 5,
        "replay_strategy": strategy,
        "replay_eviction": eviction,
    }
    whole = open_session(replay=replay, seed=7)
    whole.edit(REQUESTS, batch_size=3)

    interrupted = open_session(replay=replay, seed=7, directory=tmp_path / "run")
    interrupted.edit(REQUESTS[:9], batch_size=3)
    statistics = replay_of(interrupted).statistics()
    resumed = open_session(replay=replay, seed=7, directory=tmp_path / "run")
    assert replay_of(resumed).statistics() == statistics
    resumed.edit(REQUESTS[9:], batch_size=3)

    assert replayed_ids(resumed) == replayed_ids(whole)
    assert replay_of(resumed).statistics() == replay_of(whole).statistics()
    for name, delta in whole.ledger.entries[-1].changes.items():
        resumed_delta = resumed.ledger.entries[-1].changes[name]
        assert torch.equal(delta.left, resumed_delta.left)
        assert torch.equal(delta.right, resumed_delta.right)


def test_the_seed_decides_what_is_replayed(open_session: Open) -> None:
    def run(seed: int) -> list[list[str]]:
        session = open_session(replay={"replay_rate": 0.5}, seed=seed)
        session.edit(REQUESTS, batch_size=2)
        return replayed_ids(session)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_batches_draw_independently(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_rate": 3})
    session.edit(REQUESTS[:9])
    drawn = set()
    for index in range(5):
        batch = EditBatch.of(REQUESTS[9:10], index=index)
        addition = replay_of(session).editcore_before_batch(BeforeBatch(model=session.model, batch=batch))
        assert addition is not None
        drawn.add(tuple(request.id for request in addition.requests))
    assert len(drawn) > 1


def test_priority_replays_what_the_model_holds_least(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_rate": 0.5, "replay_strategy": "priority"})
    session.edit(REQUESTS[:9], batch_size=3)
    records = {record.request.id: record for record in replay_of(session).buffer.records}
    strengths = sorted((record.strength, name) for name, record in records.items() if record.strength is not None)
    assert 0 <= strengths[0][0] < 0.999 < strengths[-1][0] <= 1
    session.edit(REQUESTS[9:12])
    assert sorted(replayed_ids(session)[-1]) == sorted(name for _, name in strengths[:2])


def test_statistics_for_results(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_rate": 1, "replay_buffer_size": 4})
    assert replay_of(session).statistics() == {
        "size": 0,
        "unique_subjects": 0,
        "hits": 0,
        "refreshed": 0,
        "failed": 0,
        "evictions": 0,
        "replacements": 0,
        "capacity": 4,
        "mean_strength": None,
        "least_strength": None,
        "mean_success": None,
    }
    session.edit(REQUESTS[:9], batch_size=3)
    found = replay_of(session).statistics()
    assert (found["size"], found["hits"], found["evictions"]) == (4, 6, 5)
    assert isinstance(found["mean_strength"], float)


def test_what_another_extension_added_is_not_counted(open_session: Open, replay_of: ReplayOf) -> None:
    session = open_session(replay={"replay_rate": 1})
    session.edit(REQUESTS[:2])
    extension = replay_of(session)
    entry = session.ledger.entries[0]
    stranger = EditRequest(subject="Nobody", prompt="{} is", target_new="x", id="stranger")
    extension._absorb(
        replace(
            entry,
            batch=1,
            requests=(REQUESTS[3], stranger),
            num_new=1,
            known={REQUESTS[3].id: entry.known[REQUESTS[0].id]},
        )
    )
    assert extension.statistics()["hits"] == 0
    assert extension.statistics()["size"] == 3


def test_a_history_of_another_model_is_refused(open_session: Open, replay_of: ReplayOf, tmp_path: Path) -> None:
    session = open_session()
    session.edit(REQUESTS[:2])
    with pytest.raises(RunError, match=r"64 and 32 wide, but .* takes 48 and gives 32: they come from another model"):
        replay_of(session)._check(tiny_model(config={"intermediate_size": 48}))


def test_an_unknown_strategy_is_named_before_anything_runs(open_session: Open) -> None:
    with pytest.raises(UnknownNameError, match=r"'recant'. Available: priority, random, recent. Did you mean 'recent'"):
        open_session(replay={"replay_strategy": "recant"})


# Strategies of other packages


@pytest.fixture
def with_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Plugins]:
    """Installs a package that offers the strategy ``oldest``, with the given body, beside what is installed."""

    def install(body: str, *, target: str = "oldest") -> Plugins:
        site = tmp_path / "site"
        info = site / "my_strategies-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-strategies\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text("[editcore]\nmine = my_strategies\n", encoding="utf-8")
        (site / "my_strategies.py").write_text(
            "from editcore import ComponentSpec, hookimpl\n"
            "@hookimpl\n"
            "def editcore_components():\n"
            f"    return [ComponentSpec('oldest', 'my_strategies:{target}', kind='replay.strategy', summary='Old.')]\n"
            f"def oldest(records, count, rng):\n    {body}\n",
            encoding="utf-8",
        )
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "my_strategies", raising=False)
        return Plugins.load(entry_points=importlib.metadata.entry_points(group="editcore"))

    return install


def with_oldest(open_session: Open, registry: Plugins, *, edits: Sequence[EditRequest] = REQUESTS) -> EditSession:
    session = open_session(replay={"replay_strategy": "oldest", "replay_rate": 0.5}, registry=registry)
    session.edit(edits, batch_size=4)
    return session


def test_another_package_adds_a_strategy(open_session: Open, with_package: Any) -> None:
    session = with_oldest(open_session, with_package("return list(records[:count])"))
    ids = [request.id for request in REQUESTS]
    assert replayed_ids(session) == [[], ids[:2], ids[:2]]


@pytest.mark.parametrize(
    "body", ["return list(records)", "return [records[0]] * count", "import copy; return [copy.copy(records[0])]"]
)
def test_a_strategy_that_returns_something_else_is_named(open_session: Open, with_package: Any, body: str) -> None:
    with pytest.raises(PluginError, match=r"replay\.strategy 'oldest' must return at most 2 different ones of the 4"):
        with_oldest(open_session, with_package(body))


def test_a_strategy_that_cannot_be_loaded_is_named(open_session: Open, with_package: Any) -> None:
    registry = with_package("return []", target="latest")
    with pytest.raises(PluginError, match=r"Cannot load 'my_strategies:latest'"):
        with_oldest(open_session, registry)


def test_a_strategy_may_return_fewer(open_session: Open, with_package: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        session = with_oldest(open_session, with_package("return records[:1]"))
    assert [len(ids) for ids in replayed_ids(session)] == [0, 1, 1]
