from .executors import (
    LOST as LOST,
    LocalExecutor as LocalExecutor,
    LocalHParams as LocalHParams,
    attempt as attempt,
    lost as lost,
    make_executor as make_executor,
)
from .sharding import ModelSource as ModelSource, sharded_moments as sharded_moments
