"""The editor: a fact becomes a statement. Nothing is trained, and no weight is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from editcore import (
    Attachment,
    EditBatch,
    EditContext,
    EditEvidence,
    EditRequest,
    LanguageModel,
    LedgerEntry,
    Proposal,
    RequestError,
    Written,
)

from edit_retrieval.hparams import RetrievalHParams
from edit_retrieval.similarity import embed

__all__ = ["RetrievalEditor"]


class RetrievalEditor:
    """Keeps what it is told as text. The model reads it again before a similar prompt (SCR; IKE, arXiv 2305.12740).

    Departures: similarity is that of TF-IDF vectors unless an embedding model is given (SCR: contriever-msmarco); the
    model is not asked which statements are relevant, there is a limit on the similarity instead; no demonstrations.
    """

    def __init__(self, hparams: RetrievalHParams) -> None:
        self.hparams = hparams

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Load the embedding model, if there is one.

        Raises:
            ModelError: there is no such sentence-embedding model.
        """
        return {} if self.hparams.embedder is None else {"width": embed(self.hparams.embedder, ["."]).shape[1]}

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """One statement per new request.

        A fact that was added to the batch has its statement already; a second one would stay when the fact is undone.

        Raises:
            RequestError: the batch is empty.
        """
        if not batch.requests:
            raise RequestError("retrieval: the batch is empty; give it a request.")
        statements = [_statement(request) for request in batch.new_requests]
        facts = [
            {"about": list(request.fact_key), "statement": statement}
            for request, statement in zip(batch.new_requests, statements, strict=True)
        ]
        embedder = self.hparams.embedder
        attachment = Attachment(
            kind="retrieval",
            fields={"facts": facts, "settings": self.hparams.model_dump(mode="json")},
            tensors={} if embedder is None else {"embeddings": embed(embedder, statements)},
        )
        evidence = tuple(
            EditEvidence(
                request_id=request.id,
                replayed=row >= batch.num_new,
                figures={"statement_tokens": float(len(model.read_text(_statement(request))))},
            )
            for row, request in enumerate(batch.requests)
        )
        return Proposal(attachment=attachment, evidence=evidence)

    def resolve(self, model: LanguageModel, entry: LedgerEntry, rows: Sequence[int], context: EditContext) -> Written:
        """The batch without some of its statements; see :class:`editcore.Resolves`."""
        attachment = entry.attachment
        assert attachment is not None
        kept = [row for row in rows if row < entry.num_new]
        fields = {**attachment.fields, "facts": [attachment.fields["facts"][row] for row in kept]}
        tensors = {name: tensor[kept] for name, tensor in attachment.tensors.items()}
        return Written(attachment=replace(attachment, fields=fields, tensors=tensors))


def _statement(request: EditRequest) -> str:
    return f"{request.text}{request.continuation}"
