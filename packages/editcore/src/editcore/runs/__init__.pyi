from .backends import RawBackend as RawBackend
from .batches import BatchResult as BatchResult
from .checkpoint_history import (
    Checkpoint as Checkpoint,
    CheckpointHistory as CheckpointHistory,
    read_checkpoint_history as read_checkpoint_history,
)
from .comparing import (
    ChangedSides as ChangedSides,
    ComparedResults as ComparedResults,
    compare_results as compare_results,
)
from .compose import Composition as Composition, Conflict as Conflict
from .config import RunConfig as RunConfig, SessionConfig as SessionConfig
from .directories import (
    json_text as json_text,
    new_folder as new_folder,
    record_text as record_text,
    refuse_existing as refuse_existing,
    replacing as replacing,
    write_tensors as write_tensors,
    write_text as write_text,
)
from .evaluating import Evaluated as Evaluated, EvaluationPlan as EvaluationPlan, evaluate as evaluate
from .evaluation_record import (
    EvaluationRecord as EvaluationRecord,
    HarnessScore as HarnessScore,
    MethodRecord as MethodRecord,
    Perplexity as Perplexity,
    QuestionCounts as QuestionCounts,
)
from .facts import records_of as records_of
from .harness import HarnessPlan as HarnessPlan
from .job import RunOptions as RunOptions, run as run
from .log import BatchRecord as BatchRecord, read_batches as read_batches, write_batches as write_batches
from .pack import EditPack as EditPack, read_pack as read_pack, write_pack as write_pack
from .record import (
    REQUESTS_NAME as REQUESTS_NAME,
    RUN_NAME as RUN_NAME,
    ModelRecord as ModelRecord,
    RunRecord as RunRecord,
    folder_of as folder_of,
    read_requests as read_requests,
)
from .reopening import open_run as open_run, open_session as open_session
from .resolved import default_editor as default_editor
from .results import RunResult as RunResult, RunSummary as RunSummary, Sample as Sample
from .resume import has_begun as has_begun, is_finished as is_finished
from .session import EditSession as EditSession
from .statistics import statistics_of as statistics_of
from .targets import (
    AdapterReading as AdapterReading,
    Target as Target,
    TargetOptions as TargetOptions,
    find_target as find_target,
)
