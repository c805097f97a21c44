"""Shows the progress of a sweep: a live table on a terminal, elsewhere a line per change of a trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from editcore.cli.console import make_console

if TYPE_CHECKING:
    from editcore.sweeps import Plan, State

__all__ = ["SweepView"]

_AROUND = 6
"""Lines of a terminal that the table does not use."""


class SweepView:
    """A :class:`editcore.sweeps.Watch` on stderr."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or make_console(stderr=True)
        self._clock = clock
        self._states: dict[str, State] = {}
        self._names: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._since: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> SweepView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, plan: Plan, states: Mapping[str, State]) -> None:
        """Show the trials that will run."""
        self._states = dict(states)
        for point in plan.points:
            values = (f"{name.rpartition('.')[2]}={value}" for name, value in point.values.items())
            self._names.setdefault(point.key, " ".join([point.arm, *values, f"seed={point.seed}"]))
        for note in plan.notes:
            self._console.print(f"Note: {note}")
        self._console.print(self._counts())
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=2, transient=True)
            self._live.start()

    def change(self, key: str, state: State, *, error: str = "") -> None:
        """Show that a trial was started, is finished, or failed."""
        again = self._states[key] == "running" and state == "running"
        self._states[key] = state
        self._errors[key] = error
        if state == "running":
            self._since[key] = self._clock()
        else:
            self._took[key] = self._clock() - self._since[key]
        if self._live is None:
            what = "again, its worker was lost" if again else state
            took = f" in {self._took[key]:.0f} s" if key in self._took else ""
            why = f": {error}" if error else ""
            self._console.print(f"{key[:8]} {self._names[key]}: {what}{took}{why}  [{self._counts()}]")

    def _counts(self) -> str:
        states = list(self._states.values())
        shown = [f"{states.count(state)} {state}" for state in ("finished", "failed", "running", "waiting")]
        return f"{len(states)} trials: " + ", ".join(text for text in shown if not text.startswith("0 "))

    def _table(self) -> Group:
        """Running trials first, then the latest finished ones, then waiting ones; as many as fit."""
        table = Table("trial", "", "state", "seconds", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        running = [key for key, state in self._states.items() if state == "running"]
        ended = [key for key in reversed(self._took) if key not in running]
        waiting = [key for key, state in self._states.items() if state == "waiting"]
        room = max(1, self._console.height - _AROUND)
        now = self._clock()
        for key in [*running, *ended, *waiting][:room]:
            state = self._states[key]
            took = now - self._since[key] if state == "running" else self._took.get(key)
            said = Text(f"{state}: {self._errors[key]}" if self._errors.get(key) else state)
            table.add_row(key[:8], Text(self._names[key]), said, "" if took is None else f"{took:.0f}")
        return Group(table, Text(self._counts()))
