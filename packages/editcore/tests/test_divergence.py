"""Next-token distributions, and how far they moved."""

from __future__ import annotations

import pytest
import torch
from editcore.evaluation import kl_divergences, next_token_log_probabilities
from editcore.testing import tiny_model, tiny_requests, tiny_tokenizer
from hypothesis import given, settings, strategies as st

PROMPTS = [*(request.text for request in tiny_requests(20)), "So", "The capital of France is a city in the north"]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_each_prompt_has_what_the_model_says_behind_it_alone(padding_side: str) -> None:
    model = tiny_model(
        dtype=torch.float64,
        tokenizer=tiny_tokenizer(padding_side=padding_side),  # type: ignore[arg-type]
    )
    found = next_token_log_probabilities(model, PROMPTS)
    assert (found.dtype, len(found)) == (torch.float64, len(PROMPTS))
    with torch.inference_mode():
        for prompt, row in zip(PROMPTS, found, strict=True):
            ids = torch.tensor([model.read_prompt(prompt)[0]])
            alone = model.hf(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-6)  # parts of the model compute in float32


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 9))
def test_the_divergence_is_that_of_torch(seed: int, rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after = (
        (5 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).log_softmax(-1) for _ in range(2)
    )
    expected = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_divergences(before, after), expected.clamp_min(0.0))
    assert kl_divergences(before, before).abs().max() == 0.0


def test_tokens_that_were_impossible_add_nothing_and_those_that_became_so_everything() -> None:
    half = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    quarters = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    assert kl_divergences(half, quarters).item() == pytest.approx(0.6931471805599453)
    assert kl_divergences(quarters, half).item() == torch.inf
