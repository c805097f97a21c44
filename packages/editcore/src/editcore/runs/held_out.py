"""The text for perplexity at checkpoints, which no edit is about. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from editcore.interfaces.progress import Progress, silent

if TYPE_CHECKING:
    from editcore.models import LanguageModel
    from editcore.second_moments.corpora import Corpus

__all__ = ["TEXT_TOKENS", "TEXT_WINDOW", "HeldOutText", "TextInfo", "held_out"]

TEXT_TOKENS = 2048
"""Tokens of the text. Measuring them takes about as long as a hundred prompts."""
TEXT_WINDOW = 256
"""Tokens of one window of the text."""
SEED_OFFSET = 1
"""Added to the run's seed when the model writes the text, so that it differs from the text of the second moments."""


class TextInfo(BaseModel):
    """The text for perplexity."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str
    """What identifies the text: ``self:ancestral:SEED`` for text of the model, or a name with a hash."""
    tokens: int
    window: int
    """Tokens of one forward pass; see :func:`editcore.evaluation.perplexity`."""
    perplexity: float
    """Of the unedited model."""


class HeldOutText(TextInfo):
    """A text with its tokens, kept so that a resumed run measures the same one."""

    ids: tuple[int, ...]

    @classmethod
    def measured(
        cls, model: LanguageModel, corpus: Corpus, *, tokens: int = TEXT_TOKENS, progress: Progress = silent
    ) -> HeldOutText:
        """A text, with the perplexity of a model that has no edits now.

        Args:
            corpus: the text, as :func:`held_out` finds it.
            tokens: how many to take from the start of the text.

        Raises:
            StatisticsError: the text cannot be read or is shorter than a window.
        """
        from editcore.evaluation import perplexity

        window = TEXT_WINDOW if model.positions is None else min(TEXT_WINDOW, model.positions)
        rows = [tuple(row) for row in corpus.sequences(model, tokens, window, progress=progress).tolist()]
        opening = model.opening_ids
        ids = tuple(token for row in rows for token in row[len(opening) * (row[: len(opening)] == opening) :])
        value = perplexity(model, ids, window=window, progress=progress)
        return cls(source=corpus.identity(), tokens=len(ids), window=window, perplexity=value, ids=ids)

    def info(self) -> TextInfo:
        """The description without the tokens."""
        return TextInfo(**self.model_dump(exclude={"ids"}))


def held_out(name: str | None, seed: int, *, beside: Corpus) -> Corpus:
    """The text for the perplexity of a run.

    Args:
        name: as :func:`editcore.second_moments.open_corpus` knows it; ``None`` is text of the model itself.
        beside: the text of the second moments, from which text of the model itself must differ.

    Raises:
        StatisticsError: there is no such file.
    """
    from editcore.second_moments.corpora import open_corpus

    found = open_corpus(name or "self", seed=seed + SEED_OFFSET)
    if name is None and found.identity() == beside.identity():
        found = open_corpus("self", seed=seed + 2 * SEED_OFFSET)
    return found
