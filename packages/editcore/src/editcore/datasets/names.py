"""Finds the data set that ``NAME``, ``NAME:ARGUMENT`` or a path names, and its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from editcore.datasets.files import SUFFIXES
from editcore.datasets.published import published_files, published_path
from editcore.interfaces.errors import HParamsError, UnknownNameError
from editcore.interfaces.specs import ComponentSpec, DatasetSpec
from editcore.plugins.calls import resolve
from editcore.settings.hparams import HParams, build, describe, parse_assignment

__all__ = ["Registry", "dataset_name", "dataset_settings", "is_path", "missing_file", "short_name"]

_WITH_ARGUMENT = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*:.*")


class Registry(Protocol):
    """The part of :class:`editcore.Plugins` that has the data sets and their formats."""

    def datasets(self) -> Mapping[str, DatasetSpec]:
        """The registered data sets, by name."""
        ...

    def dataset(self, name: str) -> DatasetSpec:
        """The data set of that name; :class:`UnknownNameError` says what is installed."""
        ...

    def components(self, kind: str) -> Mapping[str, ComponentSpec]:
        """The parts offered for one extension point."""
        ...


def is_path(name: str, plugins: Registry) -> bool:
    """Whether ``name`` is the path of a file. Names of data sets have no dots and no slashes, but the argument after
    the colon of a registered one may have them. A file that has the name of a data set is not read."""
    if re.search(r"[./\\~]", name) is None:
        return False
    head, colon, _ = name.partition(":")
    return not colon or head not in plugins.datasets()


def dataset_name(dataset: str, plugins: Registry) -> str | None:
    """The data set that ``NAME`` or ``NAME:ARGUMENT`` asks for, whether there is one or not; ``None`` for a file."""
    return None if is_path(dataset, plugins) else dataset.partition(":")[0]


def short_name(dataset: str) -> str:
    """The name of a data set or a file of records in titles.

    >>> short_name("toy-facts:some/where"), short_name("some/where/facts.jsonl")
    ('toy-facts:some/where', 'facts.jsonl')
    """
    return dataset if _WITH_ARGUMENT.fullmatch(dataset) else Path(dataset).name


def dataset_settings(dataset: str, settings: Mapping[str, Mapping[str, Any]], *, plugins: Registry) -> HParams | None:
    """The hyperparameters of a data set: its section of ``settings``, and its argument. ``None`` if it has none, and
    for a file.

    Raises:
        UnknownNameError: there is no data set of that name.
        HParamsError: a setting is unknown or wrong, the data set takes no argument, or the argument and the setting
            that it stands for have different values.
    """
    name = dataset_name(dataset, plugins)
    if name is None:
        return None
    spec = plugins.dataset(name)
    _, colon, text = dataset.partition(":")
    if colon and not spec.argument:
        raise HParamsError(f"The data set '{name}' takes no argument; found '{dataset}'.")
    if spec.hparams is None:
        return None
    hparams: type[HParams] = resolve(spec.hparams)
    given = settings.get(name, {})
    if not colon:
        return build(hparams, [given], owner=name)
    own = build(hparams, [given, {spec.argument: _argument(hparams, spec.argument, text)}], owner=name)
    if spec.argument in given:
        alone = build(hparams, [given], owner=name)
        if getattr(alone, spec.argument) != getattr(own, spec.argument):
            raise HParamsError(
                f"The data set is '{dataset}', and {name}.{spec.argument} is set to {given[spec.argument]!r}; "
                "leave one of the two out."
            )
    return own


def _argument(hparams: type[HParams], name: str, text: str) -> object:
    """The value after the colon. For a text it is taken as it is, otherwise it is read as ``--set`` reads it."""
    kinds = {setting.name: setting.type for setting in describe(hparams)}
    return text if kinds.get(name) in ("text", "text or none") else parse_assignment(f"{name}={text}")[1]


def missing_file(path: Path, name: str, plugins: Registry) -> str:
    """A message about a file that is not there."""
    if path.is_dir():
        return f"{path} is a folder; a data set is a file ({', '.join(SUFFIXES)}, each also .gz)."
    names = plugins.datasets()
    head, colon, _ = name.partition(":")
    asked = head if colon else path.name.split(".")[0]
    if (entry := published_files().get(asked)) is not None:
        return (
            f"There is no file {name}. That data set does not come with editcore: 'editctl data pull {asked}' fetches "
            f"it to {published_path(entry)}. Available here: {', '.join(sorted(names))}."
        )
    hint = str(UnknownNameError("data set", asked, names)).partition(". ")[2]
    return f"There is no file {name}. {hint}" if hint else f"There is no file {name}."
