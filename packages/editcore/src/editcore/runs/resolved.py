"""Finds the plugins that a configuration names and checks all settings. No object is made, and no model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from editcore.datasets import dataset_name, dataset_settings
from editcore.interfaces.errors import EditcoreError, HParamsError, UnknownNameError
from editcore.interfaces.specs import BackendSpec, EditorSpec, EvaluatorSpec, ExtensionSpec, Spec
from editcore.models.sources import check_layer, look_at, num_blocks
from editcore.plugins.calls import boundary, resolve
from editcore.plugins.registry import Plugins
from editcore.runs.config import RunConfig, SessionConfig
from editcore.runs.fit import MissingSettingError, check_fit, refuse_duplicates, with_needed_parts
from editcore.settings.hparams import HParams, Setting, build, describe, layers_named
from editcore.settings.presets import get_preset, preset_for, presets_of

__all__ = [
    "Resolved",
    "check_evaluators",
    "default_editor",
    "editor_settings",
    "hparams_of",
    "resolve_dataset",
    "resolve_session",
    "with_metrics",
]

_Companion = BackendSpec | ExtensionSpec | EvaluatorSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The announcements of a session's parts, with all hyperparameters."""

    editor: EditorSpec
    backend: BackendSpec
    extensions: tuple[ExtensionSpec, ...]
    """In the order asked for, then those that the editor needs."""
    evaluators: tuple[EvaluatorSpec, ...]
    settings: Mapping[str, HParams]
    """By the name of editor, backend, extension, evaluator and data set, of those that have any."""


def resolve_session(
    registry: Plugins,
    model_name: str,
    config: SessionConfig | RunConfig,
    *,
    dataset: str | None = None,
    note: Callable[[str], None] = lambda text: _log.warning("%s", text),
) -> Resolved:
    """The announcements and hyperparameters of a session's parts.

    Args:
        dataset: the data set of a run; its hyperparameters are then among the settings.
        note: called with a sentence about the chosen preset, if the choice is not obvious.

    Raises:
        UnknownNameError: a name or a section is unknown.
        HParamsError: a setting is unknown or wrong, an evaluator is named twice, or the model on this machine has no
            such layer.
        UnfitError: the backend does not take what the editor gives.
        MissingSettingError: a required hyperparameter of the editor is given by no preset and no setting.
    """
    plugins, backend_name = with_needed_parts(registry, config.editor, config.plugins, config.backend)
    editor, backend = registry.editor(config.editor), registry.backend(backend_name)
    check_fit(registry, editor.name, backend.name)
    extensions = tuple(registry.extension(name) for name in plugins)
    evaluators = tuple(registry.evaluator(name) for name in config.evaluators)
    names = {editor.name, backend.name, *plugins, *config.evaluators}
    of_dataset: dict[str, HParams] = {}
    if dataset is None:
        _refuse_unknown_sections(config.settings, names)
    else:
        of_dataset = resolve_dataset(registry, dataset, config.settings, part_names=names)
    own = config.settings.get(editor.name, {})
    companions: list[_Companion] = [backend, *extensions, *evaluators]
    _refuse_misplaced(editor, own, companions)
    settings = {editor.name: _editor_settings(editor, config.preset, own, model_name, note)}
    for spec in companions:
        hparams = hparams_of(spec, config.settings.get(spec.name, {}))
        if hparams is not None:
            settings[spec.name] = hparams
    refuse_duplicates("evaluator", config.evaluators)
    _check_layers(settings, model_name)
    return Resolved(
        editor=editor,
        backend=backend,
        extensions=extensions,
        evaluators=tuple(with_metrics(spec, settings.get(spec.name)) for spec in evaluators),
        settings=MappingProxyType(settings | of_dataset),
    )


def check_evaluators(
    registry: Plugins, names: Sequence[str], settings: Mapping[str, Mapping[str, Any]], *, dataset: str | None = None
) -> None:
    """Refuse evaluators and settings, of them and of a data set, that are not as announced.

    Raises:
        UnknownNameError: a name or a section is unknown.
        HParamsError: a setting is unknown or wrong, or an evaluator is named twice.
    """
    refuse_duplicates("evaluator", names)
    for spec in [registry.evaluator(name) for name in names]:
        hparams_of(spec, settings.get(spec.name, {}))
    if dataset is None:
        _refuse_unknown_sections(settings, names)
    else:
        resolve_dataset(registry, dataset, settings, part_names=names)


def with_metrics(spec: EvaluatorSpec, hparams: HParams | None) -> EvaluatorSpec:
    """An evaluator with the metrics that its hyperparameters add.

    Raises:
        HParamsError, ModelError: the evaluator cannot measure with them.
        PluginError: the plugin's own code failed.
    """
    if spec.metrics_of is None or hparams is None:
        return spec
    further = resolve(spec.metrics_of)
    with boundary(f"The metrics of the evaluator '{spec.name}' cannot be made: "):
        return replace(spec, metrics=(*spec.metrics, *further(hparams)))


def _check_layers(settings: Mapping[str, HParams], model_name: str) -> None:
    """Refuse layers that the model does not have, where its configuration is on this machine."""
    named = [(owner, layer) for owner, hparams in settings.items() for _, layer in layers_named(hparams)]
    if named and (blocks := num_blocks(model_name)) is not None:
        for owner, layer in named:
            check_layer(layer, blocks, model=model_name, setting=owner)


def resolve_dataset(
    registry: Plugins, dataset: str, settings: Mapping[str, Mapping[str, Any]], *, part_names: Collection[str]
) -> dict[str, HParams]:
    """The hyperparameters of a run's data set, by its name; empty if it has none.

    Args:
        settings: of the whole run.
        part_names: names of the parts of the run's session.

    Raises:
        UnknownNameError: there is no such data set, or a section of the settings belongs to no part of the run.
        HParamsError: a setting or the argument is wrong, or another part with settings has the data set's name.
    """
    name = dataset_name(dataset, registry)
    _refuse_unknown_sections(settings, {*part_names, *([] if name is None else [name])})
    if name is None:
        return {}
    spec = registry.dataset(name)
    if name in part_names:
        if spec.hparams is not None:
            raise HParamsError(
                f"The data set '{name}' has hyperparameters, and another part of the run has the same name, so the "
                f"section '{name}' of the settings could belong to either."
            )
    elif spec.hparams is None and settings.get(name):
        raise _no_hyperparameters(spec, settings[name])
    own = dataset_settings(dataset, settings, plugins=registry)
    return {} if own is None else {name: own}


def _refuse_unknown_sections(settings: Mapping[str, Mapping[str, Any]], named: Collection[str]) -> None:
    for owner in settings:
        if owner not in named:
            raise UnknownNameError("settings section", owner, named, hint="A section is named after what it sets.")


def _refuse_misplaced(editor: EditorSpec, own: Mapping[str, Any], companions: Sequence[_Companion]) -> None:
    """A setting without a part's name is the editor's: say so where another part of the run has it."""
    unknown = own.keys() - _names_of(editor)
    for spec in companions if unknown else ():
        for name in sorted(unknown & _names_of(spec)):
            raise HParamsError(
                f"{editor.name} has no setting '{name}', but {spec.name} has: name it '{spec.name}.{name}'."
            )


def _names_of(spec: EditorSpec | _Companion) -> set[str]:
    return set() if spec.hparams is None else {setting.name for setting in describe(resolve(spec.hparams))}


def hparams_of(spec: _Companion, given: Mapping[str, Any]) -> HParams | None:
    """The hyperparameters of a part; ``None`` if it has none.

    Raises:
        HParamsError: a setting is unknown or wrong.
    """
    if spec.hparams is not None:
        made: HParams = build(resolve(spec.hparams), [given], owner=spec.name)
        return made
    if given:
        raise _no_hyperparameters(spec, given)
    return None


def _no_hyperparameters(spec: Spec, given: Mapping[str, Any]) -> HParamsError:
    return HParamsError(f"{spec.name}: unknown setting '{next(iter(given))}'. It has no hyperparameters.")


def editor_settings(registry: Plugins, config: SessionConfig | RunConfig, model_name: str) -> HParams | None:
    """The hyperparameters of a session's editor; ``None`` if they are wrong, which :func:`resolve_session` reports."""
    try:
        spec = registry.editor(config.editor)
        given = config.settings.get(spec.name, {})
        return _editor_settings(spec, config.preset, given, model_name, lambda _text: None)
    except EditcoreError:
        return None


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
    # An unknown name among the values is probably the missing one, misspelt: build says so.
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
    """The editor if none was named: the first that has a preset for the model, preferred ones first, or the only one.

    Raises:
        ModelError: the model is a path to something that is not a model folder.
        HParamsError: no editor is installed, or none of several has such a preset.
    """
    look_at(model_name)
    editors = registry.editors()
    ordered = sorted(editors, key=lambda name: (not editors[name].preferred, name))
    fitting = [name for name in ordered if preset_for(editors[name], model_name) is not None]
    if fitting or len(editors) == 1:
        return [*fitting, *editors][0]
    installed = ", ".join(sorted(editors)) or "none"
    raise HParamsError(f"No editor was given, and none has a preset for {model_name}. Installed: {installed}.")
