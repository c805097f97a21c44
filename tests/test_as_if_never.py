"""Undo as if an edit had never been solved: the weights of that sequence, with keys and values held fixed."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import EditSession, KnownTarget, LanguageModel, RunError, SessionConfig
from editcore.interfaces.history import LedgerEntry
from editcore.ledger.ledger import Ledger
from editcore.second_moments import Accumulator, Metric
from editcore.testing import tiny_model, tiny_requests
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

FACTS = tiny_requests(6)
METHODS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "emmet": ("emmet", (), {"layers": [1]}),
    "emmet, soft": ("emmet", (), {"layers": [0, 1], "emmet_lambda": 0.3, "update_norm_lambda": 0.1}),
    "emmet with replay": ("emmet", ("replay",), {"layers": [1], "emmet_lambda": 0.2}),
    "memit": ("memit", (), {"layers": [0, 1], "mom2_update_weight": 2.0}),
    "memit-seq": ("memit-seq", (), {"layers": [0, 1], "mom2_update_weight": 2.0, "update_norm_lambda": 0.1}),
    "alphaedit": ("alphaedit", (), {"layers": [1], "nullspace_ratio": 3.0}),
}


class World:
    """Sessions on one tiny model in float64."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_model(dtype=torch.float64)
        words = " ".join(request.text for request in tiny_requests(80)).split()
        (folder / "corpus.txt").write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
        self.made: dict[str, tuple[Path, tuple[LedgerEntry, ...]]] = {}

    def open(self, method: str, directory: Path | None = None) -> EditSession:
        editor, plugins, own = METHODS[method]
        return EditSession.open(
            self.model,
            SessionConfig(
                editor=editor,
                plugins=plugins,
                settings={
                    editor: {"context_templates": ["{}"], "v_num_grad_steps": 2, "shared_key_cosine": None, **own},
                    **({"replay": {"replay_rate": 0.5}} if plugins else {}),
                },
                corpus=str(self.folder / "corpus.txt"),
                corpus_tokens=1024,
            ),
            directory=directory,
        )

    def edited(self, method: str, directory: Path | None = None) -> EditSession:
        """A session with the facts in batches of two."""
        session = self.open(method, directory)
        session.edit(FACTS, batch_size=2)
        return session


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(folder / "cache"))
        yield World(folder)


@dataclass
class Solve:
    """One batch at one weight, as the ledger has it: keys [n, m], asked residuals [n, d], which facts."""

    ids: list[str]
    keys: Tensor
    residuals: Tensor
    values: Tensor
    """What the weights gave the keys then, and the residuals: v, [n, d]."""
    weights: Tensor
    held: Tensor
    held_ids: list[str]
    held_weights: Tensor
    moment_weight: float


def solves_of(session: EditSession, address: str, base: Tensor) -> list[Solve]:
    """Every batch at one weight, by the ledger's factors alone."""
    total, found = base.clone(), []
    for entry in session.ledger.entries:
        layer = session.model.layout.layer_of(address)
        keys = torch.stack([entry.known[request.id].keys[address].double() for request in entry.requests])
        residuals = entry.changes[address].left.double().T
        kept = [key for key in entry.held if address in key.keys]
        found.append(
            Solve(
                ids=[request.id for request in entry.requests],
                keys=keys,
                residuals=residuals,
                values=keys @ total.T + residuals,
                weights=torch.tensor(entry.weights, dtype=torch.float64),
                held_ids=[key.request_id for key in kept],
                held=torch.stack([key.keys[address].double() for key in kept]) if kept else keys[:0],
                held_weights=torch.tensor([key.weight for key in kept], dtype=torch.float64),
                moment_weight=entry.diagnostics.get(f"layer_{layer}_moment_weight", 1.0),
            )
        )
        total = total + entry.changes[address].dense().double()
    return found


def slowly(session: EditSession, method: str, address: str, solves: Sequence[Solve], gone: str, base: Tensor) -> Tensor:
    """The same solves without a fact, one after the other, from the normal equations in full."""
    _, _, own = METHODS[method]
    layer = session.model.layout.layer_of(address)
    moment = session.context.statistics.moments([layer])[layer].double()
    memory = torch.zeros_like(moment)
    total = base.clone()
    first = solves[0].moment_weight
    for solve in solves:
        rows = [row for row, name in enumerate(solve.ids) if name != gone]
        if not rows:
            continue
        keys, values = solve.keys[rows].T, solve.values[rows].T
        prior = solve.moment_weight * moment + own.get("update_norm_lambda", 0.0) * torch.eye(len(moment)).double()
        if method == "memit-seq":
            prior = first * moment + own["update_norm_lambda"] * torch.eye(len(moment)).double() + memory
        ridge = own.get("emmet_lambda", 0.0) if "emmet" in method else 1.0
        stays = [place for place, name in enumerate(solve.held_ids) if name != gone]
        held = solve.held[stays]
        price = prior + solve.moment_weight * (held.T * solve.held_weights[stays]) @ held
        inverse = torch.linalg.inv(price)
        if method == "alphaedit":
            values_of, vectors = torch.linalg.eigh(moment)
            basis = vectors[:, values_of < own["nullspace_ratio"] * values_of.median()]
            inner = first * torch.eye(basis.shape[1]).double() + basis.T @ memory @ basis
            inverse = basis @ torch.linalg.inv(inner) @ basis.T
        system = keys.T @ inverse @ keys + ridge * torch.diag(1 / solve.weights[rows])
        total = total + (values - total @ keys) @ torch.linalg.inv(system) @ keys.T @ inverse
        memory = memory + keys @ keys.T
    return total


@pytest.mark.parametrize("method", ["emmet", "emmet, soft", "emmet with replay", "memit", "memit-seq", "alphaedit"])
@pytest.mark.parametrize("place", [0, 3])
def test_the_weights_are_those_of_the_sequence_without_the_edit(world: World, method: str, place: int) -> None:
    session = world.edited(method)
    addresses = sorted(session.ledger.entries[0].changes)
    now = {address: session.model.weight(address).clone() for address in addresses}
    bases = session.without_edits(
        lambda: {name: session.model.as_out_in(name, session.model.weight(name)).clone() for name in addresses}
    )
    solves = {name: solves_of(session, name, bases[name]) for name in addresses}
    later = {entry.batch: entry for entry in session.ledger.entries}
    session.undo(FACTS[place].id, as_if_never=True)
    for name in addresses:
        expected = slowly(session, method, name, solves[name], FACTS[place].id, bases[name])
        found = session.model.as_out_in(name, session.model.weight(name))
        scale = (expected - bases[name]).abs().max()
        assert float((found - expected).abs().max() / scale) < 1e-9, name
        # Today's undo, which leaves later batches as they were, gives something else.
        plain = expected - expected
        for entry in session.ledger.entries:
            change = later[entry.batch].changes[name].dense().double()
            plain = plain + change
        assert float((found - bases[name] - plain).abs().max() / scale) > 1e-6
    session.redo(FACTS[place].id)
    assert all(torch.equal(session.model.weight(name), bits) for name, bits in now.items())
    session.close()


def test_with_a_memory_it_is_one_formula(world: World) -> None:
    """The sum of all solves is one least-squares problem, from which a fact is taken by a change of rank one."""
    session = world.edited("memit-seq")
    own = METHODS["memit-seq"][2]
    for address in sorted(session.ledger.entries[0].changes):
        layer = session.model.layout.layer_of(address)
        entries = session.ledger.entries
        moment = Metric(session.context.statistics.moments([layer])[layer])
        weight = entries[0].diagnostics[f"layer_{layer}_moment_weight"]
        sums = Accumulator(moment.scaled(weight=weight, ridge=own["update_norm_lambda"]))
        for entry in entries:
            sums.update(torch.stack([entry.known[fact.id].keys[address].double() for fact in entry.requests]))
        gone = FACTS[2]
        base = session.without_edits(lambda at=address: session.model.as_out_in(at, session.model.weight(at)).clone())
        values = {
            name: solve.values[row] for solve in solves_of(session, address, base) for row, name in enumerate(solve.ids)
        }
        now = session.model.as_out_in(address, session.model.weight(address)).clone()
        key = entries[1].known[gone.id].keys[address].double()[None]
        formula = now + sums.forget(key, key @ now.T - values[gone.id][None]).dense()
        session.undo(gone.id, as_if_never=True)
        found = session.model.as_out_in(address, session.model.weight(address))
        assert float((found - formula).abs().max() / (formula - base).abs().max()) < 1e-9
        session.redo(gone.id)
    session.close()


def test_replayed_and_held_copies_of_the_edit_go_too(world: World) -> None:
    session = world.edited("emmet with replay")
    gone = FACTS[0].id
    assert any(gone in [request.id for request in entry.requests[entry.num_new :]] for entry in session.ledger.entries)
    session.undo(gone, as_if_never=True)
    for entry in session.ledger.history():
        assert gone not in [request.id for request in entry.requests]
        assert gone not in entry.known
    [address] = session.ledger.entries[0].changes
    # Every remaining fact has the value that it was solved for last.
    weight = session.model.as_out_in(address, session.model.weight(address)).double()
    last = session.ledger.history()[-1]
    assert last.changes[address].rank == len(last.requests)
    assert torch.isfinite(weight).all()
    session.close()


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_in_any_order_and_mixed_with_undo_the_state_decides(world: World, tmp_path: Path, data: st.DataObject) -> None:
    """What is undone, and how, gives the weights; not the way to it. And a reopened directory has the same bits."""
    method = data.draw(st.sampled_from(["emmet", "memit-seq"]))
    gone = data.draw(st.lists(st.sampled_from([fact.id for fact in FACTS]), min_size=2, max_size=3, unique=True))
    never = data.draw(st.sets(st.sampled_from(gone), min_size=1))
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    session = world.edited(method, folder / "first")
    for name in gone:
        session.undo(name, as_if_never=name in never)
    bits = weights(session.model)
    session.close()
    again = world.edited(method, folder / "second")
    for name in data.draw(st.permutations(gone)):
        if data.draw(st.booleans()):
            again.undo(name)
            again.redo(name)
        again.undo(name, as_if_never=name in never)
    assert same(weights(again.model), bits)
    again.close()
    reopened = world.open(method, folder / "first")
    assert same(weights(reopened.model), bits)
    reopened.redo(*gone)
    untouched = weights(reopened.model)
    reopened.close()
    whole = world.edited(method)
    assert same(weights(whole.model), untouched)
    whole.close()


def test_a_batch_that_is_empty_is_solved_for_what_came_after_it(world: World) -> None:
    """Both facts of the first batch are undone, one of them as if it had never been: later batches met the other."""
    session = world.edited("emmet")
    session.undo(FACTS[0].id)
    session.undo(FACTS[1].id, as_if_never=True)
    bits = weights(session.model)
    session.redo(FACTS[0].id, FACTS[1].id)
    session.undo(FACTS[1].id, as_if_never=True)
    session.undo(FACTS[0].id)
    assert same(weights(session.model), bits)
    session.close()


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_facts_that_come_afterwards_never_met_it(world: World) -> None:
    """A batch after the undo was solved without the edit already, and stays as it is when the edit comes back."""
    known: dict[str, KnownTarget] = {}
    first = world.open("emmet")
    first.edit(FACTS[:2], batch_size=1)
    first.undo(FACTS[0].id, as_if_never=True)
    first.edit(FACTS[2:3], known=known)
    last = first.ledger.entries[-1]
    assert not first.ledger.left_out(last.batch)
    first.redo(FACTS[0].id)
    assert first.ledger.history()[-1] is last
    assert len(first.ledger.history()) == 3
    first.close()


def test_an_editor_without_stored_keys_says_so(world: World) -> None:
    session = EditSession.open(
        world.model,
        SessionConfig(
            editor="rome",
            settings={"rome": {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 2}},
            corpus=str(world.folder / "corpus.txt"),
            corpus_tokens=1024,
        ),
    )
    session.edit(FACTS[:2], batch_size=1)
    before = weights(session.model)
    with pytest.raises(RunError, match="What 'rome' wrote cannot be solved again without an earlier edit"):
        session.undo(FACTS[0].id, as_if_never=True)
    assert same(weights(session.model), before)
    assert len(session.requests) == 2
    session.close()


def test_the_ledger_says_that_it_never_was(world: World, tmp_path: Path) -> None:
    session = world.edited("emmet", tmp_path / "run")
    session.undo(FACTS[0].id, as_if_never=True)
    session.close()
    lines = [
        json.loads(line.partition(" ")[2]) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    ]
    assert [line["kind"] for line in lines[4:]] == ["revision"] * 3 + ["undo"]
    assert all(line["never"] == [[0, FACTS[0].id]] for line in lines[4:-1])
    assert lines[-1]["as_if_never"] is True
    ledger = Ledger.read(tmp_path / "run")
    assert ledger.events[-1].as_if_never
    assert [entry.batch for entry in ledger.history()] == [0, 1, 2]
