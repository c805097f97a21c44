"""The head at chosen positions gives the numbers of the whole forward pass."""

from __future__ import annotations

import copy

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


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_head_gives_the_logits_of_float32(family: str, dtype: torch.dtype) -> None:
    """The model's own code behind its own hidden states, in float32 arithmetic."""
    special = {"gemma2": {"final_logit_softcapping": 3.0}, "cohere": {"logit_scale": 0.25}}
    model = tiny_model(family, dtype=dtype, config=special.get(family))
    ids, mask = batch()
    read: list[torch.Tensor] = []

    def reads(_head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        read.append(args[0])

    def reads_the_same(_head: torch.nn.Module, _args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (read[0].float(),)

    wide = copy.deepcopy(model.hf).float()
    wide.get_output_embeddings().register_forward_pre_hook(reads_the_same)
    handle = model.hf.get_output_embeddings().register_forward_pre_hook(reads)
    before = model.fingerprint()
    with torch.no_grad():
        narrow = model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits[ROWS, POSITIONS]
        handle.remove()
        expected = wide(input_ids=ids, attention_mask=mask).logits[ROWS, POSITIONS]
        found = logits_at(model, ids, mask, ROWS, POSITIONS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (narrow.float() - expected).abs().max() > 1e-4, "otherwise nothing was shown"
    assert model.fingerprint() == before
    head = model.hf.get_output_embeddings()
    assert isinstance(head.weight, torch.nn.Parameter)
    assert head.weight.dtype == dtype


def test_logits_that_tie_in_bfloat16_are_told_apart() -> None:
    """Two tokens whose logits differ by less than bfloat16 has digits: the likelier one is the answer."""
    model = tiny_model(dtype=torch.bfloat16)
    ids, mask = batch()
    head = model.hf.get_output_embeddings().weight
    with torch.no_grad():
        head[11] = head[10] = 8 * head[10]
        head[11, head[11].abs().argmin()] += 2**-9
        tied = model.hf(input_ids=ids, attention_mask=mask).logits[ROWS, POSITIONS]
        found = logits_at(model, ids, mask, ROWS, POSITIONS)
    ties = tied[:, 10] == tied[:, 11]
    assert ties.any()
    assert (found[ties, 10] != found[ties, 11]).all()


def test_a_narrow_head_is_itself_again_after_an_exception() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    ids, mask = batch()
    head = model.hf.get_output_embeddings()
    weight = head.weight

    def fails(*_: object) -> None:
        raise KeyError

    handle = head.register_forward_hook(fails)
    with pytest.raises(KeyError):
        logits_at(model, ids, mask, ROWS, POSITIONS)
    handle.remove()
    assert head.weight is weight
    assert not head._forward_pre_hooks


def test_a_narrow_head_that_asks_for_a_gradient_has_it() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    ids, mask = batch()
    weight = model.hf.get_output_embeddings().weight.requires_grad_()
    found = logits_at(model, ids, mask, ROWS, POSITIONS)
    (gradient,) = torch.autograd.grad(found.logsumexp(-1).sum(), weight)
    assert gradient.dtype == torch.bfloat16
    assert gradient.abs().sum() > 0


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
