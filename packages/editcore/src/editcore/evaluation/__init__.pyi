from .capability import (
    CAPABILITY as CAPABILITY,
    CapabilityEvaluator as CapabilityEvaluator,
    CapabilityHParams as CapabilityHParams,
    CapabilityItem as CapabilityItem,
    capability_items as capability_items,
)
from .counterfact import COUNTERFACT as COUNTERFACT, CounterFactEvaluator as CounterFactEvaluator
from .damage import (
    DAMAGE as DAMAGE,
    DamageEvaluator as DamageEvaluator,
    DamageHParams as DamageHParams,
    ngram_entropy as ngram_entropy,
)
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
from .long_answers import (
    LONG_ANSWERS as LONG_ANSWERS,
    LongAnswersEvaluator as LongAnswersEvaluator,
    LongAnswersHParams as LongAnswersHParams,
    rouge_l_recall as rouge_l_recall,
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
from .multihop import (
    MULTIHOP as MULTIHOP,
    Chain as Chain,
    ChainQuestion as ChainQuestion,
    MultihopEvaluator as MultihopEvaluator,
    MultihopHParams as MultihopHParams,
    chains_of as chains_of,
)
from .paired import PairedDifference as PairedDifference, paired_differences as paired_differences
from .scoring import TargetScore as TargetScore, score_targets as score_targets
from .summaries import (
    Average as Average,
    Measurement as Measurement,
    Summary as Summary,
    average_of as average_of,
)
from .teacher_forced import TEACHER_FORCED as TEACHER_FORCED, TeacherForcedEvaluator as TeacherForcedEvaluator
from .text import perplexity as perplexity
