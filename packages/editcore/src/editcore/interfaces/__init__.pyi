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
from .history import LedgerEntry as LedgerEntry
from .hookspecs import LifecycleHooks as LifecycleHooks, RegistrationHooks as RegistrationHooks, hookimpl as hookimpl
from .progress import Progress as Progress, silent as silent
from .protocols import (
    Backend as Backend,
    BackendContext as BackendContext,
    EditContext as EditContext,
    Editor as Editor,
    Evaluator as Evaluator,
    Executor as Executor,
    ExtensionContext as ExtensionContext,
    Outcome as Outcome,
    OverlaysWeights as OverlaysWeights,
    ReportsStatistics as ReportsStatistics,
    Resolves as Resolves,
    TakesContext as TakesContext,
)
from .specs import (
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
    FactoredDelta as FactoredDelta,
    FactRecord as FactRecord,
    HeldKey as HeldKey,
    KnownTarget as KnownTarget,
    Proposal as Proposal,
    RejectedRequest as RejectedRequest,
    Rejection as Rejection,
    Verdict as Verdict,
    first_problem as first_problem,
)
