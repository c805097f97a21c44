from .changes import (
    Attachment as Attachment,
    Changes as Changes,
    DenseDelta as DenseDelta,
    FactoredDelta as FactoredDelta,
    VectorDelta as VectorDelta,
    WeightChange as WeightChange,
    Written as Written,
    as_change as as_change,
)
from .errors import (
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
from .events import (
    AfterBatch as AfterBatch,
    AfterEvaluation as AfterEvaluation,
    AfterRun as AfterRun,
    AfterUndo as AfterUndo,
    BatchAddition as BatchAddition,
    BeforeApply as BeforeApply,
    BeforeBatch as BeforeBatch,
    BeforeRun as BeforeRun,
    Registration as Registration,
)
from .history import LedgerEntry as LedgerEntry, Signature as Signature
from .hookspecs import LifecycleHooks as LifecycleHooks, RegistrationHooks as RegistrationHooks, hookimpl as hookimpl
from .metrics import (
    EvaluationContext as EvaluationContext,
    MetricSpec as MetricSpec,
    Observation as Observation,
)
from .progress import Progress as Progress, silent as silent
from .protocols import (
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
    TakesContext as TakesContext,
    Trial as Trial,
)
from .specs import (
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
    Spec as Spec,
)
from .values import (
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
    first_problem as first_problem,
)
