"""``statements`` keeps the contracts of editors and of attachments, on a model that repeats what it has read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from editcore import Attachment, LanguageModel
from editcore.testing import AttachmentContract, EditorContract, repeating_model, tiny_requests


class TestRetrievalContract(EditorContract):
    """No weight is changed and no module wrapped."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "statements"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {}

    @pytest.fixture
    def make_model(self) -> Callable[[], LanguageModel]:
        return repeating_model


class TestStatementsContract(AttachmentContract):
    """A statement each of two batches."""

    @pytest.fixture
    def attachment_kind(self) -> str:
        return "retrieved-context"

    @pytest.fixture
    def attachments(self) -> tuple[Attachment, ...]:
        return tuple(
            Attachment(
                kind="retrieved-context",
                fields={"statements": [f"{request.text} {request.target_new}"], "least_overlap": 0.5},
            )
            for request in tiny_requests(2)
        )
