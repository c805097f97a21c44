"""``template-name`` keeps the contract of editors."""

from __future__ import annotations

import pytest
from editcore.testing import EditorContract


class TestTemplateNameContract(EditorContract):
    @pytest.fixture
    def editor_name(self) -> str:
        return "template-name"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layers": [1]}
