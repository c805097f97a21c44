"""The head at chosen positions gives the numbers of the whole forward pass."""

from __future__ import annotations

import pytest
import torch
from editcore.interfaces.errors import ModelError
from editcore.models import LanguageModel
from editcore.models.forward import logits_at
from editcore.testing import TINY_FAMILIES, tiny_model
from transformers import DynamicCache

ROWS = torch.tensor([0, 1, 1, 2])
POSITIONS = torch.tensor([8, 5, 0, 3])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    special = {"gemma2": {"final_logit_softcapping": 3.0}, "cohere": {"logit_scale": 0.25}}
    return tiny_model(request.param, config=special.get(request.param))


def test_equals_the_full_forward(model: LanguageModel) -> None:
    ids, mask = batch()
    with torch.no_grad():
        expected = model.hf(input_ids=ids, attention_mask=mask).logits[ROWS, POSITIONS]
        found = logits_at(model, ids, mask, ROWS, POSITIONS)
    assert found.shape == (4, expected.shape[-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # sums in another order
    assert not model.hf.get_output_embeddings()._forward_pre_hooks


def test_soft_cap_and_scale_stay_in_force() -> None:
    ids, mask = batch()
    capped = logits_at(tiny_model("gemma2", config={"final_logit_softcapping": 0.5}), ids, mask, ROWS, POSITIONS)
    assert capped.abs().max() <= 0.5
    small, large = (
        logits_at(tiny_model("cohere", config={"logit_scale": scale}), ids, mask, ROWS, POSITIONS)
        for scale in (0.25, 0.5)
    )
    torch.testing.assert_close(2 * small, large)


def test_gradients_are_those_of_the_full_forward() -> None:
    model = tiny_model("llama")
    ids, mask = batch()
    delta = torch.zeros(model.layout.d_model, requires_grad=True)
    handle = model.projection(1).register_forward_hook(lambda _module, _args, output: output + delta)
    try:
        full = model.hf(input_ids=ids, attention_mask=mask).logits[ROWS, POSITIONS]
        (expected,) = torch.autograd.grad(full.logsumexp(-1).sum(), delta)
        few = logits_at(model, ids, mask, ROWS, POSITIONS)
        (found,) = torch.autograd.grad(few.logsumexp(-1).sum(), delta)
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt", "gpt_neox"])
def test_continues_from_a_cache(family: str) -> None:
    model = tiny_model(family)
    ids, _ = batch()
    cache = DynamicCache(config=model.hf.config)
    name = model.cache_argument
    index = torch.arange(3)
    with torch.no_grad():
        expected = model.hf(input_ids=ids).logits[:, -1]
        logits_at(model, ids[:, :6], None, index, torch.full((3,), 5), use_cache=True, **{name: cache})
        positions = torch.arange(6, 9)[None].expand(3, -1)
        found = logits_at(
            model, ids[:, 6:], None, index, torch.full((3,), 2),
            use_cache=True, position_ids=positions, **{name: cache},
        )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hook_is_removed_after_an_exception() -> None:
    model = tiny_model("gpt2")
    ids, mask = batch()
    with pytest.raises(IndexError):
        logits_at(model, ids, mask, torch.tensor([7]), torch.tensor([0]))
    assert not model.hf.get_output_embeddings()._forward_pre_hooks


def test_a_head_that_is_not_called_is_an_error() -> None:
    model = tiny_model("gpt2")
    ids, mask = batch()
    head = model.hf.get_output_embeddings()
    bypass = torch.nn.Linear(head.in_features, head.out_features, bias=False)
    model.hf.get_output_embeddings = lambda: bypass
    with pytest.raises(ModelError, match="called its output embedding 0 times"):
        logits_at(model, ids, mask, ROWS, POSITIONS)
    model.hf.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="has no output embedding"):
        logits_at(model, ids, mask, ROWS, POSITIONS)
