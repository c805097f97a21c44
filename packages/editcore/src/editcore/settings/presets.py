"""Presets of an editor for a model. Those of the user come before those of the editor's package.

A preset is a TOML file named like the model, such as ``llama-2-7b.toml``. Its ``names`` are further names of that
model. The user's own presets are in ``presets/EDITOR/`` of editcore's cache folder, where ``editctl onboard`` puts
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from editcore._util.origin import base_name
from editcore._util.paths import cache_dir, hub_snapshot
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import EditcoreError, UnknownNameError
from editcore.interfaces.specs import Spec
from editcore.settings.hparams import list_presets, load_preset, preset_models

__all__ = ["Preset", "get_preset", "model_stem", "own_folder", "preset_for", "presets_of"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A preset of one editor."""

    editor: str
    """Name of the editor."""
    name: str
    """Name of its file, without ``.toml``."""
    source: str | Path
    """The package that has it, or the folder of the user's own presets."""
    note: str = ""
    """A sentence on why it was chosen for a model; empty for the package's preset with the model's name."""

    @property
    def own(self) -> bool:
        """Whether it is one of the user's own."""
        return isinstance(self.source, Path)

    def values(self) -> Mapping[str, object]:
        """Its hyperparameters.

        Raises:
            HParamsError: the file is not a flat TOML table.
        """
        return load_preset(self.source, self.name)

    def models(self) -> tuple[str, ...]:
        """Other names of its models; none for a file that cannot be read."""
        try:
            return preset_models(self.source, self.name)
        except EditcoreError:  # reported when this preset is used, not when another one is searched for
            return ()


def own_folder(editor: str) -> Path:
    """The folder of the user's presets of an editor. It may not exist."""
    return cache_dir() / "presets" / editor


def presets_of(spec: Spec) -> dict[str, Preset]:
    """The presets of an editor by name, sorted. A preset of the user hides the package's preset of that name."""
    sources: tuple[str | Path | None, ...] = (getattr(spec, "presets", None), own_folder(spec.name))
    found = {
        name: Preset(editor=spec.name, name=name, source=source)
        for source in sources
        if source is not None
        for name in list_presets(source)
    }
    return dict(sorted(found.items()))


def get_preset(spec: Spec, name: str) -> Preset:
    """One preset by its name.

    Raises:
        UnknownNameError: there is none.
    """
    presets = presets_of(spec)
    if name not in presets:
        raise UnknownNameError("preset", name, presets)
    return presets[name]


def model_stem(model_name: str) -> str:
    """A model's name without its organisation or parent folders: ``gpt2-xl`` for ``openai-community/gpt2-xl``, and also
    for its snapshot folder in the hub's cache."""
    path = Path(model_name).expanduser()
    if path.is_dir():
        path = path.resolve()
    snapshot = hub_snapshot(path)
    return path.name if snapshot is None else snapshot[0].rpartition("/")[2]


def preset_for(spec: Spec, model_name: str) -> Preset | None:
    """The preset of an editor for a model: the one with the model's name, else one that has it among its ``names``.
    Upper and lower case do not matter. Of two presets, the user's is taken. For a model folder that editcore wrote, the
    preset of its base is used if there is none with its own name."""
    presets = sorted(presets_of(spec).values(), key=lambda preset: not preset.own)
    base = base_name(model_name)
    for name_or_base, of in ((model_name, ""), *([] if base is None else [(base, f", the base of '{model_name}'")])):
        stem = model_stem(name_or_base).casefold()
        for preset in presets:
            if preset.name.casefold() == stem:
                note = f"named like the model{of}" if preset.own or of else ""
                return _with_note(preset, spec, note) if note else preset
        for preset in presets:
            for name in preset.models():
                if name.casefold() == stem:
                    return _with_note(preset, spec, f"which has '{name}' among its models{of}")
    return None


def _with_note(preset: Preset, spec: Spec, why: str) -> Preset:
    whose = f"your preset '{preset.name}' ({preset.source})" if preset.own else f"the preset '{preset.name}'"
    hidden = preset.own and preset.name in list_presets(getattr(spec, "presets", None))
    more = "; it replaces the package's preset of that name" if hidden else ""
    note = f"{spec.name} uses {whose}, {why}{more}."
    return replace(preset, note=note)
