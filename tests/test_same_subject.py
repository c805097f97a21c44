"""Several facts about one subject: written together, added later, corrected, undone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_emmet.hparams import EmmetHParams
from editcore import (
    BatchAddition,
    BeforeApply,
    EditBatch,
    EditRequest,
    EditSession,
    FactoredDelta,
    HeldKey,
    Rejection,
    SessionConfig,
    Verdict,
    hookimpl,
)
from editcore.evaluation import score_targets
from editcore.ledger.verify import verify
from editcore.locate_then_edit import fact_rows, optimise_plainly, optimise_targets
from editcore.locate_then_edit.shared_keys import facts_by_key
from editcore.locate_then_edit.side_by_side import KnownOfLayer
from editcore.models import project
from editcore.models.catalogue import DEFAULT_MODEL, local_path
from editcore.plugins.extensions import lifecycle
from editcore.runs import open_session
from editcore.runs.batches import with_additions
from editcore.second_moments import Metric
from editcore.testing import tiny_model
from hypothesis import given, settings, strategies as st

PROMPTS = ("{} was founded by", "{} is based in", "{} makes", "{} belongs to")
TARGETS = ("Curie", "Rome", "music", "Paris")
OTHERS = (
    EditRequest(subject="Emmy Noether", prompt="{} worked in", target_new="Berlin"),
    EditRequest(subject="Niels Bohr", prompt="{} lived in", target_new="Madrid"),
)


def facts(subject: str = "Velt Ltd", count: int = 3) -> list[EditRequest]:
    return [
        EditRequest(subject=subject, prompt=prompt, target_new=target)
        for prompt, target in zip(PROMPTS[:count], TARGETS, strict=False)
    ]


EDITORS: dict[str, dict[str, Any]] = {"emmet": {"layers": [1]}, "memit": {"layers": [0, 1]}, "rome": {"layers": [1]}}
TEMPLATES = ("{}", "So. {}")


def session(
    editor: str = "emmet", directory: Path | None = None, *, backend: str = "raw", **changes: Any
) -> EditSession:
    hparams = {"context_templates": list(TEMPLATES), "v_num_grad_steps": 6, "mom2_adjustment": False, **EDITORS[editor]}
    config = SessionConfig(editor=editor, backend=backend, settings={editor: hparams | changes})
    return EditSession.open(tiny_model("llama", num_layers=3), config, directory=directory)


def weights(edited: EditSession) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in edited.model.hf.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def holds(edited: EditSession, requests: Sequence[EditRequest]) -> None:
    """The facts have one value, the last batch about their subject has them all, and W k is that value."""
    entry = next(entry for entry in reversed(edited.ledger.history()) if requests[0].id in entry.known)
    assert {request.id for request in requests} <= {request.id for request in entry.requests}
    name = edited.model.layout.weight_name(1)
    targets = [entry.known[request.id] for request in requests]
    for target in targets[1:]:
        assert torch.equal(target.values[name], targets[0].values[name])
        assert torch.equal(target.keys[name], targets[0].keys[name])
    found = project(edited.model, name, targets[0].keys[name][None])[0]
    torch.testing.assert_close(found, targets[0].values[name], rtol=1e-4, atol=1e-4)


def test_facts_of_one_batch_have_the_value_that_is_found_for_all_of_them() -> None:
    asked = [*facts(), *OTHERS]
    together = session()
    hparams = EmmetHParams(layers=(1,), v_num_grad_steps=6)
    delta = optimise_plainly(together.model, facts(), layer=1, templates=TEMPLATES, hparams=hparams)
    [result] = together.edit(asked)
    holds(together, asked[:3])
    [change] = result.proposal.changes.values()
    assert isinstance(change, FactoredDelta)
    torch.testing.assert_close(change.left[:, 0].float(), delta, rtol=1e-3, atol=1e-4)
    figures = {fact.request_id: fact.figures for fact in result.proposal.evidence}
    assert [figures[request.id].get("facts_of_value") for request in asked] == [3.0, 3.0, 3.0, None, None]
    assert not [note for note in result.proposal.notes if "contradicts" in note]
    [apart] = session(shared_key_cosine=None).edit(asked)
    assert "2 of 5 keys depend on the others" in " ".join(apart.proposal.notes)


def test_keys_that_count_as_one_are_one_constraint() -> None:
    """Two keys that are alike, but not to the last bit, get their mean."""
    asked = [facts()[0], EditRequest(subject="Velt Ltd", prompt="So {} was founded by", target_new="Rome")]
    edited = session(shared_key_cosine=0.05)
    [result] = edited.edit(asked)
    assert all(fact.figures["facts_of_value"] == 2 for fact in result.proposal.evidence)
    holds(edited, asked)
    apart = session()
    apart.edit(asked)
    first, second = (apart.ledger.entries[0].known[request.id].keys for request in asked)
    assert not any(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cache_prefixes", [True, False])
def test_a_shared_value_stops_when_its_least_likely_fact_does(cache_prefixes: bool) -> None:
    model, asked = tiny_model("llama", num_layers=3), facts()
    start = [math.exp(-score.nll) for score in score_targets(model, *texts_and_targets(asked))]
    threshold = math.sqrt(min(start) * max(start))  # the likeliest one is there from the start
    hparams = EmmetHParams(layers=(0,), v_num_grad_steps=8, v_stop_probability=threshold, v_final_step=False)
    rows = fact_rows(model, asked, ("{}",), hparams)
    found = optimise_targets(model, [rows], layer=0, hparams=hparams, known=KnownOfLayer(cache_prefixes=cache_prefixes))
    expected = optimise_plainly(model, asked, layer=0, templates=("{}",), hparams=hparams)
    assert min(found.steps) > 0
    for delta in found.deltas:
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("editor", EDITORS)
def test_facts_that_come_later_join_the_earlier_ones(editor: str) -> None:
    edited, asked = session(editor), facts()
    for number, request in enumerate(asked, start=1):
        edited.edit([OTHERS[0]] if number == 2 and editor != "rome" else [request])
        if number == 2 and editor != "rome":
            edited.edit([request])
        if editor != "memit":  # of several layers, the last gets what those below have left
            holds(edited, asked[:number])
    entries = [entry for entry in edited.ledger.entries if entry.new_requests[0] in asked]
    assert [len(entry.requests) for entry in entries] == [1, 2, 3]
    assert [entry.num_new for entry in entries] == [1, 1, 1]
    assert entries[2].builds_on == tuple((entry.batch, entry.new_ids[0]) for entry in entries[:2])


@pytest.mark.parametrize("editor", EDITORS)
def test_the_second_of_three_is_undone_and_the_others_keep_their_value(editor: str, tmp_path: Path) -> None:
    edited, asked = session(editor, tmp_path), facts()
    for request in asked:
        edited.edit([request])
    whole = weights(edited)
    edited.undo(asked[1].id)
    assert edited.requests == (asked[0], asked[2])
    assert [request.id for request in edited.ledger.history()[-1].requests] == [asked[2].id, asked[0].id]
    if editor != "memit":
        holds(edited, [asked[2], asked[0]])
    never = session(editor)
    never.edit([asked[0]])
    never.edit([asked[2]])
    assert same(weights(edited), weights(never))
    reopened = session(editor, tmp_path)
    assert same(weights(reopened), weights(edited))
    assert reopened.ledger.history()[-1].requests == edited.ledger.history()[-1].requests
    reopened.redo(asked[1].id)
    assert same(weights(reopened), whole)
    assert not verify(tmp_path).problems


def test_edits_beside_the_weights_join_and_are_undone_alike(tmp_path: Path) -> None:
    """The ledger of a run with the backend ``lora`` is that of one with ``raw``, solve by solve."""
    found = {}
    for backend in ("raw", "lora"):
        edited, asked = session("emmet", tmp_path / backend, backend=backend), facts()
        for request in asked:
            edited.edit([request])
        edited.undo(asked[1].id)
        found[backend] = session("emmet", tmp_path / backend, backend=backend).ledger.history()
    for raw, lora in zip(found["raw"], found["lora"], strict=True):
        assert raw.requests == lora.requests
        for name, change in raw.changes.items():
            # Another order of sums: base + Δ in one weight, or two products.
            torch.testing.assert_close(lora.changes[name].dense(), change.dense(), rtol=1e-3, atol=1e-4)


def test_facts_of_one_batch_are_solved_again_without_one_of_them() -> None:
    edited, asked = session(), [*facts(), *OTHERS]
    edited.edit(asked)
    edited.undo(asked[1].id)
    holds(edited, [asked[0], asked[2]])
    figures = edited.ledger.history()[0]
    assert [request.id for request in figures.requests] == [request.id for request in asked if request != asked[1]]


class RejectsTheSecond:
    """A gate that wants the second fact out."""

    @hookimpl
    def editcore_before_apply(self, event: BeforeApply) -> Verdict:
        bad = {request.id: Rejection(reason="no") for request in event.batch.new_requests if request == facts()[1]}
        return Verdict(action="accept", reason="fine", rejected=bad)


def test_a_rejected_fact_leaves_no_trace_in_the_value_of_the_others() -> None:
    gated, never = session(), session()
    gated._lifecycle = gated._proposer._lifecycle = lifecycle({"gate": RejectsTheSecond()})
    gated.edit(facts())
    never.edit([facts()[0], facts()[2]])
    assert same(weights(gated), weights(never))


def test_a_correction_replaces_a_fact_and_its_undo_brings_the_fact_back() -> None:
    edited, asked = session(), facts()
    for request in asked:
        edited.edit([request])
    correction = EditRequest(subject="Velt Ltd", prompt=asked[0].prompt, target_new="Berlin")
    edited.edit([correction])
    assert {request.id for request in edited.ledger.entries[-1].requests} == {correction.id, asked[1].id, asked[2].id}
    assert set(edited.requests) == {correction, asked[1], asked[2]}
    with_correction = weights(edited)
    edited.undo(correction.id)
    assert set(edited.requests) == set(asked)
    holds(edited, asked)
    edited.redo(correction.id)
    assert same(weights(edited), with_correction)
    edited.undo(asked[0].id)
    holds(edited, [correction, asked[1], asked[2]])


def test_a_fact_that_comes_back_joins_those_that_came_meanwhile() -> None:
    edited, asked = session(), facts()
    edited.edit([asked[0]])
    edited.edit([asked[1]])
    edited.undo(asked[0].id)
    edited.edit([asked[2]])
    holds(edited, [asked[2], asked[1]])
    without = weights(edited)
    edited.redo(asked[0].id)
    holds(edited, [asked[2], asked[0], asked[1]])
    assert set(edited.requests) == set(asked)
    edited.undo(asked[0].id)
    assert same(weights(edited), without)


def test_a_fact_that_joins_a_batch_is_not_held_beside_it() -> None:
    older, newer = facts(count=2)
    held = HeldKey(batch=0, request_id=older.id, keys={}, weight=1.0)
    batch = replace(EditBatch.of((newer,), index=1), held=(held,))
    joined = with_additions(batch, [BatchAddition(requests=(older,), weights=(1.0,))])
    assert joined.requests == (newer, older)
    assert joined.held == ()
    assert with_additions(batch, []).held == (held,)


ORDERS = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=7)


@settings(max_examples=6, deadline=None)
@given(ORDERS)
def test_the_order_of_undoing_does_not_matter(steps: list[tuple[bool, int]]) -> None:
    """The weights are a function of what is undone, whatever came first; they are those of the directory, too."""
    asked = [*facts(count=3), OTHERS[0]]
    edited = session(v_num_grad_steps=3)
    for request in asked:
        edited.edit([request])
    for undo, number in steps:
        undone = {name for entry in edited.ledger.entries for name in edited.ledger.undone(entry.batch)}
        if (asked[number].id in undone) != undo:
            (edited.undo if undo else edited.redo)(asked[number].id)
    undone = {name for entry in edited.ledger.entries for name in edited.ledger.undone(entry.batch)}
    straight = session(v_num_grad_steps=3)
    for request in asked:
        straight.edit([request])
    if undone:
        straight.undo(*sorted(undone))
    assert same(weights(edited), weights(straight))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 1.0))
def test_keys_are_compared_in_the_metric_of_the_solve(seed: int, cosine: float) -> None:
    """Against the inverse itself: each fact is with the first earlier one whose key is as its own, or by itself."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    metric = root @ root.T + 0.1 * torch.eye(5, dtype=torch.float64)
    centres = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    keys = centres[torch.tensor([0, 1, 0, 2, 1, 0])]
    keys = keys + 0.1 * torch.randn(keys.shape, generator=generator, dtype=torch.float64)
    inverse = torch.linalg.inv(metric)

    def alike(earlier: int, later: int) -> bool:
        product = float(keys[earlier] @ inverse @ keys[later])
        return product >= cosine * math.sqrt(
            float(keys[earlier] @ inverse @ keys[earlier]) * float(keys[later] @ inverse @ keys[later])
        )

    first: dict[int, list[int]] = {}
    for fact in range(len(keys)):
        group = next((leader for leader in first if alike(leader, fact)), fact)
        first.setdefault(group, []).append(fact)
    assert facts_by_key(keys, Metric(metric), cosine=cosine) == list(first.values())


def test_facts_about_subjects_of_their_own_have_the_bits_that_they_had() -> None:
    asked = [facts()[0], *OTHERS]
    sharing, apart = session(), session(shared_key_cosine=None)
    for edited in (sharing, apart):
        edited.edit(asked[:2])
        edited.edit(asked[2:])
    assert same(weights(sharing), weights(apart))
    assert all(not entry.builds_on for entry in sharing.ledger.entries)


@pytest.mark.skipif(local_path(DEFAULT_MODEL) is None, reason=f"{DEFAULT_MODEL} is not here: editctl models pull")
def test_the_example_of_the_tutorial(editctl_with_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three facts, one a batch, on the default model; then the second is undone."""
    page = Path(__file__).parents[1] / "docs" / "tutorial.md"
    section = (
        page.read_text(encoding="utf-8").partition("## Several facts about one subject\n")[2].partition("\n## ")[0]
    )
    [lines] = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    [commands] = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "company.jsonl").write_text(lines, encoding="utf-8")
    run, show, undo = (line.removeprefix("$ editctl ").split() for line in commands.splitlines())
    done = editctl_with_model(*run)
    assert done.code == 0, done.err
    assert "3 of 3 facts are said." in done.out
    assert editctl_with_model(*show).code == 0
    session = open_session(tmp_path / "RUN")
    asked = session.requests
    assert said(session, asked) == [True, True, True]
    session.close()
    assert editctl_with_model(*undo[:-1], asked[1].id).code == 0
    session = open_session(tmp_path / "RUN")
    assert said(session, asked) == [True, False, True]
    assert session.requests == (asked[0], asked[2])


def said(edited: EditSession, requests: Sequence[EditRequest]) -> list[bool]:
    return [score.correct for score in score_targets(edited.model, *texts_and_targets(requests))]


def texts_and_targets(requests: Sequence[EditRequest]) -> tuple[list[str], list[str]]:
    return [request.text for request in requests], [request.target_new for request in requests]


def test_subjects_with_several_facts_are_told_before(editctl: Any, tmp_path: Path) -> None:
    lines = [request.model_dump_json(include={"subject", "prompt", "target_new"}) for request in [*facts(), *OTHERS]]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tiny_model("llama").save(tmp_path / "tiny")
    options = ["--model", tmp_path / "tiny", "--dataset", tmp_path / "facts.jsonl", "--set", "layers=[1]", "--dry-run"]
    done = editctl("run", "--editor", "emmet", *options)
    assert "1 subject has several facts, 3 of the 5." in done.out, done.err
