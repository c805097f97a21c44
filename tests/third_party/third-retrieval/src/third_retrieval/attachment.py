"""Statements that are put in front of prompts. No module of the model is touched."""

from __future__ import annotations

import re
from collections.abc import Sequence

from editcore import Attachment, LanguageModel

__all__ = ["RetrievedContext"]


class RetrievedContext:
    """Finds, for each prompt, the statement that shares most words with it."""

    def __init__(self) -> None:
        self._statements: list[tuple[str, float]] = []

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        """Take up the statements of all batches; of equally similar ones the newest wins."""
        self._statements = [
            (statement, attachment.fields["least_overlap"])
            for attachment in attachments
            for statement in attachment.fields["statements"]
        ]

    def remove(self) -> None:
        """Forget them."""
        self._statements = []

    def rewrite(self, prompt: str) -> str:
        """The prompt behind the most similar statement, or as it is if none is similar enough."""
        asked = _words(prompt)
        similar = [
            (len(asked & _words(statement)) / len(asked), number, statement)
            for number, (statement, _) in enumerate(self._statements)
            if asked
        ]
        fitting = [hit for hit in similar if hit[0] >= self._statements[hit[1]][1]]
        return f"{max(fitting)[2]}. {prompt}" if fitting else prompt


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
