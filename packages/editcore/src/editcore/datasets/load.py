"""Files of records, read line by line so that every complaint has a line number."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from editcore.datasets.formats import Unread, parse_record
from editcore.interfaces.errors import DatasetError, RequestError, UnknownNameError
from editcore.interfaces.specs import DatasetSpec
from editcore.interfaces.values import FactRecord, first_problem
from editcore.plugins.registry import resolve

__all__ = ["is_path", "load_records", "load_worldfacts", "missing_file", "read_items"]

MAX_BYTES = 1 << 30
"""Largest file that is read, after decompression. CounterFact has 45 MB."""
SUFFIXES = (".jsonl", ".json", ".csv")

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


def load_records(name_or_path: str | Path, *, plugins: Registry, notes: list[str] | None = None) -> list[FactRecord]:
    """Read a registered data set, or a ``.jsonl``, ``.json`` (an array) or ``.csv`` file, plain or ``.gz``.

    Formats are recognised by their fields (:mod:`editcore.datasets.formats`). Ids are unique in the result: an id that
    comes again gets ``-2``, ``-3``, ... behind it.

    Args:
        notes: gets a sentence on fields of a file that are not used.

    Raises:
        UnknownNameError: there is no data set of that name.
        DatasetError: there is no such file, or it cannot be read; the message names the file and the line.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and not is_path(name):
        return _registered(name, plugins)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise DatasetError(missing_file(path, name, plugins))
    return _records(read_items(path), str(path), notes)


def is_path(name: str) -> bool:
    """Whether a file is meant: names of data sets have no dots and no slashes. A file in the way of one is not read."""
    return re.search(r"[./\\~]", name) is not None


def _registered(name: str, plugins: Registry) -> list[FactRecord]:
    spec = plugins.dataset(name)
    records: Sequence[FactRecord] = resolve(spec.target)()
    return list(_unique(records))


def missing_file(path: Path, name: str, plugins: Registry) -> str:
    """What to say of a file that is not there."""
    if path.is_dir():
        return f"{path} is a folder; a data set is a file ({', '.join(SUFFIXES)}, each also .gz)."
    names = plugins.datasets()
    hint = str(UnknownNameError("data set", path.name.split(".")[0], names)).partition(". ")[2]
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
    if not records:
        raise DatasetError(f"{name}: there are no records in it.")
    if unread and notes is not None:
        found = ", ".join(f"{field} (in {count})" for field, count in sorted(unread.items()))
        notes.append(f"{name}: fields that are not used: {found}.")
    return list(_unique(records))


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
