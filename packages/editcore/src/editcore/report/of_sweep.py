"""The report of a sweep, from its tables. Their formats are in docs/reference/sweeps.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._util.tables import check_columns, damaged
from editcore._util.words import counted
from editcore.evaluation.measures import legend, objectives_of, shown
from editcore.interfaces.errors import RunError
from editcore.report.cells import between, number, quantity, seconds
from editcore.report.document import (
    Block,
    Cell,
    Code,
    Column,
    Document,
    Notice,
    Paragraph,
    Row,
    Section,
    Table,
    Tile,
    Tiles,
    one_line,
)
from editcore.report.pictures import saved_pictures
from editcore.runs.resume import is_finished
from editcore.sweeps import PLAN_NAME, STATE_NAME, SWEEP_NAME, UNEDITED, PlanRecord, SweepRecord, trial_directory

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["sweep_report"]

Link = Callable[[Path], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sweep:
    directory: Path
    plan: PlanRecord
    state: SweepRecord
    table: pd.DataFrame
    means: pd.DataFrame
    timings: pd.DataFrame

    @property
    def known(self) -> set[str]:
        """The columns of the table of means with a value."""
        return {str(name) for name in self.means if any(value != "" for value in self.means[name])}

    def cells(self, row: Mapping[str, Any], name: str) -> tuple[Cell, Cell]:
        """A metric's value in a row of a table, and its interval."""
        measure = next((measure for measure in self.plan.metrics if measure.key == name), None)
        low, high = (_float(row.get(f"{name}_{end}", "")) for end in ("low", "high"))
        ends = None if math.isnan(low) else (low, high)
        return quantity(_float(row[name]), measure), between(ends) if measure is None else between(ends, measure.text)

    def metrics(self, table: pd.DataFrame) -> Mapping[str, str]:
        """Headings by the columns of a table that have metrics."""
        headings = {measure.key: measure.heading for measure in shown(self.plan.metrics, self.known)}
        return {name: heading for name, heading in {**headings, "retention": "retention (%)"}.items() if name in table}


def sweep_report(directory: Path, *, writer: str, link_to: Link) -> Document:
    """The report of a sweep that ran to its end, with or without failed trials.

    Args:
        link_to: gives the address of a path, relative to the page.

    Raises:
        RunError: the sweep has no tables yet, or a file is missing or damaged.
    """
    sweep = _read(directory)
    sections = [
        Section("Summary", list(_summary(sweep))),
        Section("Means", list(_means(sweep))),
        Section("Figures", saved_pictures(directory / sweep.plan.title)),
        Section("Failures", list(_failures(sweep, link_to))),
        Section("Trials", [_trials(sweep, link_to)]),
        Section("Reproduce", list(_reproduce(sweep))),
        Section("Notes", [Paragraph(note) for note in sweep.plan.notes]),
    ]
    return Document(
        title=sweep.plan.title.replace("_", " "),
        lead=sweep.plan.summary or f"A sweep of {counted(len(sweep.plan.arms), 'arm')}.",
        sections=[section for section in sections if section.blocks],
        writer=writer,
    )


# Files


def _read(directory: Path) -> _Sweep:
    plan = PlanRecord.read_file(directory / PLAN_NAME)
    folder = directory / plan.title
    if not (directory / STATE_NAME).exists() or not (folder / f"{plan.title}.csv").exists():
        raise RunError(
            f"The sweep in {directory} has no tables yet; run it to its end first with the command that began it."
        )
    return _Sweep(
        directory=directory,
        plan=plan,
        state=SweepRecord.read_file(directory / STATE_NAME),
        table=_csv(folder / f"{plan.title}.csv", ("arm", *plan.axes, "seed", "key", "status", "error"), plan.axes),
        means=_csv(folder / f"{plan.title}_mean.csv", ("arm", *plan.axes, "seeds", "interval"), plan.axes),
        timings=_csv(folder / "timings.csv", ("key", "seconds"), plan.axes),
    )


def _csv(path: Path, columns: Sequence[str], axes: Mapping[str, Any]) -> pd.DataFrame:
    """A table in which values of axes, keys and reasons stay texts."""
    import pandas as pd

    texts = dict.fromkeys(("arm", "key", "status", "error", "interval", *axes), str)
    try:
        frame = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values={})
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, pd.errors.ParserError) as error:
        raise damaged(path, error) from error
    check_columns(frame, columns, path)
    return frame


# Sections


def _summary(sweep: _Sweep) -> Iterator[Block]:
    state, plan = sweep.state, sweep.plan
    if state.state == "interrupted":
        yield Notice(f"The sweep was interrupted: {state.finished} of {state.trials} trials are finished.")
    elif state.failed:
        yield Notice(f"{state.failed} of {counted(state.trials, 'trial')} failed; the reasons are below.")
    cost = sum({row["key"]: _float(row["seconds"]) for row in _rows(sweep.timings)}.values())  # points share trials
    yield Tiles(
        [
            Tile(name="Trials finished", value=str(state.finished), note=f"of {state.trials}"),
            Tile(name="Failed", value=str(state.failed)),
            Tile(name="Arms", value=str(len(plan.arms))),
            Tile(name="Seeds", value=str(len(plan.seeds))),
            Tile(name="Time of all trials", value=seconds(cost)),
        ]
    )
    for measure in objectives_of(plan.metrics, sweep.known)[:1]:
        if measure.key not in sweep.means:
            continue
        edited = [row for row in _rows(sweep.means) if row["arm"] != UNEDITED]
        scored = [(value, row) for row in edited if not math.isnan(value := _float(row[measure.key]))]
        if scored:
            choose = max if measure.better == "higher" else min
            value, best = choose(scored, key=lambda pair: pair[0])
            low, high = _float(best[f"{measure.key}_low"]), _float(best[f"{measure.key}_high"])
            ends = "" if math.isnan(low) else f" (95 % interval {measure.text(low)} to {measure.text(high)})"
            yield Paragraph(f"The best mean of {measure.key} is {measure.text(value)}{ends}: {_name(best, plan)}.")


def _name(row: Mapping[str, Any], plan: PlanRecord) -> str:
    settings = [f"{axis} {row[axis]}" for axis in plan.axes if row[axis] != ""]
    return ", ".join([f"arm {row['arm']}", *settings])


def _means(sweep: _Sweep) -> Iterator[Block]:
    metrics = sweep.metrics(sweep.means)
    if not len(sweep.means):
        yield Paragraph("No trial is finished.")
        return
    yield Table(
        caption=(
            f"Means after the last edit; {legend(shown(sweep.plan.metrics, sweep.known))}. Intervals are 95 %: over "
            "seeds, by Student's t, where there are two or more, otherwise over facts."
        ),
        columns=[
            Column("arm"),
            *map(Column, sweep.plan.axes),
            Column("seeds", number=True),
            *(Column(heading, number=True) for name in metrics for heading in (metrics[name], "interval")),
        ],
        rows=[
            [
                *(one_line(row[name]) for name in ("arm", *sweep.plan.axes)),
                number(_float(row["seeds"]), 0),
                *(cell for name in metrics for cell in sweep.cells(row, name)),
            ]
            for row in _rows(sweep.means)
        ],
        search=len(sweep.means) > 12,
    )


def _failures(sweep: _Sweep, link_to: Link) -> Iterator[Block]:
    failed = {row["key"]: row for row in _rows(sweep.table) if row["status"] == "failed"}
    if failed:
        yield Table(
            caption="Trials that failed; 'editctl sweep --retry-failed' runs them again",
            columns=[Column("trial"), Column("what"), Column("why")],
            rows=[
                [_link(sweep, key, link_to), _name(row, sweep.plan), one_line(row["error"])]
                for key, row in failed.items()
            ],
        )


def _trials(sweep: _Sweep, link_to: Link) -> Table:
    metrics = sweep.metrics(sweep.table)
    known = {row["key"]: row for row in _rows(sweep.timings)}
    rows: list[Row] = []
    for row in _rows(sweep.table):
        key = row["key"]
        cost = _float(known.get(key, {}).get("seconds", ""))
        rows.append(
            [
                _link(sweep, key, link_to),
                *(one_line(row[name]) for name in ("arm", *sweep.plan.axes)),
                number(_float(row["seed"]), 0),
                Cell(row["status"], tone="bad" if row["status"] == "failed" else ""),
                *(sweep.cells(row, name)[0] for name in metrics),
                Cell("n/a", order=math.nan, tone="quiet") if math.isnan(cost) else Cell(seconds(cost), order=cost),
            ]
        )
    return Table(
        caption="Every trial, with its run directory or, where there is one, its report",
        columns=[
            Column("trial"),
            Column("arm"),
            *map(Column, sweep.plan.axes),
            Column("seed", number=True),
            Column("state"),
            *(Column(heading, number=True) for heading in metrics.values()),
            Column("time", number=True),
        ],
        rows=rows,
        search=True,
    )


def _link(sweep: _Sweep, key: str, link_to: Link) -> Cell:
    trial = trial_directory(sweep.directory, key)
    own = trial / "report" / "index.html"
    target = own if is_finished(trial) and own.exists() else trial
    return Cell(key[:8], link=link_to(target) if trial.exists() else "")


def _reproduce(sweep: _Sweep) -> Iterator[Block]:
    if sweep.state.command:
        yield Paragraph("The sweep was started with:")
        yield Code(sweep.state.command)
    file = sweep.directory / SWEEP_NAME
    if file.exists():
        yield Paragraph("Its file:")
        yield Code(file.read_text(encoding="utf-8", errors="replace").rstrip())


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict(orient="records")]


def _float(value: Any) -> float:
    return math.nan if value == "" else float(value)
