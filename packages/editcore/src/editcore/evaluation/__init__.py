"""Measure what a model says: CounterFact's metrics, target scores, perplexity and divergence.

Nothing here imports torch before a model is measured.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from editcore.evaluation._counterfact import CounterFactEvaluator
from editcore.evaluation._scores import (
    Kind,
    Metric,
    PromptScore,
    Summary,
    summarize,
    summarize_by_relation,
    to_frame,
)

if TYPE_CHECKING:
    from editcore.evaluation._divergence import kl_divergences, next_token_log_probabilities
    from editcore.evaluation._perplexity import perplexity
    from editcore.evaluation._scoring import TargetScore, score_targets

__all__ = [
    "CounterFactEvaluator",
    "Kind",
    "Metric",
    "PromptScore",
    "Summary",
    "TargetScore",
    "kl_divergences",
    "next_token_log_probabilities",
    "perplexity",
    "score_targets",
    "summarize",
    "summarize_by_relation",
    "to_frame",
]

_ON_FIRST_USE = {
    "TargetScore": "editcore.evaluation._scoring",
    "kl_divergences": "editcore.evaluation._divergence",
    "next_token_log_probabilities": "editcore.evaluation._divergence",
    "perplexity": "editcore.evaluation._perplexity",
    "score_targets": "editcore.evaluation._scoring",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
