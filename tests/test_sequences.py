"""Batches in sequence: editors with a memory of keys, and BLUE's rule for layers, in runs with everything else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import EditRequest, EditSession, HParamsError, KnownTarget, LanguageModel, OverlaysWeights, SessionConfig
from editcore.locate_then_edit import Targets, batch_targets
from editcore.locate_then_edit.key_memory import KeyMemory
from editcore.models import project
from editcore.models.capture import capture
from editcore.models.tokens import lookup_row
from editcore.second_moments import Metric
from editcore.testing import tiny_model, tiny_requests
from torch import Tensor

FACTS = tiny_requests(9)
BATCH = 3
EDITORS = {
    "memit-seq": {"layers": [0, 1], "mom2_update_weight": 3.0},
    "alphaedit": {"layers": [0, 1], "L2": 0.05},
    "emmet": {"layers": [1], "memory": "keys"},
}


class World:
    """Sessions on one tiny model, with targets that were optimised once per editor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_model("llama", num_layers=3)
        words = " ".join(request.text for request in tiny_requests(80)).split()
        (folder / "corpus.txt").write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
        self._known: dict[str, Mapping[str, KnownTarget]] = {}

    def open(
        self,
        editor: str,
        *,
        directory: Path | None = None,
        plugins: tuple[str, ...] = (),
        backend: str = "raw",
        model: LanguageModel | None = None,
        **more: Any,
    ) -> EditSession:
        own = {"context_templates": ["{}"], "v_num_grad_steps": 3, "first_token_layers": None}
        replay = {"replay": {"replay_mode": "statistics"}} if "replay" in plugins else {}
        settings = {editor: {**own, **EDITORS[editor], **more}, **replay}
        config = SessionConfig(
            editor=editor,
            plugins=plugins,
            backend=backend,
            settings=settings,
            corpus=str(self.folder / "corpus.txt"),
            corpus_tokens=1024,
        )
        return EditSession.open(model or self.model, config, directory=directory)

    def known(self, editor: str) -> Mapping[str, KnownTarget]:
        if editor not in self._known:
            session = self.open(editor)
            session.edit(FACTS)
            self._known[editor] = session.ledger.entries[0].known
            session.close()
        return self._known[editor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("sequences")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(folder / "cache"))
        yield World(folder)


def bits(model: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def edited(
    world: World, editor: str, facts: Sequence[EditRequest] = FACTS, *, known_of: str = "", **options: Any
) -> dict[str, Tensor]:
    """The weights after facts in batches of three, with the values that the editor ``known_of`` found for them."""
    session = world.open(editor, **options)
    session.edit(facts, batch_size=BATCH, known=world.known(known_of or editor))
    found = bits(session.model)
    session.close()
    return found


@pytest.mark.parametrize("editor", EDITORS)
def test_a_memory_changes_later_batches_and_not_the_first(world: World, editor: str) -> None:
    assert same(edited(world, editor, FACTS[:3]), edited(world, editor, FACTS[:3], memory="none"))
    assert not same(edited(world, editor), edited(world, editor, memory="none"))


def test_a_remembered_fact_counts_as_a_fact_of_the_batch_does(world: World) -> None:
    """At λ the facts of a batch have weight 1/λ beside the price: EMMET at λ and w is MEMIT_seq with λ·w."""
    first = edited(world, "memit-seq", known_of="emmet", layers=[1], mom2_update_weight=3.0)
    second = edited(world, "emmet", emmet_lambda=0.5, mom2_update_weight=6.0)
    forgetful = edited(world, "emmet", emmet_lambda=0.5, mom2_update_weight=6.0, memory="none")
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(second[name], first[name], rtol=1e-5, atol=1e-6)
    assert (forgetful[name] - first[name]).abs().max() > 1e-3


@pytest.mark.parametrize("editor", EDITORS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(world: World, editor: str, tmp_path: Path) -> None:
    whole = edited(world, editor)
    for start in range(0, len(FACTS), BATCH):
        session = world.open(editor, directory=tmp_path / "run")
        session.edit(FACTS[start : start + BATCH], known=world.known(editor))
        found = bits(session.model)
        session.close()
    assert same(found, whole)


@pytest.mark.parametrize("editor", EDITORS)
def test_the_order_of_undoing_leaves_no_trace(world: World, editor: str, tmp_path: Path) -> None:
    """Facts of all three batches are undone, and a fourth batch comes; in a session that was opened again, too."""
    gone = [FACTS[index].id for index in (1, 3, 8)]
    ends = []
    for number, order in enumerate(itertools.permutations(gone)):
        session = world.open(editor, directory=tmp_path / f"{number}")
        session.edit(FACTS, batch_size=BATCH, known=world.known(editor))
        for name in order:
            session.undo(name)
        if number == 1:
            session.close()
            session = world.open(editor, directory=tmp_path / f"{number}")
        session.edit(tiny_requests(11)[9:])
        session.redo(order[0])
        session.undo(order[0])
        ends.append(bits(session.model))
        session.close()
    assert all(same(ends[0], end) for end in ends[1:])


@pytest.mark.parametrize("editor", EDITORS)
def test_an_undone_fact_is_not_in_the_memory(world: World, editor: str) -> None:
    known = world.known(editor)

    def second(first: Sequence[EditRequest], undone: Sequence[EditRequest]) -> list[Tensor]:
        """The changes of a batch behind another one."""
        session = world.open(editor)
        session.edit(first, known=known)
        if undone:
            session.undo(*(request.id for request in undone))
        [result] = session.edit(FACTS[3:6], known=known)
        session.close()
        return [change.dense() for change in result.proposal.changes.values()]

    found, never, kept = second(FACTS[:3], FACTS[1:2]), second([FACTS[0], FACTS[2]], ()), second(FACTS[:3], ())
    for layer, (undone, absent, present) in enumerate(zip(found, never, kept, strict=True)):
        # Above the first layer, the ledger has the keys that the rest of a batch had before the undo.
        share = 1e-4 if layer == 0 else 0.1
        assert 0.01 * absent.norm() < (present - absent).norm()
        assert (undone - absent).norm() < share * (present - absent).norm()


@pytest.mark.parametrize("editor", EDITORS)
def test_a_fact_that_is_edited_again_counts_with_its_new_key_only(world: World, editor: str) -> None:
    layer = EDITORS[editor]["layers"][-1]
    again = FACTS[0].model_copy(update={"target_new": FACTS[1].target_new, "id": "again"})
    session = world.open(editor)
    session.edit(FACTS[:3], known=world.known(editor))
    session.edit([again])
    first, second = session.ledger.entries
    name = session.model.layout.weight_name(layer)
    keys = [first.known[FACTS[1].id], first.known[FACTS[2].id], second.known[again.id]]
    memory = KeyMemory(weight=2.0)
    memory.recall(session.ledger.history())
    prior = Metric.identity(len(keys[0].keys[name]))
    _, found = memory.sum_at(name, 1.0, lambda: prior, rewritten=())
    expected = prior.plus(torch.stack([key.keys[name] for key in keys]), torch.full((3,), 2.0))
    torch.testing.assert_close(found.matrix, expected.matrix)
    _, found = memory.sum_at(name, 1.0, lambda: prior, rewritten=[again.fact_key])
    expected = prior.plus(torch.stack([key.keys[name] for key in keys[:2]]), torch.full((2,), 2.0))
    torch.testing.assert_close(found.matrix, expected.matrix)
    session.close()


@pytest.mark.parametrize("editor", EDITORS)
def test_replay_adds_nothing_to_keys_that_the_editor_remembers(world: World, editor: str) -> None:
    assert same(edited(world, editor), edited(world, editor, plugins=("replay",)))
    assert not same(edited(world, editor, memory="none"), edited(world, editor, memory="none", plugins=("replay",)))


@pytest.mark.parametrize("editor", EDITORS)
def test_trust_judges_it_and_lora_holds_it(world: World, editor: str) -> None:
    """The adapter holds what the weights would: changes are factored, and as wide as the batch."""
    found = []
    for backend in ("raw", "lora"):
        session = world.open(editor, plugins=("trust",), backend=backend, model=tiny_model("llama", num_layers=3))
        results = session.edit(FACTS, batch_size=BATCH, known=world.known(editor))
        assert all("trust" in result.verdicts for result in results)
        assert any(result.applied for result in results)
        written = session.backend.written() if isinstance(session.backend, OverlaysWeights) else nullcontext()
        names = [session.model.layout.weight_name(layer) for layer in EDITORS[editor]["layers"]]
        with written:
            found.append([session.model.weight(name).clone() for name in names])
        session.close()
    for raw, lora in zip(*found, strict=True):
        torch.testing.assert_close(lora, raw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("editor", EDITORS)
def test_blue_writes_the_first_and_the_last_layer_in_full(
    world: World, editor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the two, a value is optimised with the layer below already changed, and asked for in full."""
    deltas: list[Tensor] = []
    layers: list[int] = []
    first_weight: list[Tensor] = []
    optimise = batch_targets.optimise_targets

    def optimised(*args: Any, **options: Any) -> Targets:
        targets = optimise(*args, **options)
        deltas.append(targets.deltas.double())
        layers.append(options["layer"])
        first_weight.append(args[0].weight(args[0].layout.weight_name(0)).clone())
        return targets

    monkeypatch.setattr(batch_targets, "optimise_targets", optimised)
    session = world.open(editor, layers=[0, 1, 2], layer_rule="blue")
    model = session.model
    [result] = session.edit(FACTS[:3])
    assert layers == [0, 2]
    names = [model.layout.weight_name(layer) for layer in layers]
    assert list(result.proposal.changes) == names
    change = result.proposal.changes[names[0]].dense().float()
    torch.testing.assert_close(first_weight[1] - first_weight[0], change, rtol=0, atol=1e-6)
    session.undo(batches=[0])
    rows = [lookup_row(model, fact) for fact in FACTS[:3]]
    below: dict[str, Any] = {}
    for name, layer, delta in zip(names, layers, deltas, strict=True):
        with session.context.trial(below):
            seen = capture(model, rows, [layer])[layer]
        below[name] = result.proposal.changes[name]
        for row, fact in enumerate(FACTS[:3]):
            known = result.proposal.known[fact.id]
            torch.testing.assert_close(known.keys[name], seen.inputs[row].double())
            torch.testing.assert_close(known.values[name], seen.outputs[row].double() + delta[row])
    session.close()


@pytest.mark.parametrize("family", ["olmo2", "gemma3_text"])
def test_blue_holds_where_a_norm_follows_the_projection(world: World, family: str) -> None:
    """Such a model takes no residual that is spread, but a value at each of two layers."""
    model = tiny_model(family, num_layers=4)
    with pytest.raises(HParamsError, match="--set layer_rule=blue"):
        world.open("emmet", layers=[0, 2], model=model)
    session = world.open("emmet", layers=[0, 2], layer_rule="blue", model=model)
    [result] = session.edit(FACTS[:3])
    name = model.layout.weight_name(2)
    known = [result.proposal.known[fact.id] for fact in FACTS[:3]]
    found = project(model, name, torch.stack([target.keys[name] for target in known]))
    torch.testing.assert_close(found, torch.stack([target.values[name] for target in known]), rtol=1e-4, atol=1e-5)
    session.close()


def test_blue_needs_two_layers_and_all_of_them(world: World) -> None:
    for wrong in ({"layers": [1]}, {"layers": [0, 1], "layer_selection": "random"}):
        with pytest.raises(HParamsError, match='layer_rule = "blue" writes the first and the last'):
            world.open("memit-seq", layer_rule="blue", **wrong)
