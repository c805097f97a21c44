from .answers import AnswerStore as AnswerStore
from .capture import (
    Captured as Captured,
    LayerByLayerCapture as LayerByLayerCapture,
    project as project,
)
from .catalogue import (
    CATALOGUE as CATALOGUE,
    DEFAULT_MODEL as DEFAULT_MODEL,
    CatalogueEntry as CatalogueEntry,
    Wheel as Wheel,
    local_gguf as local_gguf,
    local_path as local_path,
)
from .edited import EditedModel as EditedModel, attached_reason as attached_reason
from .encoding import Encoded as Encoded, pad_rows as pad_rows
from .fetching import pull as pull, pull_gguf as pull_gguf
from .forward import logits_at as logits_at
from .gradients import (
    TargetTokens as TargetTokens,
    asking_for_gradients as asking_for_gradients,
    target_losses as target_losses,
    target_tokens as target_tokens,
)
from .http_json import JsonServer as JsonServer, RefusedError as RefusedError
from .language_model import LanguageModel as LanguageModel
from .layout import (
    ModelLayout as ModelLayout,
    attention_output as attention_output,
    detect_layout as detect_layout,
)
from .layout_check import CHECKS as CHECKS, check_layout as check_layout
from .loading import DTYPES as DTYPES, dtype_of as dtype_of
from .module_hooks import first_tensor as first_tensor, hooks as hooks, replace_first as replace_first
from .options import LoadOptions as LoadOptions, Sampling as Sampling
from .passes import skip_first_blocks as skip_first_blocks, stop_after as stop_after
from .planning import PassBudget as PassBudget, plan_passes as plan_passes
from .prompt_form import PromptForm as PromptForm
from .sources import HubModel as HubModel, check_dtype as check_dtype, look_at as look_at
from .tokens import (
    FactToken as FactToken,
    TokenRow as TokenRow,
    continuation_row as continuation_row,
    join_continuation as join_continuation,
    last_index_covering as last_index_covering,
    lookup_row as lookup_row,
)
from .weights import split_address as split_address
from .writing import (
    add_changes as add_changes,
    in_float64 as in_float64,
    misfits as misfits,
    rounded as rounded,
)
