"""``gated-memory`` keeps the contract of editors."""

from __future__ import annotations

import pytest
from editcore.testing import EditorContract


class TestGatedMemoryContract(EditorContract):
    """A memory beside the second block, whose values are as large as what is remembered lets them be."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "gated-memory"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layer": 1, "clamp_norm_factor": 0.1}
