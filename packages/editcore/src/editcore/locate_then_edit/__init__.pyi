from .editor import (
    LayerProblem as LayerProblem,
    LocateThenEdit as LocateThenEdit,
    Prepared as Prepared,
)
from .hparams import LocateThenEditHParams as LocateThenEditHParams
from .located import (
    ROLES as ROLES,
    Tracing as Tracing,
    store_tracing as store_tracing,
    stored_tracing as stored_tracing,
    traced_layer as traced_layer,
)
from .targets import Targets as Targets, optimise_targets as optimise_targets, tails_fit as tails_fit
from .templates import OPENINGS as OPENINGS, sample_context_templates as sample_context_templates
