"""The training against a plain loop of autograd in float64, and the settings one by one."""

from __future__ import annotations

import random

import pytest
import torch
from editcore import DenseDelta, EditSession, FactoredDelta, HParamsError, LanguageModel, SessionConfig
from editcore.testing import tiny_model, tiny_requests
from torch import Tensor

FACTS = tiny_requests(3)


def open_session(
    family: str = "llama", *, plugins: tuple[str, ...] = (), seed: int = 0, **settings: object
) -> EditSession:
    config = SessionConfig(editor="ft", plugins=plugins, seed=seed, settings={"ft": {"layer": 1, **settings}})
    return EditSession.open(tiny_model(family, dtype=torch.float64), config)


def plain_loss(model: LanguageModel, weight: Tensor, row: int, *, end: bool) -> Tensor:
    """Mean −log p of one fact's target, token by token, with another weight in the place of the projection's."""
    fact, name = FACTS[row], model.layout.weight_name(1)
    prompt = model.tokenizer(fact.text)["input_ids"]
    ids = model.tokenizer(fact.text + fact.continuation)["input_ids"] + [model.tokenizer.eos_token_id] * end
    logits = torch.func.functional_call(model.hf, {name: weight}, (torch.tensor([ids]),)).logits[0]
    found = [-logits[at - 1].float().log_softmax(-1)[ids[at]] for at in range(len(prompt), len(ids))]
    return torch.stack(found).mean()


def plain_training(
    model: LanguageModel, *, epochs: int, minibatch: int, rate: float, end: bool, rank: int | None
) -> Tensor:
    """Δ as autograd and Adam give it for the stored weight, with the editor's draws."""
    generator = torch.Generator().manual_seed(random.Random("ft:0:0").getrandbits(63))
    base = model.weight(model.layout.weight_name(1)).detach()
    transposed = model.as_out_in(model.layout.weight_name(1), base).shape != base.shape
    d_out, d_in = model.as_out_in(model.layout.weight_name(1), base).shape
    if rank is None:
        parameters = [torch.zeros(d_out, d_in, dtype=torch.float64, requires_grad=True)]
    else:
        right = torch.randn(rank, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
        parameters = [torch.zeros(d_out, rank, dtype=torch.float64, requires_grad=True), right.requires_grad_()]

    def change() -> Tensor:
        return parameters[0] if rank is None else parameters[0] @ parameters[1]

    adam = torch.optim.Adam(parameters, lr=rate)
    for _ in range(epochs):
        order = torch.randperm(len(FACTS), generator=generator).tolist()
        for start in range(0, len(order), minibatch):
            weight = base + (change().T if transposed else change())
            rows = sorted(order[start : start + minibatch])
            loss = torch.stack([plain_loss(model, weight, row, end=end) for row in rows]).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return change().detach()


@pytest.mark.parametrize(
    ("family", "minibatch", "end", "rank"),
    [("llama", 100, True, None), ("gpt2", 2, False, None), ("llama", 2, True, 3), ("gpt2", 1, False, 2)],
)
def test_the_change_is_that_of_autograd_and_adam(family: str, minibatch: int, end: bool, rank: int | None) -> None:
    session = open_session(
        family, epochs=3, minibatch=minibatch, append_end=end, rank=rank or "none", learning_rate=1e-2, skip_loss=0
    )
    [result] = session.edit(FACTS)
    [change] = result.proposal.changes.values()
    assert isinstance(change, DenseDelta if rank is None else FactoredDelta)
    model = tiny_model(family, dtype=torch.float64)
    expected = plain_training(model, epochs=3, minibatch=minibatch, rate=1e-2, end=end, rank=rank)
    # The loss is computed from float32 logits, and Adam divides by the gradient's size.
    assert (change.dense() - expected).norm() <= 1e-4 * expected.norm()


def test_no_entry_moves_by_more_than_the_limit() -> None:
    session = open_session(epochs=5, learning_rate=1e-2, max_change=1e-3)
    [result] = session.edit(FACTS)
    [change] = result.proposal.changes.values()
    assert change.dense().abs().max() == 1e-3


def test_training_ends_when_the_mean_loss_is_low_and_skips_facts_that_are_learnt() -> None:
    steps = [open_session(learning_rate=0.05, epochs=60, stop_loss=stop).edit(FACTS)[0] for stop in (0.0, 1.0)]
    epochs = [result.proposal.diagnostics["epochs"] for result in steps]
    assert 0 < epochs[1] < epochs[0] <= 60
    [change] = open_session(epochs=1, skip_loss=100.0).edit(FACTS)[0].proposal.changes.values()
    assert change.norm() == 0


def test_a_replayed_fact_counts_by_its_weight() -> None:
    """Trained together with the new fact, it is better kept the larger its weight."""
    kept = []
    for weight in (0.01, 100.0):
        config = SessionConfig(
            editor="ft",
            plugins=("replay",),
            settings={"ft": {"layer": 1, "learning_rate": 0.01, "epochs": 5}, "replay": {"replay_weight": weight}},
        )
        session = EditSession.open(tiny_model(), config)
        session.edit(FACTS[:1])
        [result] = session.edit(FACTS[1:2])
        assert [evidence.replayed for evidence in result.proposal.evidence] == [False, True]
        kept.append(result.proposal.evidence[1].figures["target_loss"])
    assert kept[1] < kept[0]


def test_the_seed_and_the_batch_decide_the_order() -> None:
    found = [
        open_session(seed=seed, epochs=2, minibatch=1).edit(FACTS)[0].proposal.changes.popitem()[1].dense()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(HParamsError, match="leave out either"):
        open_session(rank=2, max_change=0.1)
    with pytest.raises(HParamsError, match="layer 9 does not exist"):
        open_session(layer=9)
