"""The parts of a session: editor, backend, extensions and evaluators as objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from editcore.interfaces.progress import Progress
from editcore.interfaces.protocols import Backend, Editor, Evaluator, ExtensionContext
from editcore.interfaces.specs import BackendSpec, EvaluatorSpec, Spec
from editcore.plugins.calls import boundary, resolve
from editcore.plugins.registry import Plugins
from editcore.runs.fit import refuse_duplicates
from editcore.runs.resolved import Resolved, hparams_of, with_metrics
from editcore.settings.hparams import HParams

__all__ = ["Parts", "make_backend", "make_evaluators", "make_parts", "make_target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The objects of a session, and their announcements."""

    resolved: Resolved
    editor: Editor
    backend: Backend
    extensions: Mapping[str, object]
    """By name."""
    evaluators: Sequence[tuple[EvaluatorSpec, Evaluator]]


def make_parts(resolved: Resolved, registry: Plugins, *, seed: int, progress: Progress) -> Parts:
    """Make the objects of a session.

    Raises:
        PluginError: a plugin's own code failed.
    """
    settings = resolved.settings
    context = ExtensionContext(
        plugins=registry, seed=seed, progress=progress, capabilities=resolved.editor.capabilities
    )
    editor: Editor = make_target("editor", resolved.editor, settings[resolved.editor.name])
    return Parts(
        resolved=resolved,
        editor=editor,
        backend=_with_hparams("backend", resolved.backend, settings.get(resolved.backend.name)),
        extensions=MappingProxyType(
            {spec.name: make_target("plugin", spec, settings.get(spec.name), context) for spec in resolved.extensions}
        ),
        evaluators=[(spec, _with_hparams("evaluator", spec, settings.get(spec.name))) for spec in resolved.evaluators],
    )


def make_evaluators(
    registry: Plugins, names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]
) -> list[tuple[EvaluatorSpec, Evaluator]]:
    """Evaluators with their hyperparameters.

    Raises:
        UnknownNameError: there is no evaluator of that name.
        HParamsError: a setting is unknown or wrong.
        PluginError: an evaluator's own code failed.
    """
    refuse_duplicates("evaluator", names)
    specs = [registry.evaluator(name) for name in names]
    made = [(spec, hparams_of(spec, settings.get(spec.name, {}))) for spec in specs]
    return [(with_metrics(spec, hparams), _with_hparams("evaluator", spec, hparams)) for spec, hparams in made]


def make_backend(spec: BackendSpec, settings: Mapping[str, Any]) -> Backend:
    """A backend with its hyperparameters.

    Raises:
        HParamsError: a setting is unknown or wrong.
        PluginError: the backend's own code failed.
    """
    backend: Backend = _with_hparams("backend", spec, hparams_of(spec, settings))
    return backend


def _with_hparams(kind: str, spec: Spec, hparams: HParams | None) -> Any:
    """Make a plugin's object. Its hyperparameters are passed if it has any."""
    return make_target(kind, spec) if hparams is None else make_target(kind, spec, hparams)


def make_target(kind: str, spec: Spec, *arguments: object) -> Any:
    """Import what a plugin announced, and call it.

    Raises:
        PluginError: the plugin's own code failed.
    """
    target = resolve(spec.target)
    with boundary(f"The {kind} '{spec.name}' cannot be set up: "):
        return target(*arguments)
