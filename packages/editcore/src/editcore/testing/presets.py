"""The contract of an editor's presets."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping

from editcore.plugins.calls import resolve
from editcore.plugins.registry import Plugins
from editcore.settings.hparams import HParams, build, list_presets, load_preset, preset_models

__all__ = ["check_presets"]


def check_presets(editor: str, published: Mapping[str, Mapping[str, object]] | None = None) -> None:
    """Check that the presets of an installed editor keep what users rely on.

    Each preset fits the editor's hyperparameters, begins with a comment that says where its numbers are from, and names
    no model of another preset. The presets in ``published`` exist and have the given values.

    Raises:
        AssertionError: a preset is wrong; the message names it.
    """
    spec = Plugins.load().editor(editor)
    assert spec.presets is not None, f"the editor {editor} announces no package of presets"
    names = list_presets(spec.presets)
    hparams: type[HParams] = resolve(spec.hparams)
    owners: dict[str, str] = {}
    for name in names:
        build(hparams, [load_preset(spec.presets, name)], owner=f"{editor}, preset {name}")
        text = importlib.resources.files(spec.presets).joinpath(f"{name}.toml").read_text("utf-8")
        assert text.startswith("# "), f"{editor}, preset {name}: the first line must say where the numbers are from"
        for model in (name, *preset_models(spec.presets, name)):
            owner = owners.setdefault(model.casefold(), name)
            assert owner == name, f"{editor}: the presets {owner} and {name} are both for the model {model}"
    for name, expected in (published or {}).items():
        assert name in names, f"{editor} has no preset {name}; it has {', '.join(names)}"
        found = build(hparams, [load_preset(spec.presets, name)], owner=editor)
        for field, value in expected.items():
            actual = getattr(found, field)
            assert actual == value, f"{editor}, preset {name}: {field} is {actual!r}, published: {value!r}"
