"""Undo in any order: the model is a function of what is active, to the bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_replay.extension import ReplayExtension
from editcore import EditSession, KnownTarget, LanguageModel, RunError, SessionConfig
from editcore.ledger.ledger import Ledger
from editcore.runs.backends import RawBackend
from editcore.testing import tiny_model, tiny_requests
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

FACTS = tiny_requests(12)
BATCH = 3


class World:
    """Sessions on one tiny model, with targets that were optimised once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_model()
        self.base = bits(self.model)
        words = " ".join(request.text for request in tiny_requests(80)).split()
        (folder / "corpus.txt").write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
        session = self.open()
        session.edit(FACTS)
        self.known: Mapping[str, KnownTarget] = session.ledger.entries[0].known
        session.close()

    def open(self, *, directory: Path | None = None, plugins: tuple[str, ...] = (), **emmet: Any) -> EditSession:
        return EditSession.open(
            self.model,
            SessionConfig(
                editor="emmet",
                plugins=plugins,
                settings={
                    "emmet": {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 3, **emmet},
                    **({"replay": {"replay_rate": 1.0}} if "replay" in plugins else {}),
                },
                corpus=str(self.folder / "corpus.txt"),
                corpus_tokens=1024,
            ),
            directory=directory,
        )

    def edited(self, **options: Any) -> EditSession:
        """A session with all facts, in batches of three."""
        session = self.open(**options)
        session.edit(FACTS, batch_size=BATCH, known=self.known)
        return session


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(folder / "cache"))
        yield World(folder)


def bits(model: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def built(ledger: Ledger) -> dict[str, Tensor]:
    """A new model with what is active."""
    model = tiny_model()
    backend = RawBackend()
    backend.open(model)
    for written in ledger.active():
        backend.apply(written.changes)
    return bits(model)


Step = tuple[str, list[int]]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["edit", "undo", "redo", "undo batch", "redo batch"]),
        st.lists(st.integers(0, len(FACTS) - 1), min_size=1, max_size=4, unique=True),
    ),
    min_size=1,
    max_size=10,
)


def play(session: EditSession, known: Mapping[str, KnownTarget], steps: list[Step]) -> set[str]:
    """Take the steps that are possible; the ids that are active then."""
    active: set[str] = set()
    for kind, chosen in steps:
        written = [request.id for request in session.ledger.written()]
        if kind == "edit":
            waiting = [fact for fact in FACTS if fact.id not in written]
            if waiting:
                session.edit(waiting[:BATCH], known=known)
                active |= {request.id for request in waiting[:BATCH]}
            continue
        named = [FACTS[index].id for index in chosen if FACTS[index].id in written]
        batches = [number for number in chosen if number < len(session.ledger.entries)]
        whole = kind.endswith("batch")
        act = session.undo if kind.startswith("undo") else session.redo
        try:
            changed = act(batches=batches) if whole else act(*named)
        except RunError:  # they are so already, or no such batch is left
            continue
        ids = {request.id for request in changed}
        assert ids
        active = active - ids if kind.startswith("undo") else active | ids
    return active


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_after_any_sequence_the_model_is_that_of_what_is_active(world: World, steps: list[Step]) -> None:
    session = world.open()
    active = play(session, world.known, steps)
    assert {request.id for request in session.requests} == active
    assert same(bits(world.model), built(session.ledger))
    if active:
        session.undo(*active)
    assert same(bits(world.model), world.base)
    session.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["undo", "redo"]),
            st.lists(st.integers(0, len(FACTS) - 1), min_size=1, max_size=4, unique=True),
        ),
        max_size=8,
    )
)
def test_the_order_of_undoing_leaves_no_trace(world: World, steps: list[Step]) -> None:
    """The same facts undone at once, and back again, give the same bits as any detour."""
    session = world.edited()
    whole = bits(world.model)
    play(session, world.known, steps)
    active = {request.id for request in session.requests}
    after = bits(world.model)
    session.close()
    direct = world.edited()
    gone = [fact.id for fact in FACTS if fact.id not in active]
    if gone:
        direct.undo(*gone)
    assert same(bits(world.model), after)
    if gone:
        direct.redo(*gone)
    assert same(bits(world.model), whole)
    direct.close()


def test_undo_is_durable(world: World, tmp_path: Path) -> None:
    session = world.edited(directory=tmp_path / "run")
    session.undo(FACTS[1].id, FACTS[7].id, batches=[3])
    session.redo(FACTS[7].id)
    found = bits(world.model)
    session.close()
    again = world.open(directory=tmp_path / "run")
    assert same(bits(world.model), found)
    assert again.requests == tuple(fact for fact in FACTS[:9] if fact is not FACTS[1])
    again.undo(batches=[0, 1, 2])
    assert same(bits(world.model), world.base)
    again.redo(batches=[0, 1, 2, 3])
    assert again.requests == FACTS
    assert same(bits(world.model), built(Ledger.read(tmp_path / "run")))
    again.close()
    # What a batch is without a fact was solved once.
    files = {path.name for path in (tmp_path / "run" / "deltas").iterdir()}
    whole = {f"batch-0000{number}.safetensors" for number in range(4)}
    assert files == {*whole, "batch-00000-1.safetensors", "batch-00002-1.safetensors"}


def test_the_rest_of_the_batch_holds_and_the_fact_is_gone(world: World) -> None:
    session = world.edited()
    entry = session.ledger.entries[-1]
    name = world.model.layout.weight_name(1)
    projection = world.model.projection(1)

    def missed(request_id: str) -> float:
        known = entry.known[request_id]
        return float((projection(known.keys[name].float()).double() - known.values[name]).norm())

    ids = entry.new_ids
    asked = {request_id: float(entry.changes[name].left[:, row].norm()) for row, request_id in enumerate(ids)}
    assert all(missed(name) < 1e-4 * asked[name] for name in ids)
    session.undo(ids[0])
    assert missed(ids[0]) > 0.1 * asked[ids[0]]
    assert all(missed(name) < 1e-4 * asked[name] for name in ids[1:])
    session.redo(ids[0])
    assert all(missed(name) < 1e-4 * asked[name] for name in ids)
    session.close()


def test_replay_forgets_what_is_undone_and_takes_it_back(world: World) -> None:
    session = world.edited(plugins=("replay",))
    replay = session.extensions["replay"]
    assert isinstance(replay, ReplayExtension)
    before = replay.statistics()
    session.undo(FACTS[0].id, batches=[2])
    kept = [record.request for record in replay.buffer.records]
    assert kept == [*FACTS[1:6], *FACTS[9:]]
    session.redo(FACTS[0].id, batches=[2])
    assert replay.statistics() == before
    session.close()


def test_several_layers_are_undone_too(world: World) -> None:
    session = world.open(layers=[0, 1])
    session.edit(FACTS[:6], batch_size=3)
    whole = bits(world.model)
    session.undo(FACTS[1].id)
    assert same(bits(world.model), built(session.ledger))
    assert not same(bits(world.model), whole)
    session.redo(FACTS[1].id)
    assert same(bits(world.model), whole)
    session.undo(batches=[0, 1])
    assert same(bits(world.model), world.base)
    session.close()


def test_what_cannot_be_undone_is_said(world: World) -> None:
    session = world.edited()
    found = bits(world.model)
    for attempt, sentence in (
        (lambda: session.undo("tiny-99"), r"There is no edit 'tiny-99' in the ledger\. Did you mean 'tiny-9'\?"),
        (lambda: session.undo(batches=[4]), r"There is no batch 4 in the ledger\. Its batches: 0 to 3\."),
        (lambda: session.redo("tiny-1"), r"There is nothing to redo: 'tiny-1' is active\."),
        (lambda: session.undo(), r"There is nothing to undo: no edit was named\."),
    ):
        with pytest.raises(RunError, match=sentence):
            attempt()
    session.undo("tiny-1", "tiny-2")
    with pytest.raises(RunError, match=r"There is nothing to undo: all 2 edits are undone already\."):
        session.undo("tiny-2", "tiny-1")
    session.redo("tiny-1", "tiny-2", "tiny-3")  # what is active already stays so
    assert same(bits(world.model), found)
    session.close()
