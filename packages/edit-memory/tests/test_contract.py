"""``memory`` keeps the contracts of editors and of attachments, in both of its settings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import Attachment, EditSession, LanguageModel, SessionConfig
from editcore.testing import AttachmentContract, EditorContract, check_presets, tiny_model, tiny_requests

NEURALDB = {"layers": [1], "v_num_grad_steps": 8, "context_templates": ["{}", "Yes. {}"]}
GRACE = {"rule": "grace", "fact_token": "last", "layers": [1], "v_num_grad_steps": 8, "context_templates": ["{}"]}


class TestNeuralDbContract(EditorContract):
    """A gate on the cosine."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "memory"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return NEURALDB


class TestGraceContract(TestNeuralDbContract):
    """A codebook, beside a projection that stores its weight as (in, out)."""

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return lambda: tiny_model("gpt2")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return GRACE


class TestGatedMemoryContract(AttachmentContract):
    """Two batches of one fact each, as the editor writes them."""

    @pytest.fixture
    def attachment_kind(self) -> str:
        return "memory"

    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return NEURALDB

    @pytest.fixture
    def attachments(self, settings: dict[str, object]) -> tuple[Attachment, ...]:
        session = EditSession.open(tiny_model(), SessionConfig(editor="memory", settings={"memory": settings}))
        session.edit(tiny_requests(2), batch_size=1)
        return session.edited.attachments


class TestCodebookContract(TestGatedMemoryContract):
    """The same of the other setting."""

    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return GRACE


def test_presets() -> None:
    check_presets("memory")
