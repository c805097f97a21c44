from .counterfact import CounterFactEvaluator as CounterFactEvaluator
from .divergence import kl_divergences as kl_divergences, next_token_log_probabilities as next_token_log_probabilities
from .scores import (
    Kind as Kind,
    Metric as Metric,
    PromptScore as PromptScore,
    Summary as Summary,
    summarize as summarize,
    summarize_by_relation as summarize_by_relation,
    summarize_frame as summarize_frame,
    to_frame as to_frame,
)
from .scoring import TargetScore as TargetScore, score_targets as score_targets
from .text import perplexity as perplexity
