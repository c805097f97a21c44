"""F, the second moment of the directions of a text's gradients, against gradients of one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from editcore.models import LanguageModel
from editcore.second_moments import CorpusOptions
from editcore.second_moments.output_gradients import gradient_moments
from editcore.second_moments.statistics import StatisticsStore
from editcore.testing import tiny_model
from torch import Tensor


def gradient(model: LanguageModel, row: Tensor, layer: int, token: int) -> Tensor:
    """∂ −log p(row) / ∂ output of the projection for one token, by a shift of that output alone."""
    shift = torch.zeros(model.layout.d_model, dtype=torch.float64, requires_grad=True)

    def add(_module: object, _args: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :token], output[:, token : token + 1] + shift, output[:, token + 1 :]], dim=1)

    handle = model.projection(layer).register_forward_hook(add)
    scores = model.hf(input_ids=row[None]).logits[0].log_softmax(-1)
    handle.remove()
    loss = -sum(scores[place, row[place + 1]] for place in range(len(row) - 1))
    return torch.autograd.grad(loss, shift)[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_every_token_counts_by_the_direction_of_its_gradient(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    text = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    found = gradient_moments(model, text, [0, 1])
    for layer in (0, 1):
        seen = torch.stack([gradient(model, row, layer, token) for row in text for token in range(1, 6)])
        directions = seen / seen.norm(dim=1, keepdim=True)
        expected = directions.T @ directions / len(directions) * model.layout.d_model
        torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-5)
        assert found[layer].trace() == pytest.approx(model.layout.d_model, rel=1e-5)


def test_a_moment_of_gradients_is_kept_beside_the_keys_moment(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = tiny_model("llama", dtype=torch.float64), CorpusOptions(name=str(corpus_file), tokens=400)
    store = StatisticsStore(model, options)
    first, length = store.gradient_moment(1), store.key(1).sequence_length
    rows = store.corpus.sequences(model, 400, length)
    used = rows[: -(-6 * model.layout.d_model // length)]
    assert len(used) < len(rows), "the beginning of the text"
    torch.testing.assert_close(first, gradient_moments(model, used, [1])[1])
    monkeypatch.setattr("editcore.second_moments.statistics.gradient_moments", None)
    assert torch.equal(StatisticsStore(model, options).gradient_moment(1), first)
