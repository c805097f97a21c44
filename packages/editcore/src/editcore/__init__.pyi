from .interfaces.changes import (
    Attachment as Attachment,
    Changes as Changes,
    DenseDelta as DenseDelta,
    FactoredDelta as FactoredDelta,
    VectorDelta as VectorDelta,
    WeightChange as WeightChange,
    Written as Written,
    as_change as as_change,
)
from .interfaces.errors import (
    DatasetError as DatasetError,
    EditcoreError as EditcoreError,
    HParamsError as HParamsError,
    ModelError as ModelError,
    NumericalError as NumericalError,
    PluginError as PluginError,
    RequestError as RequestError,
    RunError as RunError,
    StatisticsError as StatisticsError,
    StorageError as StorageError,
    SubjectNotFoundError as SubjectNotFoundError,
    UnknownNameError as UnknownNameError,
)
from .interfaces.events import (
    AfterBatch as AfterBatch,
    AfterEvaluation as AfterEvaluation,
    AfterRun as AfterRun,
    AfterSolve as AfterSolve,
    AfterUndo as AfterUndo,
    BatchAddition as BatchAddition,
    BeforeApply as BeforeApply,
    BeforeBatch as BeforeBatch,
    BeforeRun as BeforeRun,
    Registration as Registration,
    Rework as Rework,
)
from .interfaces.history import LedgerEntry as LedgerEntry, Signature as Signature
from .interfaces.hookspecs import hookimpl as hookimpl
from .interfaces.metrics import (
    EvaluationContext as EvaluationContext,
    MetricSpec as MetricSpec,
    Observation as Observation,
)
from .interfaces.progress import Progress as Progress
from .interfaces.protocols import (
    AttachmentKind as AttachmentKind,
    Backend as Backend,
    BackendContext as BackendContext,
    EditContext as EditContext,
    Editor as Editor,
    Evaluator as Evaluator,
    Executor as Executor,
    ExtensionContext as ExtensionContext,
    Outcome as Outcome,
    OverlaysWeights as OverlaysWeights,
    Remembers as Remembers,
    ReportsStatistics as ReportsStatistics,
    Resolves as Resolves,
    RewritesPrompts as RewritesPrompts,
    SolvesAtStoredKeys as SolvesAtStoredKeys,
    TakesContext as TakesContext,
    Trial as Trial,
)
from .interfaces.specs import (
    AttachmentSpec as AttachmentSpec,
    BackendSpec as BackendSpec,
    Capabilities as Capabilities,
    CommandSpec as CommandSpec,
    ComponentSpec as ComponentSpec,
    DatasetSpec as DatasetSpec,
    EditorSpec as EditorSpec,
    EvaluatorSpec as EvaluatorSpec,
    ExecutorSpec as ExecutorSpec,
    ExtensionSpec as ExtensionSpec,
    ModelFamilySpec as ModelFamilySpec,
)
from .interfaces.values import (
    EditBatch as EditBatch,
    EditEvidence as EditEvidence,
    EditRequest as EditRequest,
    FactRecord as FactRecord,
    HeldKey as HeldKey,
    KnownTarget as KnownTarget,
    Probe as Probe,
    Proposal as Proposal,
    RejectedRequest as RejectedRequest,
    Rejection as Rejection,
    Verdict as Verdict,
)
from .models.language_model import LanguageModel as LanguageModel
from .models.layout import ModelLayout as ModelLayout
from .models.options import LoadOptions as LoadOptions, Sampling as Sampling
from .plugins.registry import Plugins as Plugins
from .runs.config import SessionConfig as SessionConfig
from .runs.session import EditSession as EditSession
from .runs.workspace import Workspace as Workspace, workspace as workspace
from .settings.hparams import HParams as HParams

__version__: str
