"""The attachment: statements, of which the most similar ones are put before a prompt. No module is touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from editcore import Attachment, LanguageModel, ModelError

from edit_retrieval.hparams import RetrievalHParams
from edit_retrieval.similarity import ByEmbedding, ByTokens, Similarity

__all__ = ["RetrievedStatements"]

_ROOM = 64
"""Tokens that are kept free behind the prompt, for a target or an answer."""


class RetrievedStatements:
    """Finds, for each prompt, the most similar statements of all active batches."""

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        """Take up the statements. Of several about one fact (subject and prompt), only the newest counts. The settings
        are those of the newest attachment.

        Raises:
            ModelError: not all attachments have embeddings of the same model.
        """
        self._model = model
        self._settings = RetrievalHParams.model_validate(attachments[-1].fields["settings"])
        embedders = {attachment.fields["settings"]["embedder"] for attachment in attachments}
        if len(embedders) > 1:
            names = " and ".join(sorted(f"'{name}'" if name else "none" for name in embedders))
            raise ModelError(
                f"Statements with the embedders {names} cannot be compared with one prompt. Make the edits anew with "
                "one of them."
            )
        rows: dict[tuple[str, ...], tuple[str, torch.Tensor | None]] = {}
        for attachment in attachments:
            embeddings = attachment.tensors.get("embeddings")
            for row, fact in enumerate(attachment.fields["facts"]):
                about = tuple(fact["about"])
                rows.pop(about, None)
                rows[about] = fact["statement"], None if embeddings is None else embeddings[row]
        # Newest first, so that of equally similar statements the newest is chosen.
        self._statements = [statement for statement, _ in reversed(rows.values())]
        self._embeddings = [row for _, row in reversed(rows.values()) if row is not None]
        self._similarity: Similarity | None = None
        self._rewritten: dict[str, str] = {}

    def remove(self) -> None:
        """Forget the statements."""
        del self._model, self._statements, self._embeddings, self._similarity, self._rewritten

    def rewrite(self, prompt: str) -> str:
        """The prompt behind its most similar statements, or alone if none is similar enough.

        Statements for which the model has no room are left out, the least similar first.
        """
        if prompt not in self._rewritten:
            chosen = self._chosen(prompt)
            while chosen and self._model.room(text := self._before(prompt, chosen)) < _ROOM:
                chosen = chosen[1:]
            self._rewritten[prompt] = text if chosen else prompt
        return self._rewritten[prompt]

    def _before(self, prompt: str, chosen: Sequence[str]) -> str:
        statements = " ".join(self._settings.statement.replace("{}", statement) for statement in chosen)
        before, after = self._settings.context.removesuffix("{prompt}").split("{statements}")
        return f"{before}{statements}{after}{prompt}"

    def _chosen(self, prompt: str) -> list[str]:
        """The statements for a prompt, the most similar one last."""
        if self._similarity is None:
            self._similarity = self._compare()
        cosines = self._similarity(prompt)  # [n]
        order = np.argsort(-cosines, kind="stable")[: self._settings.count]
        least = self._settings.least_similarity
        return [self._statements[row] for row in order[::-1] if cosines[row] > 0 and cosines[row] >= least]

    def _compare(self) -> Similarity:
        if self._settings.embedder is None:
            return ByTokens(self._statements, self._settings.tokens)
        return ByEmbedding(torch.stack(self._embeddings), self._settings.embedder)
