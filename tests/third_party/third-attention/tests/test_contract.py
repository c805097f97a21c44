"""``attention`` keeps the contract of editors, on a model whose attention has a bias and on one without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import LanguageModel
from editcore.testing import EditorContract, tiny_model


class TestAttentionContract(EditorContract):
    """A matrix alone."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "attention"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layer": 1}


class TestAttentionWithBiasContract(TestAttentionContract):
    """A matrix that is stored (in, out), and its bias."""

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return lambda: tiny_model("gpt2")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layer": 1, "module": "attn.c_proj"}
