"""Files of records, read line by line so that every complaint has a line number."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from editcore.datasets.formats import Unread, parse_record
from editcore.interfaces.errors import DatasetError, HParamsError, RequestError, UnknownNameError
from editcore.interfaces.specs import DatasetSpec
from editcore.interfaces.values import FactRecord, first_problem
from editcore.plugins.registry import boundary, resolve
from editcore.settings.hparams import HParams, build, describe, parse_assignment

__all__ = [
    "content_hash",
    "dataset_name",
    "dataset_settings",
    "is_path",
    "load_records",
    "load_worldfacts",
    "missing_file",
    "read_items",
    "short_name",
]

MAX_BYTES = 1 << 30
"""Largest file that is read, after decompression. CounterFact has 45 MB."""
SUFFIXES = (".jsonl", ".json", ".csv")
_WITH_ARGUMENT = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*:.*")

Items = Iterator[tuple[int, Any]]
"""(line number, what stands there)"""


class Registry(Protocol):
    """The part of :class:`editcore.Plugins` that names data sets."""

    def datasets(self) -> Mapping[str, DatasetSpec]:
        """What is registered, by name."""
        ...

    def dataset(self, name: str) -> DatasetSpec:
        """One of them; :class:`UnknownNameError` says what there is."""
        ...


def load_worldfacts() -> list[FactRecord]:
    """The data set that comes with editcore: counterfactual edits of facts that small models know."""
    resource = resources.files("editcore.datasets") / "worldfacts.jsonl"
    return _records(_json_lines(resource.read_text(encoding="utf-8"), "worldfacts.jsonl"), "worldfacts.jsonl")


def load_records(
    name_or_path: str | Path,
    *,
    plugins: Registry,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    notes: list[str] | None = None,
) -> list[FactRecord]:
    """Read a registered data set (``NAME`` or ``NAME:ARGUMENT``), or a ``.jsonl``, ``.json`` (an array) or ``.csv``
    file, plain or ``.gz``.

    Formats are recognised by their fields (:mod:`editcore.datasets.formats`). Ids are unique in the result: an id that
    comes again gets ``-2``, ``-3``, ... behind it.

    Args:
        settings: hyperparameters by the name of what they set; the data set has its own from there.
        notes: gets a sentence on fields of a file that are not used.

    Raises:
        UnknownNameError: there is no data set of that name.
        HParamsError: the data set does not take these settings or this argument.
        DatasetError: there is no such file, or it cannot be read; the message names the file and the line. Or the data
            set returned something else than records.
        PluginError: the data set's own code failed.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and not is_path(name, plugins):
        return _registered(name, settings or {}, plugins)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise DatasetError(missing_file(path, name, plugins))
    return _records(read_items(path), str(path), notes)


def is_path(name: str, plugins: Registry) -> bool:
    """Whether a file is meant: names of data sets have no dots and no slashes, but the argument behind the colon of a
    registered one may have them. A file in the way of a data set is not read."""
    if re.search(r"[./\\~]", name) is None:
        return False
    head, colon, _ = name.partition(":")
    return not colon or head not in plugins.datasets()


def dataset_name(dataset: str, plugins: Registry) -> str | None:
    """The data set that ``NAME`` or ``NAME:ARGUMENT`` asks for, whether there is one or not; ``None`` for a file."""
    return None if is_path(dataset, plugins) else dataset.partition(":")[0]


def short_name(dataset: str) -> str:
    """What a data set or a file of records is called in titles.

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
    """The value behind the colon: as it stands there for a text, otherwise read as ``--set`` reads it."""
    kinds = {setting.name: setting.type for setting in describe(hparams)}
    return text if kinds.get(name) in ("text", "text or none") else parse_assignment(f"{name}={text}")[1]


def content_hash(records: Iterable[FactRecord]) -> str:
    """SHA-256 of what the records hold, in their order. Records that a run has kept have the hash of those that it was
    given."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.model_dump(mode="json"), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _registered(dataset: str, settings: Mapping[str, Mapping[str, Any]], plugins: Registry) -> list[FactRecord]:
    spec = plugins.dataset(dataset.partition(":")[0])
    own = dataset_settings(dataset, settings, plugins=plugins)
    target = resolve(spec.target)
    with boundary(f"The data set '{dataset}' cannot be loaded: "):
        records = list(target() if own is None else target(own))
    for record in records:
        if type(record) is not FactRecord:  # a subclass would not come back from requests.jsonl
            raise DatasetError(
                f"The data set '{dataset}' returned something else than a FactRecord ({type(record).__name__}); "
                "fields of its own belong in a FactRecord's 'extra'."
            )
    return _kept(records, dataset)


def missing_file(path: Path, name: str, plugins: Registry) -> str:
    """What to say of a file that is not there."""
    if path.is_dir():
        return f"{path} is a folder; a data set is a file ({', '.join(SUFFIXES)}, each also .gz)."
    names = plugins.datasets()
    head, colon, _ = name.partition(":")
    asked = head if colon else path.name.split(".")[0]
    hint = str(UnknownNameError("data set", asked, names)).partition(". ")[2]
    return f"There is no file {name}. {hint}" if hint else f"There is no file {name}."


def read_items(path: Path) -> Items:
    """The records of a file as they stand there, each with its line.

    Raises:
        DatasetError: the file cannot be read, or is of another type.
    """
    suffix = path.suffix if path.suffix != ".gz" else path.with_suffix("").suffix
    readers: Mapping[str, Callable[[str, str], Items]] = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv}
    if suffix not in readers:
        raise DatasetError(
            f"{path}: files of type '{suffix}' are not read. Use {', '.join(SUFFIXES)}, each also with .gz."
        )
    return readers[suffix](_read(path), str(path))


def _read(path: Path) -> str:
    """The text of a file of bounded size; a small ``.gz`` may hide a large one, so what comes out is counted."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DatasetError(f"{path}: this is no complete gzip file ({error}).") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if len(content) > MAX_BYTES:
        raise DatasetError(f"{path}: more than {MAX_BYTES >> 20} MiB of text; split the file.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"{path}, line {line}: this is not UTF-8 text.") from error


def _json_lines(text: str, name: str) -> Items:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{name}, line {number}: this is no JSON ({_reason(error)}).") from error


def _json_array(text: str, name: str) -> Items:
    """The elements of a JSON array with the lines they begin at."""
    decoder = json.JSONDecoder()
    gap = re.compile(r"\s*")
    line, counted = 1, 0

    def after_gap(position: int) -> int:
        nonlocal line, counted
        match = gap.match(text, position)
        end = match.end() if match else position
        line += text.count("\n", counted, end)
        counted = end
        return end

    position = after_gap(0)
    if not text.startswith("[", position):
        raise DatasetError(f"{name}, line {line}: a .json file must be an array of records; use .jsonl for one a line.")
    position = after_gap(position + 1)
    while not text.startswith("]", position):
        start = line
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else start
            raise DatasetError(f"{name}, line {where}: this is no JSON ({_reason(error)}).") from error
        yield start, value
        position = after_gap(position)
        if text.startswith(",", position):
            position = after_gap(position + 1)
        elif not text.startswith("]", position):
            raise DatasetError(f"{name}, line {line}: this is no JSON (a comma or ] is missing after a record).")


def _csv(text: str, name: str) -> Items:
    """Rows by the names in the first line; empty cells count as absent."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise DatasetError(f"{name}, line {reader.line_num}: more cells than the first line has names.")
            yield reader.line_num, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        raise DatasetError(f"{name}, line {reader.reader.line_num}: this is no CSV ({error}).") from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)  # a number with too many digits


def _records(items: Items, name: str, notes: list[str] | None = None) -> list[FactRecord]:
    records: list[FactRecord] = []
    unread = Unread()
    for line, fields in items:
        if not isinstance(fields, dict):
            raise DatasetError(f"{name}, line {line}: a record must be an object, found {type(fields).__name__}.")
        try:
            records += parse_record(fields, unread)
        except RequestError as error:
            raise DatasetError(f"{name}, line {line}: {error}") from error
        except ValidationError as error:
            raise DatasetError(f"{name}, line {line}: {first_problem(error)}.") from error
    kept = _kept(records, name)
    if unread and notes is not None:
        found = ", ".join(f"{field} (in {count})" for field, count in sorted(unread.items()))
        notes.append(f"{name}: fields that are not used: {found}.")
    return kept


def _kept(records: Iterable[FactRecord], name: str) -> list[FactRecord]:
    kept = list(_unique(records))
    if not kept:
        raise DatasetError(f"{name}: there are no records in it.")
    return kept


def _unique(records: Iterable[FactRecord]) -> Iterator[FactRecord]:
    taken: set[str] = set()
    for record in records:
        identity, count = record.request.id, 1
        while identity in taken:
            count += 1
            identity = f"{record.request.id}-{count}"
        taken.add(identity)
        if count > 1:
            record = record.model_copy(update={"request": record.request.model_copy(update={"id": identity})})
        yield record
