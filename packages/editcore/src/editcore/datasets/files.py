"""Files of records, read record by record, so that every error has a line number.

A record that cannot be read is replaced by a :class:`RequestError`, and reading continues after it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from editcore.datasets.tables import delimiter_of, table_rows
from editcore.interfaces.errors import DatasetError, RequestError

__all__ = ["MAX_BYTES", "STANDARD_INPUT", "SUFFIXES", "Entries", "json_lines", "read_entries", "read_standard_input"]

MAX_BYTES = 1 << 30
"""Largest file that is read, after decompression. CounterFact has 45 MB."""
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".md")
STANDARD_INPUT = "-"
"""Where a file of records may be given, this reads standard input."""

Entries = Iterator[tuple[int, Any]]
"""(line number, the record there; a RequestError where it cannot be read)"""


def read_entries(path: Path) -> Entries:
    """The records of a file, each with its line number. A record that cannot be read is replaced by the error.

    Raises:
        DatasetError: the file cannot be read, cannot be read beyond some record, or is of another type.
    """
    suffix = path.suffix if path.suffix != ".gz" else path.with_suffix("").suffix
    readers: Mapping[str, Callable[[str, str], Entries]] = {
        ".jsonl": json_lines,
        ".json": _json_array,
        ".csv": _csv,
        ".tsv": _table,
        ".md": _table,
    }
    if suffix == ".editpack":
        raise DatasetError(f"{path} is not a file of records: it is a pack of edits, which 'editctl apply' applies.")
    if suffix not in readers:
        raise DatasetError(
            f"{path}: files of type '{suffix}' are not read. Use {', '.join(SUFFIXES)}, each also with .gz."
        )
    return readers[suffix](_read(path), str(path))


def _read(path: Path) -> str:
    """The text of a file of bounded size. The size is counted after decompression, because a small ``.gz`` may hold a
    large file."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DatasetError(f"{path}: this is not a complete gzip file ({error}).") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return _decoded(content, str(path))


def read_standard_input() -> tuple[Entries, str]:
    """The records of standard input, and its name for messages: JSON lines, a JSON array, or a table
    (:mod:`editcore.datasets.tables`).

    Raises:
        DatasetError: as :func:`read_entries`.
    """
    name = "standard input"
    text = _decoded(sys.stdin.buffer.read(MAX_BYTES + 1), name)
    reader = {"[": _json_array, "{": json_lines}.get(text.lstrip()[:1], _table)
    return reader(text, name), name


def _decoded(content: bytes, name: str) -> str:
    if len(content) > MAX_BYTES:
        raise DatasetError(f"{name}: more than {MAX_BYTES >> 20} MiB of text; split the file.")
    # Bytes that are not UTF-8 become surrogates, which show in which record they are.
    return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


_NO_UTF8 = "This is not UTF-8 text."


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text)


def json_lines(text: str, name: str) -> Entries:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.rstrip()) if _is_text(line) else RequestError(_NO_UTF8)
        except (ValueError, RecursionError) as error:
            yield number, RequestError(f"This is not JSON ({_reason(error)}).")


def _json_array(text: str, name: str) -> Entries:
    """The elements of a JSON array, each with the line at which it begins."""
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
        start, begin = line, position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else start
            raise DatasetError(f"{name}, line {where}: this is not JSON ({_reason(error)}).") from error
        yield start, value if _is_text(text[begin:position]) else RequestError(_NO_UTF8)
        position = after_gap(position)
        if text.startswith(",", position):
            position = after_gap(position + 1)
        elif not text.startswith("]", position):
            raise DatasetError(f"{name}, line {line}: this is not JSON (a comma or ] is missing after a record).")


def _csv(text: str, name: str) -> Entries:
    """Rows, with the names from the first line. Empty cells count as absent."""
    delimiter = delimiter_of("" if "," in (first := text.partition("\n")[0]) else first)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        for row in reader:
            if None in row:
                yield reader.line_num, RequestError("It has more cells than the first line has names.")
            elif not all(map(_is_text, filter(None, row.values()))):
                yield reader.line_num, RequestError(_NO_UTF8)
            else:
                yield reader.line_num, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        raise DatasetError(f"{name}, line {reader.reader.line_num}: this is not CSV ({error}).") from error


def _table(text: str, name: str) -> Entries:
    return table_rows(text, name, is_text=_is_text)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)  # a number with too many digits
