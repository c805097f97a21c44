"""ROME keeps the contract of editors, whichever key it writes at and however a model stores its weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import LanguageModel
from editcore.testing import EditorContract, tiny_model


class TestRomeContract(EditorContract):
    """The default: one key in all places."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "rome"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layers": [1], "v_num_grad_steps": 20, "context_templates": ["{}"]}


class TestOriginalRomeContract(TestRomeContract):
    """Two keys, and weights stored as (in, out)."""

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return lambda: tiny_model("gpt2")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        templates = ["{}", "Yes, yes. {}"]
        return {"layers": [1], "key_mode": "original", "v_num_grad_steps": 20, "context_templates": templates}
