"""Cells of a report's tables. Numbers are sorted as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from editcore.evaluation.measures import Measure
from editcore.report.document import Cell, Column, Table, one_line

__all__ = ["between", "change", "number", "quantity", "records_table", "seconds"]

_MISSING = "n/a"


def number(value: float | None, digits: int = 1) -> Cell:
    """A number with ``digits`` digits after the point; ``n/a`` if it is not known."""
    if value is None or math.isnan(value):
        return Cell(_MISSING, order=math.nan, tone="quiet")
    return Cell(f"{round(value, digits) + 0.0:,.{digits}f}", order=value)  # no -0.0


def quantity(value: float | None, measure: Measure | None) -> Cell:
    """A value in the format of its metric; without a metric, in the format of a percentage."""
    if measure is None or measure.percent or value is None or math.isnan(value):
        return number(value)
    return Cell(measure.text(value), order=value)


def change(before: float | None, after: float | None, digits: int = 0) -> Cell:
    """Two numbers with an arrow between them, sorted by the second."""
    old, new = number(before, digits), number(after, digits)
    if old.text == new.text == _MISSING:
        return new
    return Cell(f"{old.text} → {new.text}", order=new.order)


def between(ends: tuple[float, float] | None, text: Callable[[float], str] = "{:.1f}".format) -> Cell:
    """An interval, with its ends formatted by ``text``."""
    return Cell("", tone="quiet") if ends is None else Cell(f"{text(ends[0])} to {text(ends[1])}", order=ends[0])


def seconds(value: float) -> str:
    """A time in words.

    >>> seconds(4.2), seconds(191), seconds(7260)
    ('4.2 s', '3 min 11 s', '2 h 1 min')
    """
    if value < 10:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def records_table(
    caption: str, rows: Sequence[Mapping[str, Any]], *, names: Mapping[str, str], **options: bool
) -> Table:
    """Objects of one kind as a table, with a column for each key. Keys whose values are neither plain values nor
    intervals are left out.

    Args:
        names: headings by key, in the order of the columns; other keys follow under their own names.
    """
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_plain(value))
    ordered = [key for key in names if key in keys] + [key for key in keys if key not in names]
    numeric = {key: all(_is_number(row.get(key)) for row in rows) for key in ordered}
    return Table(
        caption=caption,
        columns=[Column(names.get(key, key.replace("_", " ")), number=numeric[key]) for key in ordered],
        rows=[[_cell(row.get(key), number=numeric[key]) for key in ordered] for row in rows],
        **options,
    )


def _is_plain(value: object) -> bool:
    return not isinstance(value, Mapping | list) or _is_interval(value)


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value)


def _is_number(value: object) -> bool:
    return value is None or _is_interval(value) or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any, *, number: bool) -> Cell:
    if value is None or value != value:
        return Cell(_MISSING if number else "", order=math.nan if number else None, tone="quiet")
    if _is_interval(value):
        return between((value[0], value[1]))
    if not number:
        return Cell(one_line(value))
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:,.4g}", order=float(value))
