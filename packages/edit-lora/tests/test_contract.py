"""The backend keeps the contract of backends: exact, and where a bounded rank sends every projection back to raw."""

from __future__ import annotations

import pytest
from editcore.testing import BackendContract


class TestLoraContract(BackendContract):
    """Exact, the default."""

    @pytest.fixture
    def backend_name(self) -> str:
        return "lora"


class TestLoraFallbackContract(TestLoraContract):
    """A rank that is too small, where too small means raw."""

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"lora_rank": 1, "lora_residual_threshold": 0.01, "allow_fallback": True}
