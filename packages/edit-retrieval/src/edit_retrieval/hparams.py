"""Hyperparameters of ``retrieval``; imports no torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from editcore import HParams
from pydantic import Field, field_validator

__all__ = ["RetrievalHParams"]


class RetrievalHParams(HParams):
    """How statements are found, and how they are put before a prompt (SCR and IKE, arXiv 2305.12740)."""

    count: Annotated[int, Field(ge=1, le=100)] = 1
    """Statements before a prompt, at most. SCR takes 5 and lets the model judge which are relevant; a small model
    cannot."""
    least_similarity: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Cosine to the prompt below which a statement is left out. Neither SCR nor IKE has a limit."""
    tokens: Literal["words", "characters"] = "words"
    """What TF-IDF counts: ``words``, or sequences of two to four ``characters`` inside words, for languages without
    spaces. Without effect with an ``embedder``."""
    embedder: str | None = None
    """A sentence-embedding model that gives the cosine instead of TF-IDF: a folder or hub id that sentence-transformers
    loads."""
    statement: str = "{}."
    """The text of a statement; ``{}`` is the fact's prompt with its target."""
    context: str = "New Fact: {statements}\nPrompt: {prompt}"
    """What the model reads: the statements, the most similar one last, and the prompt. The default is IKE's."""

    @field_validator("statement")
    @classmethod
    def _has_a_place_for_the_fact(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError(f"it needs {{}} exactly once, where the fact goes; found {value!r}")
        return value

    @field_validator("context")
    @classmethod
    def _ends_with_the_prompt(cls, value: str) -> str:
        # The end, because what is scored or generated follows this text as it would follow the prompt.
        if value.count("{statements}") != 1 or value.count("{prompt}") != 1 or not value.endswith("{prompt}"):
            raise ValueError(f"it needs {{statements}} once, and ends with {{prompt}}; found {value!r}")
        return value

    @field_validator("embedder")
    @classmethod
    def _can_be_loaded(cls, value: str | None) -> str | None:
        if value is not None and find_spec("sentence_transformers") is None:
            raise ValueError(
                "it needs the package sentence-transformers (pip install 'edit-retrieval[embedding]'); without an "
                "embedder statements are found by their words"
            )
        if value is not None and value.startswith(("/", ".")) and not Path(value).is_dir():
            raise ValueError(f"there is no folder {value}; it has to be one, or a hub id")
        return value
