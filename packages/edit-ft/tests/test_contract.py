"""``ft`` keeps the contract of editors, with dense and with factored changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import LanguageModel
from editcore.testing import EditorContract, check_presets, tiny_model


class TestLocFtContract(EditorContract):
    """All entries of a matrix."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "ft"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layer": 1, "epochs": 4, "learning_rate": 1e-2}


class TestFactoredContract(TestLocFtContract):
    """Two factors, for a projection that stores its weight as (in, out)."""

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return lambda: tiny_model("gpt2")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layer": 1, "epochs": 4, "learning_rate": 1e-2, "rank": 4, "append_end": False, "minibatch": 1}


def test_presets() -> None:
    common = {"epochs": 25, "minibatch": 100, "learning_rate": 5e-4, "append_end": True, "skip_loss": 1e-2}
    check_presets("ft", {"llama-3-8b": {**common, "layer": 22}, "qwen2.5-7b": {**common, "layer": 6}})
