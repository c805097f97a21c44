"""What a session is made of: editor, backend and extensions by name, with their settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editcore.datasets import dataset_name, dataset_settings
from editcore.interfaces.errors import HParamsError, UnknownNameError
from editcore.interfaces.progress import Progress
from editcore.interfaces.protocols import (
    Backend,
    Editor,
    Evaluator,
    ExtensionContext,
)
from editcore.interfaces.specs import BackendSpec, EditorSpec, EvaluatorSpec, ExtensionSpec, Spec
from editcore.models.sources import look_at
from editcore.plugins.registry import Plugins, boundary, resolve
from editcore.runs.fit import MissingSettingError, check_fit, refuse_twice
from editcore.settings.hparams import HParams, Setting, build, describe
from editcore.settings.presets import get_preset, preset_for, presets_of

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = [
    "Parts",
    "default_editor",
    "make_backend",
    "make_evaluators",
    "make_parts",
    "make_target",
    "resolve_dataset",
    "resolve_settings",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a session is made of, resolved from names."""

    editor: Editor
    editor_spec: EditorSpec
    backend: Backend
    backend_spec: BackendSpec
    extensions: Mapping[str, object]
    evaluators: Sequence[tuple[EvaluatorSpec, Evaluator]]
    settings: Mapping[str, HParams]
    """Resolved hyperparameters by name of editor, backend, extension and evaluator."""


def make_parts(
    registry: Plugins,
    model: LanguageModel | str,
    editor: str,
    plugins: Sequence[str],
    backend: str,
    evaluators: Sequence[str],
    preset: str | None,
    settings: Mapping[str, Mapping[str, Any]],
    seed: int,
    progress: Progress,
) -> Parts:
    """Names to objects. Everything that can be wrong with names and settings is found here, before a model is loaded;
    first, whether there is a model of that name."""
    if isinstance(model, str):
        look_at(model)
    model_name = model if isinstance(model, str) else model.name
    resolved = resolve_settings(
        registry, model_name, editor=editor, plugins=plugins, backend=backend, evaluators=evaluators, preset=preset,
        settings=settings,
    )  # fmt: skip
    refuse_twice("evaluator", evaluators)
    editor_spec = registry.editor(editor)
    made_editor: Editor = make_target("editor", editor_spec, resolved[editor])
    made_backend, _ = make_backend(registry.backend(backend), settings.get(backend, {}))
    extensions: dict[str, object] = {}
    context = ExtensionContext(plugins=registry, seed=seed, progress=progress)
    for name in plugins:
        extensions[name] = make_target("plugin", registry.extension(name), resolved.get(name), context)
    return Parts(
        editor=made_editor,
        editor_spec=editor_spec,
        backend=made_backend,
        backend_spec=registry.backend(backend),
        extensions=extensions,
        evaluators=[_made(registry.evaluator(name), resolved.get(name)) for name in evaluators],
        settings=resolved,
    )


def make_evaluators(
    registry: Plugins, names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]
) -> list[tuple[EvaluatorSpec, Evaluator]]:
    """Evaluators with their hyperparameters.

    Raises:
        UnknownNameError: there is none of a name.
        HParamsError: a setting is unknown or wrong.
        PluginError: an evaluator's own code failed.
    """
    refuse_twice("evaluator", names)
    specs = [registry.evaluator(name) for name in names]
    return [_made(spec, _settings(spec, spec.hparams, settings.get(spec.name, {}))) for spec in specs]


def _made(spec: EvaluatorSpec, own: HParams | None) -> tuple[EvaluatorSpec, Evaluator]:
    made: Evaluator = make_target("evaluator", spec) if own is None else make_target("evaluator", spec, own)
    return spec, made


def resolve_settings(
    registry: Plugins,
    model_name: str,
    *,
    editor: str,
    plugins: Sequence[str],
    backend: str,
    evaluators: Sequence[str],
    preset: str | None,
    settings: Mapping[str, Mapping[str, Any]],
    dataset: str | None = None,
    note: Callable[[str], None] = lambda text: _log.warning("%s", text),
) -> dict[str, HParams]:
    """Every hyperparameter of a session, by the name of editor, backend, extension or evaluator; nothing is made.

    Args:
        dataset: of a run, whose hyperparameters are then among them.
        note: told which preset was chosen, where that is not plain.

    Raises:
        UnknownNameError: a name or a section is unknown.
        HParamsError: a setting is unknown or wrong.
        UnfitError: the backend does not take what the editor gives.
        MissingSettingError: a required hyperparameter of the editor is given by no preset and no setting.
    """
    editor_spec, backend_spec = registry.editor(editor), registry.backend(backend)
    check_fit(registry, editor, backend)
    companions: list[BackendSpec | ExtensionSpec | EvaluatorSpec] = [
        backend_spec,
        *(registry.extension(name) for name in plugins),
        *(registry.evaluator(name) for name in evaluators),
    ]
    named = {editor, backend, *plugins, *evaluators}
    own_of_dataset: dict[str, HParams] = {}
    if dataset is None:
        _refuse_unknown_sections(settings, named)
    else:
        own_of_dataset = resolve_dataset(registry, dataset, settings, part_names=named)
    resolved: dict[str, HParams] = {}
    resolved[editor] = _editor_settings(editor_spec, preset, settings.get(editor, {}), model_name, note)
    for spec in companions:
        own = _settings(spec, spec.hparams, settings.get(spec.name, {}))
        if own is not None:
            resolved[spec.name] = own
    return resolved | own_of_dataset


def resolve_dataset(
    registry: Plugins, dataset: str, settings: Mapping[str, Mapping[str, Any]], *, part_names: Collection[str]
) -> dict[str, HParams]:
    """The hyperparameters of a run's data set, by its name; empty if it has none.

    Args:
        settings: of the whole run.
        part_names: of what the run's session is made of.

    Raises:
        UnknownNameError: there is no such data set, or nothing of the run has the name of a section.
        HParamsError: a setting or the argument is wrong, or the settings could be another part's of the same name.
    """
    name = dataset_name(dataset, registry)
    _refuse_unknown_sections(settings, {*part_names, *([] if name is None else [name])})
    if name is None:
        return {}
    spec = registry.dataset(name)
    if name in part_names:
        if spec.hparams is not None:
            raise HParamsError(
                f"The data set '{name}' has hyperparameters, and another part of the run has its name, so that the "
                f"section '{name}' of the settings could be either's."
            )
    elif spec.hparams is None and settings.get(name):
        raise _no_hyperparameters(spec, settings[name])
    own = dataset_settings(dataset, settings, plugins=registry)
    return {} if own is None else {name: own}


def _refuse_unknown_sections(settings: Mapping[str, Mapping[str, Any]], named: Collection[str]) -> None:
    for owner in settings:
        if owner not in named:
            raise UnknownNameError("settings section", owner, named, hint="A section is named after what it sets.")


def make_backend(spec: BackendSpec, settings: Mapping[str, Any]) -> tuple[Backend, HParams | None]:
    """A backend with its hyperparameters, if it has any.

    Raises:
        HParamsError: a setting is unknown or wrong.
        PluginError: the backend's own code failed.
    """
    own = _settings(spec, spec.hparams, settings)
    backend: Backend = make_target("backend", spec) if own is None else make_target("backend", spec, own)
    return backend, own


def make_target(kind: str, spec: Spec, *arguments: object) -> Any:
    """What a plugin announced, imported and called.

    Raises:
        PluginError: its own code failed.
    """
    target = resolve(spec.target)
    with boundary(f"The {kind} '{spec.name}' cannot be set up: "):
        return target(*arguments)


def _settings(spec: Spec, hparams: str | None, given: Mapping[str, Any]) -> HParams | None:
    if hparams is not None:
        made: HParams = build(resolve(hparams), [given], owner=spec.name)
        return made
    if given:
        raise _no_hyperparameters(spec, given)
    return None


def _no_hyperparameters(spec: Spec, given: Mapping[str, Any]) -> HParamsError:
    return HParamsError(f"{spec.name}: unknown setting '{next(iter(given))}'. It has no hyperparameters.")


def _editor_settings(
    spec: EditorSpec,
    preset: str | None,
    given: Mapping[str, Any],
    model_name: str,
    note: Callable[[str], None],
) -> HParams:
    hparams: type[HParams] = resolve(spec.hparams)
    chosen = get_preset(spec, preset) if preset is not None else preset_for(spec, model_name)
    if chosen is not None and chosen.note:
        note(chosen.note)
    values = {**(chosen.values() if chosen is not None else {}), **given}
    known = {setting.name: setting for setting in describe(hparams)}
    missing = [setting for setting in known.values() if setting.required and setting.name not in values]
    # With an unknown name among the values, that one was probably meant: build says so.
    if missing and known.keys() >= values.keys():
        raise _missing_setting(spec, missing[0], preset, model_name)
    return build(hparams, [values], owner=spec.name)


def _missing_setting(spec: EditorSpec, lacking: Setting, preset: str | None, model_name: str) -> MissingSettingError:
    kind = f"{lacking.type}, {lacking.allowed}" if lacking.allowed else lacking.type
    example = "[3]" if lacking.type == "list of int" else "VALUE"
    presets = presets_of(spec)
    if preset is not None:
        why = f"the preset '{preset}' does not set it"
    elif presets:
        why = f"no preset is named like the model '{model_name}'"
    else:
        why = "it has no presets"
    way_out = f"Set it, such as --set {lacking.name}={example}."
    if presets and preset is None:
        way_out = (
            f"Set it, such as --set {lacking.name}={example}, let 'editctl onboard {model_name}' find it, or choose "
            f"another model's preset with --preset ({', '.join(presets)})."
        )
    return MissingSettingError(
        f"{spec.name}: {lacking.name} is required ({kind}), and {why}.", way_out, setting=lacking.name, example=example
    )


def default_editor(registry: Plugins, model_name: str) -> str:
    """The editor for someone who names none: the first by name that has a preset for the model, or the only one.

    Raises:
        ModelError: the model is a path to something else than a model folder.
        HParamsError: no editor is installed, or none of several has such a preset.
    """
    look_at(model_name)
    editors = registry.editors()
    fitting = [name for name in sorted(editors) if preset_for(editors[name], model_name) is not None]
    if fitting or len(editors) == 1:
        return [*fitting, *editors][0]
    installed = ", ".join(sorted(editors)) or "none"
    raise HParamsError(f"No editor was given, and none has a preset for {model_name}. Installed: {installed}.")
