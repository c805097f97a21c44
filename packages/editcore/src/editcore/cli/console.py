"""Output of commands: tables, and the progress of long work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bars,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column, Table
from rich.text import Text

from editcore._util.files import json_text

__all__ = ["TerminalProgress", "make_console", "print_json", "print_table"]

_UNBROKEN = 10_000
"""Width of output that does not go to a terminal, so that lines stay whole."""


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is (no markup, no emoji codes), and breaks lines only on a terminal.

    ``NO_COLOR`` and ``COLUMNS`` are honoured.
    """
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNBROKEN
    return console


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    right: Collection[str] = (),
    console: Console | None = None,
) -> None:
    """Print a table with a heading per column; the columns named in ``right`` are aligned to the right.

    Words are not broken. If the columns do not fit beside each other, each row becomes a block of lines: its first
    cell, and under it the other cells with their headings.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    console = console or make_console()
    if title is not None:  # a title inside the table would be broken to the table's width
        console.print(title, style="bold")
    widths = _widths(columns, texts, console.width)
    if widths is None:
        _print_blocks(columns, texts, console)
        return
    table = Table(
        *(
            Column(name, justify="right" if name in right else "left", overflow="fold", width=width)
            for name, width in zip(columns, widths, strict=True)
        ),
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, _GAP, 0, 0),
    )
    for row in texts:
        table.add_row(*row)
    console.print(table)


_GAP = 2
"""Characters between two columns of a table."""
_READABLE = 28
"""Least width in characters of a column with longer texts, so that they stay readable."""


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """The width of each column of a table; ``None`` if they do not fit with whole words and readable widths."""
    least, most = [], []
    for cells in zip(columns, *rows, strict=True):
        longest = max(cell_len(line) for cell in cells for line in cell.split("\n"))
        word = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
        most.append(longest)
        least.append(max(word, min(longest, _READABLE)))
    room -= _GAP * (len(columns) - 1)
    if sum(most) <= room:
        return most
    if sum(least) > room:
        return None
    widths = list(least)
    for _ in range(room - sum(least)):  # each character goes to the column that lacks most
        place = max(range(len(widths)), key=lambda index: most[index] - widths[index])
        widths[place] += 1
    return widths


def _print_blocks(columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    for number, row in enumerate(rows):
        if number:
            console.print()
        console.print(row[0] or "-", style="bold")
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                lines = Text(f"{name}: {cell}" if name else cell).wrap(console, max(1, console.width - _GAP))
                console.print(Padding(Group(*lines), (0, 0, 0, _GAP), expand=False))


def print_json(value: object) -> None:
    """Print JSON for programs."""
    print(json_text(value, indent=2))


class TerminalProgress:
    """Shows the progress of long work on stderr: bars on a terminal, elsewhere a line from time to time.

    A bar has the steps done, the rate and the remaining time. Without a terminal a line has the same, at most every
    ``seconds_between_lines`` and once at the end.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or make_console(stderr=True)
        self._between = seconds_between_lines
        self._clock = clock
        self._bars: Bars | None = None

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Begin a task; see :class:`editcore.Progress`."""
        shown = self._bar(description, total) if self._console.is_terminal else self._lines(description, total)
        with shown as advance:
            yield advance

    @contextmanager
    def _bar(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        if self._bars is not None:  # a task within a task gets a bar below it
            task = self._bars.add_task(description, total=total)
            try:
                yield _advancer(self._bars, task)
            finally:
                self._bars.remove_task(task)
            return
        with Bars(*_bar_columns(), console=self._console) as self._bars:
            try:
                yield _advancer(self._bars, self._bars.add_task(description, total=total))
            finally:
                self._bars = None

    @contextmanager
    def _lines(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        start = last = self._clock()
        done = 0

        def advance(steps: int) -> None:
            nonlocal done, last
            done += steps
            now = self._clock()
            if 0 < done < total and now - last >= self._between:
                last = now
                remaining = (now - start) / done * (total - done)
                self._console.print(
                    f"{description}: {done}/{total}, {_rate(done, now - start)}, {_duration(remaining)} left"
                )

        try:
            yield advance
        finally:
            seconds = self._clock() - start
            self._console.print(f"{description}: {done}/{total} in {_duration(seconds)}, {_rate(done, seconds)}")


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.completed, task.elapsed or 0.0))


class _RemainingColumn(ProgressColumn):
    """The time that is left; empty until it is known."""

    def render(self, task: Task) -> Text:
        known = task.time_remaining is not None and not task.finished
        return Text(f"{_duration(task.time_remaining or 0.0)} left" if known else "")


def _bar_columns() -> tuple[ProgressColumn, ...]:
    description = TextColumn("{task.description}", markup=False)
    return (description, BarColumn(), MofNCompleteColumn(), _RateColumn(), _RemainingColumn())


def _advancer(bars: Bars, task: TaskID) -> Callable[[int], None]:
    return lambda steps: bars.advance(task, steps)


def _rate(steps: float, seconds: float) -> str:
    """Steps per second, or seconds per step for slow work."""
    if not steps or seconds <= 0:
        return "-"
    rate = steps / seconds
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
