"""MEMIT keeps the contract of editors, on models that store their weights either way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import LanguageModel
from editcore.testing import EditorContract, tiny_model


class TestMemitContract(EditorContract):
    """Two layers, the weight found from the keys."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "memit"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layers": [0, 1], "v_num_grad_steps": 20, "context_templates": ["{}"]}


class TestMemitWithAWeightContract(TestMemitContract):
    """A given weight, and weights stored as (in, out)."""

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return lambda: tiny_model("gpt2")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {
            "layers": [0, 1],
            "mom2_update_weight": 0.1,
            "v_num_grad_steps": 20,
            "context_templates": ["{}", "Yes, yes. {}"],
        }


class TestMemitSeqContract(TestMemitContract):
    """A memory of earlier keys, and a norm term."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "memit-seq"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {
            "layers": [0, 1],
            "update_norm_lambda": 0.1,
            "v_num_grad_steps": 20,
            "context_templates": ["{}"],
        }
