"""Starts a plugin package: writes ``edit-NAME`` from a working template with tests and notes on what to change.

The templates are the folders of ``templates`` beside this module: one per kind, and ``common`` with what every package
has. Each file name ends in ``-tpl``, so that no tool takes the file for a module of editcore. In the templates the
plugin's name is ``template-name``, in module names ``template_name``, in class names ``TemplateName``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from packaging.version import Version

from editcore._util.folders import new_folder
from editcore.interfaces.errors import HParamsError, PluginError, StorageError, UnknownNameError
from editcore.plugins.installed import PluginInfo

__all__ = ["KINDS", "PackageKind", "create_package"]

_LONGEST_NAME = 30
_LONGEST_SUMMARY = 90
"""Number of letters. A longer summary would make lines of more than 120 letters in the package."""
_SUFFIX = "-tpl"
_SUMMARY = "TEMPLATE SUMMARY"
_REQUIREMENT = "editcore>=TEMPLATE"


@dataclass(frozen=True, slots=True)
class PackageKind:
    """A kind of package that can be started."""

    summary: str
    """The package's summary if none is given."""
    options: str
    """Options of an ``editctl run`` that uses the package. ``{name}`` is its name, ``{editor}`` any editor,
    ``{package}`` its folder."""


KINDS: Mapping[str, PackageKind] = {
    "editor": PackageKind(
        "Write facts by a least-squares change with a ridge.",
        "--editor {name} --edits 10",
    ),
    "backend": PackageKind(
        "Add changes to the weights, and restore the base bits.",
        "--editor {editor} --backend {name} --edits 10",
    ),
    "extension": PackageKind(
        "Count the active facts, and warn when they are many.",
        "--editor {editor} --plugin {name} --edits 10",
    ),
    "evaluator": PackageKind(
        "Measure what targets cost the model, and how many became likelier.",
        "--editor {editor} --evaluator {name} --edits 10",
    ),
    "dataset": PackageKind(
        "Facts from a file of JSON lines, with questions about them.",
        "--editor {editor} --dataset {name}:{package}/example.jsonl",
    ),
    "attachment": PackageKind(
        "Keep facts beside the weights, by the hidden states they are asked at.",
        "--editor {name} --edits 10",
    ),
}
"""By the value of ``--kind``."""


def create_package(
    name: str, *, kind: str, folder: Path, summary: str | None = None, installed: Iterable[PluginInfo] = ()
) -> Path:
    """Write the package ``edit-NAME`` into ``folder``, whole or not at all.

    Args:
        name: the word that users will type.
        kind: a key of :data:`KINDS`.
        folder: made if it is not there.
        summary: one sentence for listings; left out, the kind's own.
        installed: plugins whose names are taken.

    Returns:
        The package's folder.

    Raises:
        UnknownNameError: there is no such kind.
        HParamsError: the name or the summary is not allowed.
        PluginError: the name is taken.
        StorageError: ``folder`` has something of the package's name already, or cannot be written.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of plugin", kind, KINDS)
    _check_name(name)
    summary = KINDS[kind].summary if summary is None else summary
    _check_summary(summary)
    _refuse_taken(name, installed)
    package = folder / f"edit-{name}"
    if package.exists():
        raise StorageError(f"{package} is already there: give another name, or another folder with --out.")
    with new_folder(package) as temporary:
        for path, text in _files(kind):
            target = temporary / _renamed(path, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            own = _renamed(text, name).replace(_SUMMARY, summary).replace(_REQUIREMENT, _requirement())
            target.write_text(own, encoding="utf-8")
    return package


def _check_name(name: str) -> None:
    if name.startswith("edit-"):
        raise HParamsError(f"Give the name without 'edit-', which the package gets by itself; found '{name}'.")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > _LONGEST_NAME:
        raise HParamsError(
            f"A plugin's name has lower-case letters, digits and single hyphens, a letter first, {_LONGEST_NAME} at "
            f"most, such as my-plugin; found {name!r}."
        )


def _check_summary(summary: str) -> None:
    if (
        len(summary) > _LONGEST_SUMMARY
        or not summary.endswith(".")
        or not summary.strip(". ")
        or not summary.isprintable()
        or set(summary) & {'"', "\\"}
    ):
        raise HParamsError(
            f"A summary is one line of at most {_LONGEST_SUMMARY} letters that ends with a full stop and has no double "
            f"quotes and no backslashes; found {summary!r}."
        )


def _requirement() -> str:
    """A requirement for this editcore or a later one with the same major version. Before 1.0, the first two numbers
    count as the major version."""
    version = Version(importlib.metadata.version("editcore"))
    following = f"{version.major + 1}" if version.major else f"0.{version.minor + 1}"
    return f"editcore>={version.public},<{following}"


def _refuse_taken(name: str, installed: Iterable[PluginInfo]) -> None:
    for plugin in installed:
        if name == plugin.name or any(name in names for names in plugin.offers.values()):
            raise PluginError(
                f"The name '{name}' is taken by the plugin '{plugin.name}' ({plugin.distribution} {plugin.version}). "
                "Give another name, or uninstall that package first."
            )


def _files(kind: str) -> Iterator[tuple[str, str]]:
    """Path in the package and text of every file of a template."""
    templates = importlib.resources.files("editcore.plugins").joinpath("templates")
    for root in (templates / "common", templates / kind):
        for path, file in _below(root, ""):
            if path.endswith(_SUFFIX):
                yield path.removesuffix(_SUFFIX), file.read_text(encoding="utf-8")


def _below(folder: Traversable, path: str) -> Iterator[tuple[str, Traversable]]:
    for child in sorted(folder.iterdir(), key=lambda child: child.name):
        if child.is_dir():
            yield from _below(child, f"{path}{child.name}/")
        else:
            yield f"{path}{child.name}", child


def _renamed(text: str, name: str) -> str:
    """``text`` with the plugin's name in place of the template's, in all three spellings."""
    spellings = {
        "template-name": name,
        "template_name": name.replace("-", "_"),
        "TemplateName": "".join(part.capitalize() for part in name.split("-")),
    }
    for template, own in spellings.items():
        text = text.replace(template, own)
    return text
