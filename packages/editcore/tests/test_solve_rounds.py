"""``solve_rounds``: a batch is solved again for the facts that the model does not say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from editcore import EditBatch, EditRequest, EditSession, KnownTarget, SessionConfig
from editcore.evaluation import TargetScore, score_targets
from editcore.testing import tiny_model

FACTS = (
    EditRequest(subject="Emmy Noether", prompt="{} worked in", target_new="Berlin"),
    EditRequest(subject="Niels Bohr", prompt="{} lived in", target_new="Madrid"),
    EditRequest(subject="Marie Curie", prompt="{} was born in", target_new="Rome"),
)
SHORT: dict[str, Any] = {  # so few steps that some facts are not said after one solve
    "layers": [1],
    "fact_token": "last",
    "context_templates": ["{}", "So. {}"],
    "v_num_grad_steps": 6,
    "v_lr": 1.0,
    "v_weight_decay": 0.0,
    "kl_factor": 0.0,
    "clamp_norm_factor": 20.0,
    "mom2_adjustment": False,
}


def opened(editor: str = "emmet", **settings: Any) -> EditSession:
    config = SessionConfig(editor=editor, settings={editor: {**SHORT, **settings}})
    return EditSession.open(tiny_model("llama", num_layers=3), config)


def said(session: EditSession, requests: tuple[EditRequest, ...] = FACTS) -> list[bool]:
    scores = score_targets(
        session.model,
        [request.text for request in requests],
        [request.target_new for request in requests],
        joins=[request.join for request in requests],
    )
    return [score.correct for score in scores]


def known(session: EditSession, batch: int = 0) -> dict[str, KnownTarget]:
    return dict(session.ledger.batch(batch).known)


def rows_solved_again(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What every later call of ``unsaid_rows`` by this session's editor returns."""
    from editcore.locate_then_edit import editor as module

    found: list[list[int]] = []
    plain = module.unsaid_rows

    def watched(*args: Any, **options: Any) -> list[int]:
        found.append(plain(*args, **options))
        return found[-1]

    monkeypatch.setattr(module, "unsaid_rows", watched)
    return found


@pytest.mark.parametrize(
    ("editor", "settings"),
    [
        ("emmet", {}),
        ("emmet", {"layers": [0, 1]}),
        ("emmet", {"layers": [0, 1], "layer_rule": "blue", "v_num_grad_steps": 3}),
        ("emmet", {"emmet_lambda": 1.0, "mom2_update_weight": "auto", "mom2_auto_fraction": 0.5}),
        ("memit", {"layers": [0, 1], "mom2_auto_fraction": 0.5}),
        ("rome", {}),
    ],
)
def test_facts_that_the_model_does_not_say_are_solved_again_until_it_does(
    editor: str, settings: dict[str, Any]
) -> None:
    once, often = opened(editor, **settings), opened(editor, solve_rounds=20, **settings)
    facts = FACTS[1:2] if editor == "rome" else FACTS  # written one after the other, a fact may lose an earlier one
    for session in (once, often):
        session.edit(facts)
    assert not all(said(once, facts)), "one solve is enough here, so nothing is tested"
    assert all(said(often, facts))


def test_a_fact_then_asks_for_the_sum_of_both_shifts() -> None:
    """The oracle finds the second δ by hand: an editor with one round, on a model that has the first change."""
    name = "model.layers.1.mlp.down_proj.weight"
    by_hand = opened()
    base = by_hand.model.weight(name).detach().double().clone()
    by_hand.edit(FACTS)
    first = known(by_hand)
    unsaid = tuple(fact for fact, holds in zip(FACTS, said(by_hand), strict=True) if not holds)
    assert 0 < len(unsaid) < len(FACTS)
    again = EditBatch.of(unsaid, index=1)
    further = by_hand._editor.propose(by_hand.model, again, by_hand.context)

    twice = opened(solve_rounds=2)
    twice.edit(FACTS)
    for fact in FACTS:
        target = known(twice)[fact.id]
        shift = first[fact.id].values[name] - base @ first[fact.id].keys[name].double()
        if fact in unsaid:
            now = by_hand.model.weight(name).detach().double()
            shift = shift + further.known[fact.id].values[name] - now @ further.known[fact.id].keys[name].double()
        assert torch.equal(target.keys[name], first[fact.id].keys[name])
        wanted = base @ target.keys[name].double() + shift
        torch.testing.assert_close(target.values[name].double(), wanted, rtol=0, atol=2e-5)
    steps = {evidence.request_id: evidence.figures["steps"] for evidence in twice.ledger.batch(0).evidence}
    assert all(steps[fact.id] == (10 if fact in unsaid else 5) for fact in FACTS)


def test_nothing_is_solved_again_if_the_model_says_every_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    once, often = opened(v_num_grad_steps=20), opened(v_num_grad_steps=20, solve_rounds=5)
    found = rows_solved_again(often, monkeypatch)
    for session in (once, often):
        session.edit(FACTS)
    assert all(said(once))
    assert found == [[]]
    for name, weight in once.model.hf.state_dict().items():
        assert torch.equal(weight, often.model.hf.state_dict()[name])


def test_a_fact_with_a_known_value_is_not_optimised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(solve_rounds=3)
    found = rows_solved_again(session, monkeypatch)
    batch = EditBatch.of(FACTS)
    proposal = session._editor.propose(session.model, batch, session.context)
    assert found[0]
    found.clear()
    session._editor.propose(session.model, batch.without({FACTS[0].id}, proposal.known), session.context)
    assert found == [[]]


def test_facts_that_share_a_value_are_optimised_again_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tuple(
        EditRequest(subject="Velt Ltd", prompt=prompt, target_new=target)
        for prompt, target in (("{} was founded by", "Curie"), ("{} is based in", "Rome"))
    )
    from editcore.locate_then_edit import rounds

    def one_unsaid(model: Any, prompts: list[str], targets: list[str], **options: Any) -> list[TargetScore]:
        scores = score_targets(model, prompts, targets, **options)
        return [replace(score, correct=target != "Curie") for score, target in zip(scores, targets, strict=True)]

    monkeypatch.setattr(rounds, "score_targets", one_unsaid)
    session = opened(solve_rounds=2, fact_token="subject_last")
    found = rows_solved_again(session, monkeypatch)
    session.edit((*FACTS, *pair))
    assert found == [[3, 4]]
    values = [target.values for fact, target in known(session).items() if fact in {fact.id for fact in pair}]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


def test_a_batch_solved_twice_is_resolved_without_one_of_its_facts() -> None:
    """As if never: the ledger has what the other facts asked for at the end."""
    session = opened(solve_rounds=20)
    session.edit(FACTS)
    session.undo(FACTS[0].id)
    assert said(session)[1:] == [True, True]
