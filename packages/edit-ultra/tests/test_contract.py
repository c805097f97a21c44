"""``ultra`` keeps the contract of editors, with modules inside the MLP and beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import LanguageModel
from editcore.testing import EditorContract, check_presets, tiny_model


class TestUltraContract(EditorContract):
    """As published: gate and up projections, no start of the statistics."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "ultra"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"weights": [["mlp.gate_proj", [1]], ["mlp.up_proj", [1, 2]]], "learning_rate": 1e-3}


class TestSeveralPassesContract(TestUltraContract):
    """Attention and MLP of a model that stores weights as (in, out), with all that is not published."""

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return lambda: tiny_model("gpt2")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        weights = [["mlp.c_proj", [0, 1]], ["attn.c_proj", [1]]]
        return {"weights": weights, "learning_rate": 1e-3, "passes": 2, "warmup_facts": 4, "minibatch": 1}


def test_presets() -> None:
    published = {
        "llama-3-8b": (("mlp.gate_proj", (11, 12, 13, 14, 15)), ("mlp.up_proj", (18, 19, 20, 21, 22, 23, 24))),
        "qwen2.5-7b": tuple((name, tuple(range(18, 27))) for name in ("mlp.gate_proj", "mlp.up_proj")),
        "gpt-j-6b": (("mlp.fc_out", tuple(range(18, 27))),),
        "mistral-7b-v0.3": (("mlp.down_proj", (29, 30)),),
    }
    common = {"learning_rate": 1e-6, "ridge": 1.0, "passes": 1, "warmup_facts": 0}
    check_presets("ultra", {name: {**common, "weights": weights} for name, weights in published.items()})
