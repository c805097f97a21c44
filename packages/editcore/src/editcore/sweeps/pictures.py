"""Draws the figures that a sweep file asks for, from the sweep's tables."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore.evaluation.measures import objectives_of, shown
from editcore.figures.studies import Estimate, bars_figure, curves_figure, lines_figure
from editcore.figures.style import save
from editcore.sweeps.file import FigureSpec
from editcore.sweeps.plan import Plan

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["draw", "estimate"]


def draw(plan: Plan, table: pd.DataFrame, retention: pd.DataFrame, folder: Path) -> tuple[str, ...]:
    """Draw every figure for which there are results.

    Returns:
        Notes on the figures that were not drawn.
    """
    notes = []
    finished = table[table["status"] == "finished"]
    known = {str(name) for name in finished if finished[name].notna().any()}
    figures = [figure for spec in plan.sweep.figures for figure in _figures_of(plan, spec, finished, known)]
    for spec in figures:
        source = retention if spec.kind == "forgetting" else finished
        wanted = _metrics_of(plan, spec, known)
        missing = [name for name in wanted if name not in source] if spec.kind != "forgetting" else []
        if missing:
            notes.append(f"{spec.file} is not drawn: the table has no column '{missing[0]}'.")
        elif not wanted and spec.kind != "forgetting":
            notes.append(f"{spec.file} is not drawn: it names no metric, and no evaluator has an objective.")
        elif source.empty:
            notes.append(f"{spec.file} is not drawn: no trial is finished.")
        else:
            save(_figure(plan, spec, source, wanted), folder / spec.file)
    return tuple(notes)


def _figures_of(plan: Plan, spec: FigureSpec, finished: pd.DataFrame, known: Collection[str]) -> Sequence[FigureSpec]:
    """The figure itself, or one for each metric that tables show and that has values."""
    if not spec.of_every_metric or finished.empty:
        return [spec]
    return [spec.of_metric(measure.key) for measure in shown(plan.measures, known) if measure.key in known]


def _figure(plan: Plan, spec: FigureSpec, rows: pd.DataFrame, wanted: Sequence[str]) -> Any:
    title = spec.title or plan.sweep.summary or plan.title
    split = spec.split or (None if spec.kind == "bars" and spec.by == "arm" else "arm")
    legend = "" if split in (None, "arm") else str(split).rpartition(".")[2]
    if spec.kind == "forgetting":
        labels = _values(rows, split or "arm")
        curves = {str(label): _curve(_where(rows, split, label)) for label in labels}
        return curves_figure(curves, title=title, split=legend)
    places = _values(rows, spec.by)
    labels = _values(rows, split) if split else [""]
    measures = {measure.key: measure for measure in plan.measures}
    panels = [
        (
            measures.get(name, name),
            {
                str(label): [estimate(_where(_where(rows, split, label), spec.by, place), name) for place in places]
                for label in labels
            },
        )
        for name in wanted
    ]
    if spec.kind == "lines":
        return lines_figure(places, panels, setting=spec.by, title=title, split=legend)
    metric, series = panels[0]
    before = f"before_{wanted[0]}"
    return bars_figure(
        [str(place) if spec.by == "arm" else f"{spec.by.rpartition('.')[2]} {place}" for place in places],
        series,
        metric=metric,
        title=title,
        before=float(rows[before].mean()) if before in rows else math.nan,
        split=legend,
    )


def _metrics_of(plan: Plan, spec: FigureSpec, known: Collection[str]) -> tuple[str, ...]:
    return spec.shown or tuple(measure.key for measure in objectives_of(plan.measures, known)[:1])


def estimate(rows: pd.DataFrame, metric: str) -> Estimate:
    """The mean of some rows, with its 95 % interval. Rows of one seed are averaged first.

    Over two or more seeds the interval is Student's t. For one seed it is the interval over facts. For several trials
    on the same facts it is the mean of their intervals, which is rather too wide.
    """
    from editcore.sweeps.tables import interval

    by_seed = rows.groupby("seed")[metric].mean().astype(float).dropna()
    if by_seed.empty:
        return Estimate(mean=math.nan)
    if len(by_seed) > 1:
        low, high = interval(by_seed.to_numpy())
    else:
        low, high = (
            float(rows[name].astype(float).mean()) if (name := f"{metric}_{end}") in rows else math.nan
            for end in ("low", "high")
        )
    return Estimate(mean=float(by_seed.mean()), low=low, high=high)


def _curve(rows: pd.DataFrame) -> dict[int, Estimate]:
    return {age: estimate(rows[rows["age"] == age], "retained") for age in map(int, rows["age"].unique())}


def _values(rows: pd.DataFrame, column: str | None) -> Sequence[Any]:
    """The different values of a column, in the order of the rows."""
    if column is None:
        return [""]
    seen: list[Any] = []
    for value in rows[column]:
        if value is not None and value not in seen:
            seen.append(value)
    return seen


def _where(rows: pd.DataFrame, column: str | None, wanted: Any) -> pd.DataFrame:
    return rows if column is None else rows[[value == wanted for value in rows[column]]]
