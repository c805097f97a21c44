"""``finetune`` keeps the contract of editors, on models that store their matrices either way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import LanguageModel
from editcore.testing import EditorContract, tiny_model


class TestFinetuneContract(EditorContract):
    """Adam, on a matrix that is stored (out, in)."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "finetune"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"weight": "model.layers.1.mlp.up_proj.weight"}


class TestFinetuneInOutContract(TestFinetuneContract):
    """Plain gradient steps, on a matrix that is stored (in, out)."""

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return lambda: tiny_model("gpt2")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"weight": "transformer.h.1.mlp.c_fc.weight", "optimiser": "sgd", "learning_rate": 0.05}
