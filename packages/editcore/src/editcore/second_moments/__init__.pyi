from .accumulator import Accumulator as Accumulator, SubspaceMetric as SubspaceMetric
from .corpora import Corpus as Corpus, open_corpus as open_corpus
from .linalg import (
    Metric as Metric,
    Update as Update,
    hold_at as hold_at,
    norm_of_sum as norm_of_sum,
    solve_update as solve_update,
)
from .statistics import (
    CorpusOptions as CorpusOptions,
    MomentKey as MomentKey,
    StatisticsStore as StatisticsStore,
    cached_moments as cached_moments,
    second_moments as second_moments,
)
