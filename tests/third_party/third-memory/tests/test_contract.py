"""``gated-memory`` keeps the contracts of editors and of attachments."""

from __future__ import annotations

import pytest
from editcore import Attachment, EditSession, SessionConfig
from editcore.testing import AttachmentContract, EditorContract, tiny_model, tiny_requests


class TestGatedMemoryContract(EditorContract):
    """A memory beside the second block, whose values are as large as what is remembered lets them be."""

    @pytest.fixture
    def editor_name(self) -> str:
        return "gated-memory"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"layer": 1, "clamp_norm_factor": 0.1}


class TestMemoryContract(AttachmentContract):
    """Two batches of one fact each, as the editor writes them."""

    @pytest.fixture
    def attachment_kind(self) -> str:
        return "gated-memory"

    @pytest.fixture
    def attachments(self) -> tuple[Attachment, ...]:
        session = EditSession.open(
            tiny_model(), SessionConfig(editor="gated-memory", settings={"gated-memory": {"layer": 1}})
        )
        session.edit(tiny_requests(2), batch_size=1)
        return tuple(entry.attachment for entry in session.ledger.entries if entry.attachment is not None)
