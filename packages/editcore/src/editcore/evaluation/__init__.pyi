from .counterfact import COUNTERFACT as COUNTERFACT, CounterFactEvaluator as CounterFactEvaluator
from .divergence import (
    kl_divergences as kl_divergences,
    log_probabilities_after as log_probabilities_after,
    next_token_log_probabilities as next_token_log_probabilities,
)
from .generation import (
    GENERATION as GENERATION,
    GenerationEvaluator as GenerationEvaluator,
    GenerationHParams as GenerationHParams,
)
from .measures import (
    DEFAULT_EVALUATORS as DEFAULT_EVALUATORS,
    Measure as Measure,
    legend as legend,
    measures_of as measures_of,
    objectives_of as objectives_of,
    retention_of as retention_of,
    shown as shown,
)
from .measuring import measure as measure
from .scoring import TargetScore as TargetScore, score_targets as score_targets
from .summaries import (
    Average as Average,
    Measurement as Measurement,
    Summary as Summary,
    average_of as average_of,
)
from .text import perplexity as perplexity
