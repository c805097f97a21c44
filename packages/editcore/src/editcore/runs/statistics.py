"""The second moments that a session and a run are made with."""

from __future__ import annotations

from editcore.interfaces.progress import Progress, silent
from editcore.models import LanguageModel
from editcore.runs.config import RunConfig, SessionConfig
from editcore.second_moments.statistics import StatisticsStore

__all__ = ["statistics_of"]


def statistics_of(
    config: SessionConfig | RunConfig, model: LanguageModel, *, progress: Progress = silent
) -> StatisticsStore:
    """The second moments of a configuration: in the cache, or computed from ``model``, unedited."""
    return StatisticsStore(
        model, corpus=config.corpus, tokens=config.corpus_tokens, seed=config.corpus_seed, progress=progress
    )
