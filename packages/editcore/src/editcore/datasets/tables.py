"""Tables of facts as people paste them: from a spreadsheet, or in Markdown; with a row of names or without one."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence

from editcore.interfaces.errors import DatasetError, RequestError

__all__ = ["COLUMNS", "delimiter_of", "table_rows"]

COLUMNS = ("subject", "prompt", "target_new", "target_true")
"""The columns of a table without a row of names. The last one may be left out."""

_RULE = re.compile(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*")
_PIPE = re.compile(r"(?<!\\)\|")

Rows = Iterator[tuple[int, list[str]]]


def table_rows(text: str, name: str, *, is_text: Callable[[str], bool]) -> Iterator[tuple[int, object]]:
    """The facts of a table, each with the line at which it ends. Its cells are separated by tabs, by semicolons, by
    commas, or as in Markdown.

    The first row has the names of the columns if a cell of it is ``prompt``; otherwise the columns are
    :data:`COLUMNS`. Empty cells count as absent. A row that cannot be read is replaced by the error.

    Args:
        is_text: whether a cell was UTF-8.

    Raises:
        DatasetError: it is not a table.
    """
    rows = _markdown(text) if _is_markdown(text) else _separated(text, name)
    names: Sequence[str] | None = None
    for line, cells in rows:
        while cells and not cells[-1]:  # a spreadsheet adds empty columns
            cells.pop()
        if not cells:
            continue
        if names is None:
            head = [re.sub(r"[ -]+", "_", cell.casefold()) for cell in cells]
            names = head if "prompt" in head else COLUMNS
            if names is head:
                continue
        if not all(map(is_text, cells)):
            yield line, RequestError("This is not UTF-8 text.")
        elif len(cells) > len(names) or (names is COLUMNS and len(cells) < 3):
            asked = "its first row has" if names is not COLUMNS else "a row has 3 or 4: " + ", ".join(COLUMNS)
            count = f" {len(names)}" if names is not COLUMNS else ""
            yield line, RequestError(f"It has {len(cells)} cell{'s' * (len(cells) > 1)}; {asked}{count}.")
        else:
            yield line, {key: cell for key, cell in zip(names, cells, strict=False) if cell}


def delimiter_of(line: str) -> str:
    """What separates the cells of a line: a tab, a semicolon or a comma."""
    return next((mark for mark in "\t;" if mark in line), ",")


def _is_markdown(text: str) -> bool:
    first, second = [*(line.strip() for line in text.splitlines() if line.strip()), "", ""][:2]
    return first.startswith("|") or _RULE.fullmatch(second) is not None


def _markdown(text: str) -> Rows:
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if line and not _RULE.fullmatch(line):
            inner = line.removeprefix("|")
            inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
            yield number, [cell.strip().replace("\\|", "|") for cell in _PIPE.split(inner)]


def _separated(text: str, name: str) -> Rows:
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = delimiter_of(first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        if delimiter != "\t":
            raise DatasetError(f"{name}, line {reader.line_num}: this is not a table ({error}).") from error
        # Spreadsheets copy a cell such as "The Hobbit" was written by with its quotes as they are.
        rows = list(enumerate((line.split("\t") for line in text.splitlines()), start=1))
    for line, cells in rows:
        yield line, [cell.strip() for cell in cells]
