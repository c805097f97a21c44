"""The editor: a fact becomes a statement, and nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editcore import (
    Attachment,
    EditBatch,
    EditContext,
    EditEvidence,
    LanguageModel,
    Proposal,
    RequestError,
)

from third_retrieval.hparams import RetrievalHParams

__all__ = ["RetrievalEditor"]


class RetrievalEditor:
    """Keeps what it is told as text; the model reads it when it is asked something similar."""

    def __init__(self, hparams: RetrievalHParams) -> None:
        self.hparams = hparams

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Nothing is learnt from the model."""
        return {}

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """One statement per request."""
        if not batch.requests:
            raise RequestError("statements: the batch is empty; give it a request.")
        statements = [f"{request.text} {request.target_new}" for request in batch.requests]
        return Proposal(
            attachment=Attachment(
                kind="retrieved-context",
                fields={"statements": statements, "least_overlap": self.hparams.least_overlap},
            ),
            evidence=tuple(
                EditEvidence(
                    request_id=request.id,
                    replayed=row >= batch.num_new,
                    figures={"words": len(statement.split())},
                )
                for row, (request, statement) in enumerate(zip(batch.requests, statements, strict=True))
            ),
        )
