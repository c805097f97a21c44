"""How similar a prompt is to each statement: cosines of TF-IDF vectors, or of embeddings.

Shapes: ``n`` statements, ``width`` of an embedding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from editcore import ModelError
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ByEmbedding", "ByTokens", "Similarity", "embed"]


class Similarity(Protocol):
    """Compares prompts with fixed statements."""

    def __call__(self, prompt: str) -> NDArray[np.float64]:
        """The cosine of a prompt to each statement, ``[n]``."""
        ...


class ByTokens:
    """Cosines of TF-IDF vectors (scikit-learn's, with smooth idf).

    Args:
        statements: one or more.
        tokens: as in :attr:`RetrievalHParams.tokens`.
    """

    def __init__(self, statements: Sequence[str], tokens: str) -> None:
        kind: dict[str, Any] = {"analyzer": "word", "token_pattern": r"\w+|[^\w\s]"}
        if tokens == "characters":
            kind = {"analyzer": "char_wb", "ngram_range": (2, 4)}
        self._vectorizer = TfidfVectorizer(norm=None, **kind)
        self._analyse = self._vectorizer.build_analyzer()
        matrix = self._vectorizer.fit_transform(statements)  # [n, tokens]
        self._matrix, self._norms = matrix, np.sqrt(matrix.power(2).sum(axis=1)).A1
        self._rarest = math.log(1 + len(statements)) + 1  # smooth idf of a token that no statement has

    def __call__(self, prompt: str) -> NDArray[np.float64]:
        """See :class:`Similarity`.

        The length of the prompt's vector includes tokens that no statement has, unlike with scikit-learn alone.
        Otherwise a question about somebody else would be as similar as one about the subject.
        """
        vector = self._vectorizer.transform([prompt])  # [1, tokens]
        counts = Counter(self._analyse(prompt))
        unknown = sum(count**2 for token, count in counts.items() if token not in self._vectorizer.vocabulary_)
        norm = math.sqrt(float(vector.power(2).sum()) + self._rarest**2 * unknown)
        if norm == 0:  # a prompt of white space
            return np.zeros(len(self._norms))
        cosines: NDArray[np.float64] = (self._matrix @ vector.T).toarray().ravel() / (self._norms * norm)
        return cosines


class ByEmbedding:
    """Cosines of sentence embeddings.

    Args:
        embeddings: of the statements, of norm 1, ``[n, width]``.
        embedder: the model that made them.
    """

    def __init__(self, embeddings: Tensor, embedder: str) -> None:
        self._embeddings, self._embedder = embeddings, embedder

    def __call__(self, prompt: str) -> NDArray[np.float64]:
        """See :class:`Similarity`."""
        cosines = self._embeddings.double() @ embed(self._embedder, [prompt])[0].double()  # [n]
        return cosines.numpy()


def embed(embedder: str, texts: Sequence[str]) -> Tensor:
    """Embeddings of norm 1, ``[n, width]`` float32 on the CPU.

    Raises:
        ModelError: there is no such sentence-embedding model.
    """
    found = _loaded(embedder).encode(
        list(texts), normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
    )
    return torch.as_tensor(found).float().cpu()


# One model for the process: attachments are installed anew for every batch. Its weights never change.
@lru_cache(maxsize=1)
def _loaded(embedder: str) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(embedder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"retrieval: there is no sentence-embedding model '{embedder}' ({reason}). Set embedder to a folder or hub "
            "id that sentence-transformers loads, or leave it out."
        ) from error
