from .attachments import AttachmentContract as AttachmentContract
from .backends import BackendContract as BackendContract
from .datasets import DatasetContract as DatasetContract
from .editors import EditorContract as EditorContract
from .evaluators import EvaluatorContract as EvaluatorContract
from .executors import ExecutorContract as ExecutorContract
from .extensions import ExtensionContract as ExtensionContract
from .facts import three_facts as three_facts, tiny_records as tiny_records, tiny_requests as tiny_requests
from .presets import check_presets as check_presets
from .servers import StandInServer as StandInServer
from .tiny import (
    TINY_FAMILIES as TINY_FAMILIES,
    TINY_MOE_FAMILIES as TINY_MOE_FAMILIES,
    repeating_model as repeating_model,
    tiny_hf_model as tiny_hf_model,
    tiny_model as tiny_model,
    tiny_tokenizer as tiny_tokenizer,
)
