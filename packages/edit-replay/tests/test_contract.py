"""``replay`` keeps the contract of extensions, whatever joins a batch."""

from __future__ import annotations

import pytest
from editcore.testing import ExtensionContract


class TestReplayContract(ExtensionContract):
    """As it comes: facts are solved for again, and keys are held."""

    @pytest.fixture
    def extension_name(self) -> str:
        return "replay"


class TestFullBufferContract(TestReplayContract):
    """A buffer that drops facts, in the order in which they were used, and asks the model what it holds."""

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {
            "replay_mode": "requests",
            "replay_rate": 2,
            "replay_strategy": "priority",
            "replay_buffer_size": 3,
            "replay_eviction": "lru",
            "replay_check": "model",
        }
