"""Pictures of scores before and after a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from editcore.figures.style import (
    AFTER,
    BEFORE,
    GRID,
    INK,
    NAMES,
    counted,
    draw_intervals,
    new_figure,
    percent_axis,
    put_title,
    shortened,
    top_of_bar,
    values_of,
)

if TYPE_CHECKING:
    from editcore.evaluation import Summary

__all__ = ["per_relation_figure", "summary_figure"]


def summary_figure(before: Summary, after: Summary, *, title: str) -> Figure:
    """ES, PS, NS and score before and after the edits, in percent, with 95 % intervals over cases.

    The score is a mean of the other three and has no interval of its own. What cannot be computed has no bar.
    """
    figure, axes = new_figure()
    names = list(NAMES)
    width = 0.38
    for summary, offset, colour, label in ((before, -0.2, BEFORE, "before"), (after, 0.2, AFTER, "after")):
        values = values_of(summary, names)
        places = [index + offset for index in range(len(names))]
        tops = [top_of_bar(summary, name, value) for name, value in zip(names, values, strict=True)]
        heights = [0.0 if math.isnan(value) else value for value in values]
        axes.bar(places, heights, width, color=colour, label=f"{label} ({counted(summary.cases, 'fact')})")
        draw_intervals(axes, summary, names, places, label="95 % interval" if summary is after else None)
        for place, value, top in zip(places, values, tops, strict=True):
            text = "n/a" if math.isnan(value) else f"{value:.0f}"
            axes.annotate(
                text, (place, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8, color=INK
            )
    axes.set_xticks(range(len(names)), [NAMES[name] for name in names])
    axes.tick_params(axis="x", length=0)
    percent_axis(axes.yaxis, axes.set_yticks)
    axes.set_ylim(0, 112)
    axes.set_ylabel("prompts won (%)", fontsize=8.5, color=INK)
    put_title(figure, axes, title)
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
    axes.set_yticks(places, [shortened(row[0]) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    percent_axis(axes.xaxis, axes.set_xticks)
    axes.set_xlim(-2, 102)
    axes.set_xlabel(f"{metric} (%)", fontsize=8.5, color=INK)
    put_title(figure, axes, title)
    return figure
