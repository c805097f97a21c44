"""Pictures of results. One look for all of them, set here and nowhere else; needs no display and no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from editcore._files import replacing

if TYPE_CHECKING:
    from editcore.evaluation import Summary

__all__ = ["AFTER", "BEFORE", "new_figure", "per_relation_figure", "save", "summary_figure"]

# The blue of Okabe and Ito's palette and a pale grey-blue: they differ in lightness, so that colour-blind readers and
# grey prints tell them apart.
BEFORE = "#9DB4C0"
AFTER = "#0072B2"
INK = "#222222"
GRID = "#DDDDDD"
DPI = 200
COLUMN_WIDTH = 5.0
"""Inches. Text is set in the sizes below, so that the figure can be read at the width of a column."""

_NAMES: Mapping[str, str] = {
    "ES": "Efficacy\n(ES)",
    "PS": "Paraphrase\n(PS)",
    "NS": "Neighbourhood\n(NS)",
    "score": "Score\n(harmonic mean)",
}


def new_figure(*, width: float = COLUMN_WIDTH, height: float = 3.1) -> tuple[Figure, Any]:
    """An empty figure in the house style, and its axes."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path | str) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        StorageError: the disk is full or the folder read-only; nothing is left behind.
    """
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def summary_figure(before: Summary, after: Summary, *, title: str) -> Figure:
    """ES, PS, NS and score before and after the edits, in percent, with 95 % intervals over cases.

    The score is a mean of the other three and has no interval of its own. What cannot be computed has no bar.
    """
    figure, axes = new_figure()
    names = list(_NAMES)
    width = 0.38
    for summary, offset, colour, label in ((before, -0.2, BEFORE, "before"), (after, 0.2, AFTER, "after")):
        values = _values(summary, names)
        places = [index + offset for index in range(len(names))]
        tops = [_top(summary, name, value) for name, value in zip(names, values, strict=True)]
        heights = [0.0 if math.isnan(value) else value for value in values]
        axes.bar(places, heights, width, color=colour, label=f"{label} ({_counted(summary.cases, 'fact')})")
        _error_bars(axes, summary, names, places, label="95 % interval" if summary is after else None)
        for place, value, top in zip(places, values, tops, strict=True):
            text = "n/a" if math.isnan(value) else f"{value:.0f}"
            axes.annotate(
                text, (place, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8, color=INK
            )
    axes.set_xticks(range(len(names)), [_NAMES[name] for name in names])
    axes.tick_params(axis="x", length=0)
    _percent_axis(axes.yaxis, axes.set_yticks)
    axes.set_ylim(0, 112)
    axes.set_ylabel("prompts won (%)", fontsize=8.5, color=INK)
    _head(figure, axes, title)
    return figure


def per_relation_figure(
    before: Mapping[str, Summary], after: Mapping[str, Summary], *, metric: str = "NS", title: str
) -> Figure:
    """One metric per relation: a line from before to after, so that the relations that suffer stand out.

    Args:
        metric: ``ES``, ``PS``, ``NS`` or an accuracy; relations for which it cannot be computed are left out.
    """
    rows = [
        (relation, before[relation].metrics[metric].mean, after[relation].metrics[metric].mean)
        for relation in before
        if relation in after and metric in before[relation].metrics and metric in after[relation].metrics
    ]
    rows.sort(key=lambda row: (row[2] - row[1], row[0]), reverse=True)
    figure, axes = new_figure(height=1.1 + 0.2 * max(1, len(rows)))
    places = range(len(rows))
    axes.hlines(places, [row[1] for row in rows], [row[2] for row in rows], color=GRID, linewidth=3, zorder=1)
    axes.scatter([row[1] for row in rows], places, color=BEFORE, s=22, label="before", zorder=2)
    axes.scatter([row[2] for row in rows], places, color=AFTER, s=22, label="after", zorder=3)
    axes.set_yticks(places, [row[0] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    _percent_axis(axes.xaxis, axes.set_xticks)
    axes.set_xlim(-2, 102)
    axes.set_xlabel(f"{metric} (%)", fontsize=8.5, color=INK)
    _head(figure, axes, title)
    return figure


def _values(summary: Summary, names: Sequence[str]) -> list[float]:
    percentages = summary.percentages()
    return [percentages.get(name, math.nan) for name in names]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _top(summary: Summary, name: str, value: float) -> float:
    """Where the number stands: above the bar and its interval."""
    if math.isnan(value):
        return 0.0
    return max(value, summary.metrics[name].interval[1]) if name in summary.metrics else value


def _error_bars(
    axes: Any, summary: Summary, names: Sequence[str], places: Sequence[float], *, label: str | None
) -> None:
    for name, place in zip(names, places, strict=True):
        if name in summary.metrics:
            metric = summary.metrics[name]
            low, high = metric.interval
            axes.errorbar(
                place,
                metric.mean,
                yerr=[[max(0.0, metric.mean - low)], [max(0.0, high - metric.mean)]],
                color=INK,
                linewidth=1,
                capsize=2.5,
                label=label,
            )
            label = None  # one entry in the legend


def _percent_axis(axis: Any, set_ticks: Any) -> None:
    set_ticks(range(0, 101, 20))
    axis.grid(color=GRID, linewidth=0.6)


def _head(figure: Figure, axes: Any, title: str) -> None:
    figure.suptitle(title, fontsize=9.5, color=INK, x=0.02, ha="left")
    axes.legend(
        fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2,
        handlelength=1.2, handletextpad=0.5, columnspacing=1.2, labelcolor=INK,
    )  # fmt: skip
