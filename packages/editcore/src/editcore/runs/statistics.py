"""The second moments that a session or a run uses."""

from __future__ import annotations

from editcore.interfaces.progress import Progress, silent
from editcore.models import LanguageModel
from editcore.runs.config import RunConfig, SessionConfig
from editcore.second_moments.statistics import CorpusOptions, StatisticsStore

__all__ = ["statistics_of"]


def statistics_of(
    config: SessionConfig | RunConfig, model: LanguageModel, *, progress: Progress = silent
) -> StatisticsStore:
    """The second moments of a configuration, read from the cache or computed from ``model``, which must be unedited."""
    text = CorpusOptions(name=config.corpus, tokens=config.corpus_tokens, seed=config.corpus_seed)
    return StatisticsStore(model, text, progress=progress)
