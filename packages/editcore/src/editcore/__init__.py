"""Edit what a language model knows: interfaces, mathematics and runs.

Everything public is re-exported here. What plugins need to announce themselves is imported at once; the rest is loaded
on first use, so that importing :mod:`editcore` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from editcore._errors import (
    DatasetError,
    EditcoreError,
    HParamsError,
    ModelError,
    NumericalError,
    PluginError,
    RequestError,
    RunError,
    StatisticsError,
    StorageError,
    SubjectNotFoundError,
    UnknownNameError,
)
from editcore._events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    AfterUndo,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
    Registration,
    Rejection,
    Verdict,
)
from editcore._hookspecs import hookimpl
from editcore._progress import Progress
from editcore._specs import (
    BackendSpec,
    Capabilities,
    CommandSpec,
    ComponentSpec,
    DatasetSpec,
    EditorSpec,
    EvaluatorSpec,
    ExecutorSpec,
    ExtensionSpec,
    ModelFamilySpec,
)

if TYPE_CHECKING:
    from editcore._hparams import HParams
    from editcore._plugins import Plugins
    from editcore._protocols import (
        Backend,
        BackendContext,
        EditContext,
        Editor,
        Evaluator,
        Executor,
        ExtensionContext,
        Outcome,
        OverlaysWeights,
        ReportsStatistics,
        Resolves,
        TakesContext,
    )
    from editcore._session import EditSession
    from editcore._values import (
        EditBatch,
        EditEvidence,
        EditRequest,
        FactoredDelta,
        FactRecord,
        HeldKey,
        KnownTarget,
        Proposal,
        RejectedRequest,
    )
    from editcore.models import LanguageModel, ModelLayout

    __version__: str

__all__ = [
    "AfterBatch",
    "AfterEvaluation",
    "AfterRun",
    "AfterUndo",
    "Backend",
    "BackendContext",
    "BackendSpec",
    "BatchAddition",
    "BeforeApply",
    "BeforeBatch",
    "BeforeRun",
    "Capabilities",
    "CommandSpec",
    "ComponentSpec",
    "DatasetError",
    "DatasetSpec",
    "EditBatch",
    "EditContext",
    "EditEvidence",
    "EditRequest",
    "EditSession",
    "EditcoreError",
    "Editor",
    "EditorSpec",
    "Evaluator",
    "EvaluatorSpec",
    "Executor",
    "ExecutorSpec",
    "ExtensionContext",
    "ExtensionSpec",
    "FactRecord",
    "FactoredDelta",
    "HParams",
    "HParamsError",
    "HeldKey",
    "KnownTarget",
    "LanguageModel",
    "ModelError",
    "ModelFamilySpec",
    "ModelLayout",
    "NumericalError",
    "Outcome",
    "OverlaysWeights",
    "PluginError",
    "Plugins",
    "Progress",
    "Proposal",
    "Registration",
    "RejectedRequest",
    "Rejection",
    "ReportsStatistics",
    "RequestError",
    "Resolves",
    "RunError",
    "StatisticsError",
    "StorageError",
    "SubjectNotFoundError",
    "TakesContext",
    "UnknownNameError",
    "Verdict",
    "__version__",
    "hookimpl",
]

_ON_FIRST_USE = {
    "Backend": "editcore._protocols",
    "BackendContext": "editcore._protocols",
    "EditBatch": "editcore._values",
    "EditContext": "editcore._protocols",
    "EditEvidence": "editcore._values",
    "EditRequest": "editcore._values",
    "EditSession": "editcore._session",
    "Editor": "editcore._protocols",
    "Evaluator": "editcore._protocols",
    "Executor": "editcore._protocols",
    "ExtensionContext": "editcore._protocols",
    "FactRecord": "editcore._values",
    "FactoredDelta": "editcore._values",
    "HParams": "editcore._hparams",
    "HeldKey": "editcore._values",
    "KnownTarget": "editcore._values",
    "LanguageModel": "editcore.models",
    "ModelLayout": "editcore.models",
    "Outcome": "editcore._protocols",
    "OverlaysWeights": "editcore._protocols",
    "Plugins": "editcore._plugins",
    "Proposal": "editcore._values",
    "RejectedRequest": "editcore._values",
    "ReportsStatistics": "editcore._protocols",
    "Resolves": "editcore._protocols",
    "TakesContext": "editcore._protocols",
}

if not TYPE_CHECKING:  # a type checker that saw these would believe in every name

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("editcore")
        if name not in _ON_FIRST_USE:
            raise AttributeError(f"module 'editcore' has no attribute {name!r}")
        value = getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
