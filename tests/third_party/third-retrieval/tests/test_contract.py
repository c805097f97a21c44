"""``retrieval`` keeps the contracts of editors and of attachments, on a model that repeats what it has read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from editcore import Attachment, LanguageModel
from editcore.testing import AttachmentContract, EditorContract, tiny_model, tiny_requests


def repeating_model() -> LanguageModel:
    """A random model whose first attention hands on what it reads, so that words that were there become likelier."""
    model = tiny_model("gpt2")
    width = model.layout.d_model
    with torch.no_grad():
        model.weight("transformer.wpe.weight").mul_(0.1)
        for layer in range(model.layout.num_layers):
            model.projection(layer).weight.mul_(0.5)
            model.block(layer).attn.c_proj.weight.mul_(0.5)
        attention = model.block(0).attn
        attention.c_attn.weight[:, :width].mul_(0.1)  # queries: it reads everything alike
        attention.c_attn.weight[:, 2 * width :] = torch.eye(width)  # values
        attention.c_proj.weight.copy_(2 * torch.eye(width))
    return model


class TestRetrievalContract(EditorContract):
    """No weight is changed and no module wrapped."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "retrieval"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {}

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return repeating_model


class TestStatementsContract(AttachmentContract):
    """A statement each of two batches."""

    @pytest.fixture
    def attachment_kind(self) -> str:
        return "retrieved-context"

    @pytest.fixture
    def attachments(self) -> tuple[Attachment, ...]:
        return tuple(
            Attachment(
                kind="retrieved-context",
                fields={"statements": [f"{one.text} {one.target_new}"], "least_overlap": 0.5},
            )
            for one in tiny_requests(2)
        )
