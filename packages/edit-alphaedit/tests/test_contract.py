"""AlphaEdit keeps the contract of editors, on models that store their weights either way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import LanguageModel
from editcore.testing import EditorContract, tiny_model


class TestAlphaEditContract(EditorContract):
    """Two layers; null space and L2 found from the model."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "alphaedit"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layers": [0, 1], "v_num_grad_steps": 20, "context_templates": ["{}"]}


class TestPublishedAlphaEditContract(TestAlphaEditContract):
    """Given numbers, two values per fact, and weights stored as (in, out)."""

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return lambda: tiny_model("gpt2")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {
            "layers": [0, 1],
            "layer_rule": "blue",
            "nullspace_threshold": 0.3,
            "L2": 0.01,
            "v_num_grad_steps": 20,
            "context_templates": ["{}", "Yes, yes. {}"],
        }
