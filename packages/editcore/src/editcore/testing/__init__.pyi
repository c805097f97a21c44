from .attachments import AttachmentContract as AttachmentContract
from .backends import BackendContract as BackendContract
from .editors import EditorContract as EditorContract
from .executors import ExecutorContract as ExecutorContract
from .presets import check_presets as check_presets
from .tiny import (
    TINY_FAMILIES as TINY_FAMILIES,
    TINY_MOE_FAMILIES as TINY_MOE_FAMILIES,
    three_facts as three_facts,
    tiny_hf_model as tiny_hf_model,
    tiny_model as tiny_model,
    tiny_requests as tiny_requests,
    tiny_tokenizer as tiny_tokenizer,
)
