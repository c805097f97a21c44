"""``retrieval`` keeps the contracts of editors and of attachments, on a model that repeats what it reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import Attachment, EditSession, LanguageModel, SessionConfig
from editcore.testing import AttachmentContract, EditorContract, repeating_model, tiny_requests


class TestRetrievalContract(EditorContract):
    """Statements are found by their words."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "retrieval"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {}

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return repeating_model


class TestRetrievedStatementsContract(AttachmentContract):
    """Two batches of one fact each, as the editor writes them."""

    @pytest.fixture
    def attachment_kind(self) -> str:
        return "retrieval"

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return repeating_model

    @pytest.fixture
    def attachments(self) -> tuple[Attachment, ...]:
        session = EditSession.open(repeating_model(), SessionConfig(editor="retrieval"))
        session.edit(tiny_requests(2), batch_size=1)
        return session.edited.attachments
