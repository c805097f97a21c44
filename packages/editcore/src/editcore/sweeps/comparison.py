"""The comparison of installed editors: a sweep with one arm per editor. ``editctl compare`` runs it."""

from __future__ import annotations

from collections.abc import Sequence

from editcore.interfaces.errors import HParamsError
from editcore.plugins.registry import Plugins
from editcore.runs.fit import refuse_duplicates
from editcore.settings.hparams import toml_lines
from editcore.sweeps.file import SweepFile, parse_sweep

__all__ = ["make_comparison"]

_HEAD = """\
title = "comparison"
summary = "Editors on the same facts"

[base]
edits = 40
"""

_TAIL = """
[grid]
batch_size = [1, 10, 40]

[[figures]]
file = "{metric}_by_arm.png"
kind = "bars"
split = "batch_size"

[[figures]]
file = "objective_by_batch_size.png"
kind = "lines"
by = "batch_size"
"""


def make_comparison(plugins: Plugins, *, editors: Sequence[str] = (), arms: Sequence[str] = ()) -> SweepFile:
    """A sweep whose arms are editors on the same facts, in batches of 1, 10 and 40.

    Without ``editors`` and ``arms``, every installed editor is an arm. Editors that cannot run are left out when the
    sweep is planned. Baselines come first.

    Args:
        editors: the installed editors to compare; baselines come first, then they are in the order of the registry.
        arms: more arms, in their order: ``NAME=EDITOR+PLUGIN+PLUGIN``; or ``EDITOR+PLUGIN``, which is then also the
            name. A plugin is an extension or a backend.

    Raises:
        UnknownNameError: one of ``editors`` is not installed. For ``arms`` this is checked when the sweep is planned.
        HParamsError: an arm is malformed, two have one name, or no editor is installed.
    """
    refuse_duplicates("editor", editors)
    for name in editors:
        plugins.editor(name)
    everything = not editors and not arms
    installed = plugins.editors()
    tables: list[dict[str, object]] = [
        {"name": name, "editor": name, **({"optional": True} if everything else {})}
        for name in sorted(installed, key=lambda name: not installed[name].baseline)
        if everything or name in editors
    ]
    if everything and not tables:
        raise HParamsError("No editor is installed, so there is nothing to compare. See: editctl plugins")
    for text in arms:
        table = _parse_arm(text)
        if any(table["name"] == other["name"] for other in tables):
            raise HParamsError(
                f"Two arms are named '{table['name']}'. Give one another name: "
                f"--arm 'NAME={text.partition('=')[2] or text}'."
            )
        tables.append(table)
    middle = "".join(f"\n[[arms]]\n{toml_lines(table)}" for table in tables)
    return parse_sweep(f"{_HEAD}{middle}{_TAIL}", origin="The comparison", stem="comparison")


def _parse_arm(text: str) -> dict[str, object]:
    """``NAME=EDITOR+PLUGIN`` as the table of an arm."""
    name, equals, composition = text.partition("=")
    editor, *companions = (part.strip() for part in (composition if equals else name).split("+"))
    if not name.strip() or not editor or not all(companions):
        raise HParamsError(
            f"--arm takes NAME=EDITOR, NAME=EDITOR+PLUGIN+PLUGIN or the name of an editor, found '{text}'."
        )
    table: dict[str, object] = {"name": name.strip(), "editor": editor}
    return table | ({"plugins": companions} if companions else {})
