"""The public names are pinned, all of them load, and importing the package loads nothing heavy."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import editcore
import pytest

PUBLIC = [
    "AfterBatch",
    "AfterEvaluation",
    "AfterRun",
    "AfterUndo",
    "Attachment",
    "AttachmentKind",
    "AttachmentSpec",
    "Backend",
    "BackendContext",
    "BackendSpec",
    "BatchAddition",
    "BeforeApply",
    "BeforeBatch",
    "BeforeRun",
    "Capabilities",
    "Changes",
    "CommandSpec",
    "ComponentSpec",
    "DatasetError",
    "DatasetSpec",
    "DenseDelta",
    "EditBatch",
    "EditContext",
    "EditEvidence",
    "EditRequest",
    "EditSession",
    "EditcoreError",
    "Editor",
    "EditorSpec",
    "EvaluationContext",
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
    "LedgerEntry",
    "MetricSpec",
    "ModelError",
    "ModelFamilySpec",
    "ModelLayout",
    "NumericalError",
    "Observation",
    "Outcome",
    "OverlaysWeights",
    "PluginError",
    "Plugins",
    "Probe",
    "Progress",
    "Proposal",
    "Registration",
    "RejectedRequest",
    "Rejection",
    "Remembers",
    "ReportsStatistics",
    "RequestError",
    "Resolves",
    "RewritesPrompts",
    "RunError",
    "StatisticsError",
    "StorageError",
    "SubjectNotFoundError",
    "TakesContext",
    "Trial",
    "UnknownNameError",
    "VectorDelta",
    "Verdict",
    "WeightChange",
    "Written",
    "as_change",
    "hookimpl",
]


def test_public_names_are_pinned_and_sorted() -> None:
    assert editcore.__all__ == PUBLIC
    assert sorted(editcore.__all__) == editcore.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(editcore, name) is not None
    assert name in dir(editcore)


def test_the_version_is_the_distributions() -> None:
    assert editcore.__version__ == importlib.metadata.version("editcore")


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="No editcore attribute Nonsense"):
        editcore.Nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_importing_what_plugins_need_loads_nothing_heavy() -> None:
    code = (
        "import sys; from editcore import EditorSpec, EditRequest, HParams, Plugins, Editor, hookimpl; "
        "from editcore import Evaluator, EvaluatorSpec, EvaluationContext, MetricSpec, Observation; "
        "Plugins.load().listing(); "
        "print(*sorted({'torch', 'transformers', 'peft', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
