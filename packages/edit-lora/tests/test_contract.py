"""The backend keeps the contract of backends: exact, and where a bounded rank sends every projection back to raw."""

from __future__ import annotations

import pytest
from edit_lora.backend import LoraBackend
from editcore import BackendContext
from editcore.testing import BackendContract


class TestLoraContract(BackendContract):
    """Exact, the default."""

    @pytest.fixture
    def backend_name(self) -> str:
        return "lora"


class TestLoraOfAnotherAlphaContract(TestLoraContract):
    """α changes how factors are written, and nothing else."""

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"lora_alpha": 0.7}


class TestLoraFallbackContract(TestLoraContract):
    """A rank that is too small, where too small means raw."""

    @pytest.fixture(autouse=True)
    def moments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        def opened(backend: LoraBackend, model: object) -> None:
            moments = lambda layers: {layer: torch.eye(model.layout.d_ff, dtype=torch.float64) for layer in layers}  # noqa: E731
            backend.take(BackendContext(moments=moments))
            plain(backend, model)

        plain = LoraBackend.open
        monkeypatch.setattr(LoraBackend, "open", opened)

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"lora_rank": 1, "lora_residual_threshold": 0.01, "allow_fallback": True}
