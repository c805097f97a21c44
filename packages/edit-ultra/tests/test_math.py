"""The edit against plain loops in float64, and its statistics in any order of undoing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from edit_ultra.activations import read_tokens
from edit_ultra.moments import EPSILON, Moments
from editcore import EditRequest, EditSession, HParamsError, LanguageModel, SessionConfig
from editcore.testing import tiny_model, tiny_requests
from hypothesis import given, settings, strategies as st
from torch import Tensor

FACTS = tiny_requests(5)
UP = "model.layers.1.mlp.up_proj.weight"


def open_session(family: str = "llama", **changes: object) -> EditSession:
    values = {"weights": [["mlp.up_proj", [1]]], "learning_rate": 1e-3, **changes}
    return EditSession.open(
        tiny_model(family, dtype=torch.float64), SessionConfig(editor="ultra", settings={"ultra": values})
    )


def plain_tokens(model: LanguageModel, facts: Sequence[EditRequest], address: str) -> list[tuple[Tensor, Tensor]]:
    """(h, g) of each target token: g by moving the module's output at one position, with autograd."""
    module = model.hf.get_submodule(address.removesuffix(".weight"))
    found = []
    for fact in facts:
        prompt = model.tokenizer(fact.text)["input_ids"]
        ids = model.tokenizer(fact.text + fact.continuation)["input_ids"]
        seen: list[Tensor] = []
        width = model.as_out_in(address, model.weight(address)).shape[0]
        moved = torch.zeros(len(ids), width, dtype=torch.float64, requires_grad=True)

        def hook(_module: object, args: tuple[Tensor], output: Tensor, moved: Tensor = moved) -> Tensor:
            seen.append(args[0].detach())  # noqa: B023
            return output + moved

        handle = module.register_forward_hook(hook)
        logits = model.hf(torch.tensor([ids])).logits[0].float()
        handle.remove()
        at = range(len(prompt), len(ids))
        loss = torch.stack([-logits[place - 1].log_softmax(-1)[ids[place]] for place in at]).mean()
        loss.backward()
        assert moved.grad is not None
        found += [(seen[0][0, place - 1], moved.grad[place - 1]) for place in at]
    return found


def plain_edit(tokens: list[tuple[Tensor, Tensor]], earlier: list[tuple[Tensor, Tensor]], *, rate: float) -> Tensor:
    """Δ by the equations of the paper, entry by entry, with the plain inverse of HᵀH + I."""
    rows = [torch.cat(pair) for pair in [*earlier, *tokens]]
    width, size = len(rows[0]), len(tokens[0][0])
    mean = [math.fsum(float(row[at]) for row in rows) / len(rows) for at in range(width)]
    sigma = [
        math.sqrt(math.fsum((float(row[at]) - mean[at]) ** 2 for row in rows) / (len(rows) - 1)) for at in range(width)
    ]
    values = []
    for pair in tokens:
        row = torch.cat(pair)
        hat = torch.tensor([(float(row[at]) - mean[at]) / (sigma[at] + EPSILON) for at in range(width)]).double()
        values.append(-rate * hat[:size].square().sum() * hat[size:])
    inputs = torch.stack([pair[0] for pair in tokens])
    inverse = torch.linalg.inv(inputs.T @ inputs + torch.eye(size, dtype=torch.float64))
    return (inverse @ inputs.T @ torch.stack(values)).T


@pytest.mark.parametrize(
    ("family", "module", "address"),
    [("llama", "mlp.up_proj", UP), ("gpt2", "attn.c_attn", "transformer.h.1.attn.c_attn.weight")],
)
def test_two_batches_are_those_of_the_paper(family: str, module: str, address: str) -> None:
    session, plain = open_session(family, weights=[[module, [1]]]), tiny_model(family, dtype=torch.float64)
    earlier: list[tuple[Tensor, Tensor]] = []
    for part in (FACTS[:3], FACTS[3:]):
        [result] = session.edit(part)
        tokens = plain_tokens(plain, part, address)
        expected = plain_edit(tokens, earlier, rate=1e-3)
        found = result.proposal.changes[address].dense()
        # The loss is computed from float32 logits.
        assert (found - expected).norm() <= 1e-4 * expected.norm()
        earlier += tokens
        weight = plain.weight(address)
        weight.data += plain.as_out_in(address, expected)


def test_a_second_pass_begins_where_the_first_ended() -> None:
    [once] = (session := open_session()).edit(FACTS)
    [twice] = open_session(passes=2).edit(FACTS)
    first, both = once.proposal.changes[UP], twice.proposal.changes[UP]
    more = both.dense() - first.dense()
    tokens, _ = read_tokens(session.model, FACTS, [UP], minibatch=10)  # on the model with the first pass
    rows = torch.cat([tokens[UP].inputs, tokens[UP].gradients], dim=1)
    before, _ = read_tokens(tiny_model(dtype=torch.float64), FACTS, [UP], minibatch=10)
    moments = Moments.of(torch.cat([before[UP].inputs, before[UP].gradients], dim=1))
    hat = moments.normalised(rows)
    size = tokens[UP].inputs.shape[1]
    values = -1e-3 * hat[:, :size].square().sum(1, keepdim=True) * hat[:, size:]
    inputs = tokens[UP].inputs
    expected = (torch.linalg.inv(inputs.T @ inputs + torch.eye(size)) @ inputs.T @ values).T
    assert (more - expected).norm() <= 1e-6 * expected.norm()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 100))
def test_joined_statistics_are_those_of_all_rows(sizes: list[int], seed: int) -> None:
    rows = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed)) * 5 + 100
    first, *rest = (Moments.of(part) for part in rows.split(sizes))
    for part in rest:
        first = first.joined(part)
    assert first.count == len(rows)
    assert torch.allclose(first.mean, rows.double().mean(0), rtol=1e-12)
    expected = (rows.double() - rows.double().mean(0)).square().sum(0)
    assert torch.allclose(first.deviation, expected, rtol=1e-9, atol=1e-9)
    again = Moments.read(first.tensors("name"), "name")
    assert torch.equal(again.normalised(rows), first.normalised(rows))


def test_undone_batches_leave_the_statistics() -> None:
    """A later batch is then as if they had never been there."""
    detour, straight = open_session(), open_session()
    for session in (detour, straight):
        session.edit(FACTS[:2])
    detour.edit(FACTS[2:4])
    detour.undo(*(fact.id for fact in FACTS[2:4]))
    found = [session.edit(FACTS[4:])[0].proposal.changes[UP].left for session in (detour, straight)]
    assert torch.equal(found[0], found[1])


def test_one_token_alone_changes_nothing_and_says_so() -> None:
    short = FACTS[0].model_copy(update={"target_new": "Paris"})
    session = open_session()
    assert len(session.model.read_text(" Paris")) == 1, "the test needs a target of one token"
    [result] = session.edit([short])
    assert any("The change of this batch is zero" in note for note in result.proposal.notes)
    assert open_session(warmup_facts=8).edit([short])[0].proposal.changes[UP].norm() > 0


def test_a_fact_counts_by_its_weight() -> None:
    config = {"ultra": {"weights": [["mlp.up_proj", [1]]], "learning_rate": 1e-3}}
    kept = []
    for weight in (0.01, 100.0):
        session = EditSession.open(
            tiny_model(),
            SessionConfig(
                editor="ultra", plugins=("replay",), settings={**config, "replay": {"replay_weight": weight}}
            ),
        )
        session.edit(FACTS[:2])
        [result] = session.edit(FACTS[2:4])
        replayed = [evidence for evidence in result.proposal.evidence if evidence.replayed]
        kept.append(sum(evidence.figures["target_loss"] for evidence in replayed))
    assert kept[1] < kept[0]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([["mlp.up_proj", [7]]], "layer 7 does not exist"),
        ([["mlp.upward", [1]]], "has no weight"),
        ([["input_layernorm", [1]]], "is not linear in tiny-llama. .*such as 'mlp.down_proj'"),
        ([["mlp.up_proj", []]], "not empty|at least 1"),
        ([], "not empty|at least 1"),
    ],
)
def test_weights_that_are_not_there_are_refused(weights: list[object], sentence: str) -> None:
    with pytest.raises(HParamsError, match=sentence):
        open_session(weights=weights)


def test_a_block_that_the_model_does_not_have_is_seen_before_the_model_is_loaded(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").write_text("no weights")
    config = SessionConfig(editor="ultra", settings={"ultra": {"weights": [["mlp.up_proj", [7]]]}})
    with pytest.raises(HParamsError, match="layer 7 does not exist"):
        EditSession.open(tmp_path / "tiny", config)
