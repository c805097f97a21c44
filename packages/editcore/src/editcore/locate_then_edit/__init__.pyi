from .activations import KeyWeighting as KeyWeighting, ResidualKey as ResidualKey
from .batch_targets import ResidualKind as ResidualKind
from .editor import LocateThenEdit as LocateThenEdit
from .hparams import LocateThenEditHParams as LocateThenEditHParams
from .located import (
    ROLES as ROLES,
    Tracing as Tracing,
    store_tracing as store_tracing,
    stored_tracing as stored_tracing,
    traced_layer as traced_layer,
)
from .plain_values import optimise_plainly as optimise_plainly
from .preparation import Prepared as Prepared
from .problem import LayerProblem as LayerProblem
from .targets import (
    Targets as Targets,
    optimise_targets as optimise_targets,
    prefixes_can_be_cached as prefixes_can_be_cached,
)
from .templates import OPENINGS as OPENINGS, sample_context_templates as sample_context_templates
from .token_rows import FactRows as FactRows, fact_rows as fact_rows
