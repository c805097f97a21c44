"""The kinds of things that plugins offer: the hook and the spec of each, and how an announcement is checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from editcore._util.words import with_article
from editcore.interfaces.errors import PluginError
from editcore.interfaces.specs import (
    AttachmentSpec,
    BackendSpec,
    CommandSpec,
    ComponentSpec,
    DatasetSpec,
    EditorSpec,
    EvaluatorSpec,
    ExecutorSpec,
    ExtensionSpec,
    ModelFamilySpec,
    Spec,
)

__all__ = ["KINDS", "REGISTRATION_HOOKS", "Kind", "checked_specs", "package_hint"]

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_COMPONENT_KIND = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")

S = TypeVar("S", bound=Spec)
S_co = TypeVar("S_co", bound=Spec, covariant=True)


@dataclass(frozen=True, slots=True)
class Kind(Generic[S_co]):
    """One kind of thing that plugins offer."""

    word: str
    """Its name in messages."""
    hook: str
    """The registration hook that announces it."""
    spec: type[S_co]
    """The class of its announcements."""
    missing: str = ""
    """What to say after an unknown name. ``{package}`` stands for the package that probably offers it."""


_MISSING_PACKAGE = "(A missing {} is usually a missing package: pip install {{package}})"

EDITOR = Kind("editor", "editcore_editors", EditorSpec, _MISSING_PACKAGE.format("method"))
BACKEND = Kind("backend", "editcore_backends", BackendSpec, _MISSING_PACKAGE.format("backend"))
ATTACHMENT = Kind(
    "attachment",
    "editcore_attachments",
    AttachmentSpec,
    "(An attachment comes with the editor that makes it: install that editor's package, or allow it again.)",
)
EXTENSION = Kind("plugin", "editcore_extensions", ExtensionSpec, _MISSING_PACKAGE.format("plugin"))
EVALUATOR = Kind("evaluator", "editcore_evaluators", EvaluatorSpec)
DATASET = Kind("data set", "editcore_datasets", DatasetSpec)
EXECUTOR = Kind("executor", "editcore_executors", ExecutorSpec, _MISSING_PACKAGE.format("executor"))
MODEL_FAMILY = Kind("model family", "editcore_model_families", ModelFamilySpec)
COMMAND = Kind("command", "editcore_commands", CommandSpec)
COMPONENT = Kind("component", "editcore_components", ComponentSpec)

KINDS: tuple[Kind[Any], ...] = (
    EDITOR,
    BACKEND,
    ATTACHMENT,
    EXTENSION,
    EVALUATOR,
    DATASET,
    EXECUTOR,
    MODEL_FAMILY,
    COMMAND,
    COMPONENT,
)

REGISTRATION_HOOKS = tuple(kind.hook for kind in KINDS)


def checked_specs(kind: Kind[S], answer: object) -> Sequence[S]:
    """Check what a plugin's registration hook returned.

    Raises:
        PluginError: the answer is not a list of the kind's specs, or a name in it is not well formed. The message
            begins in lower case, because it follows the name of the hook.
    """
    expected = kind.spec.__name__
    if isinstance(answer, str) or not isinstance(answer, Sequence):
        raise PluginError(f"returned {with_article(type(answer).__name__)}, not a list of {expected}")
    for spec in answer:
        if not isinstance(spec, kind.spec):
            raise PluginError(f"returned a list with {with_article(type(spec).__name__)}, not of {expected}")
        if not _NAME.fullmatch(spec.name):
            raise PluginError(f"the name {spec.name!r} is not made of lower-case letters, digits and hyphens")
        if isinstance(spec, ComponentSpec) and not _COMPONENT_KIND.fullmatch(spec.kind):
            raise PluginError(f"the kind {spec.kind!r} is not made of lower-case letters, digits, hyphens and dots")
    return answer


def package_hint(kind: Kind[Any], asked: str, installed: Iterable[str]) -> str:
    """A sentence on which package to install for an unknown name; empty if there is nothing to suggest."""
    if not kind.missing or not _NAME.fullmatch(asked):
        return ""
    # A similar installed name comes first, so that nobody is told to install a misspelt package.
    near = difflib.get_close_matches(asked, list(installed), n=1)
    return kind.missing.format(package=f"edit-{near[0] if near else asked}")
