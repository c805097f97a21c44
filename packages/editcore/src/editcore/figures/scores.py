"""Pictures of scores before and after a run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from editcore._util.words import counted
from editcore.evaluation.measures import Measure, shown
from editcore.figures.style import (
    AFTER,
    BEFORE,
    GRID,
    INK,
    axis_label,
    by_axis,
    draw_intervals,
    new_figure,
    percent_axis,
    put_legend,
    put_title,
    quantity_axis,
    shortened,
    stacked_panels,
    top_of_bar,
)

if TYPE_CHECKING:
    from editcore.evaluation import Summary

__all__ = ["per_relation_figure", "summary_figure"]

_LINE = 16
"""Characters of a line under a bar."""


def summary_figure(before: Summary, after: Summary, *, title: str) -> Figure:
    """Every metric before and after the edits, with 95 % intervals over facts: a panel per evaluator and unit.

    A composite is not a mean over facts, so it has no interval. A metric without a value has no bar.
    """
    known = {**before.values(), **after.values()}
    groups = by_axis([measure for measure in shown(after.measures, known) if measure.key in known])
    widest = max((len(group) for group in groups), default=4)
    figure, panels = stacked_panels(
        max(1, len(groups)), width=max(5.0, 1.15 * widest), height=0.5 + 2.6 * max(1, len(groups)), share=False
    )
    for axes, group in zip(panels, groups, strict=False):
        _bars(axes, group, before, after)
    put_title(figure, panels[0], title)
    return figure


def _bars(axes: Any, group: Sequence[Measure], before: Summary, after: Summary) -> None:
    keys = [measure.key for measure in group]
    highest = 0.0
    for summary, offset, colour, label in ((before, -0.2, BEFORE, "before"), (after, 0.2, AFTER, "after")):
        values = [summary.value(key) for key in keys]
        places = [index + offset for index in range(len(keys))]
        tops = [top_of_bar(summary, key, value) for key, value in zip(keys, values, strict=True)]
        heights = [0.0 if math.isnan(value) else value for value in values]
        whole = all(measure.about == "model" for measure in group)
        facts = "" if whole else f" ({counted(summary.facts.get(group[0].evaluator, 0), 'fact')})"
        axes.bar(places, heights, 0.38, color=colour, label=f"{label}{facts}")
        draw_intervals(axes, summary, keys, places, label="95 % interval" if summary is after else None)
        for place, value, top, measure in zip(places, values, tops, group, strict=True):
            text = "n/a" if math.isnan(value) else f"{value:.0f}" if measure.percent else f"{value:.3g}"
            axes.annotate(
                text, (place, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8, color=INK
            )
        highest = max([highest, *tops])
    axes.set_xticks(range(len(keys)), [_wrapped(measure, after) for measure in group])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, max(len(keys), 3) - 0.4)
    if group[0].share:
        percent_axis(axes.yaxis, axes.set_yticks)
        axes.set_ylim(0, 112)
    else:
        axes.yaxis.grid(color=GRID, linewidth=0.6)
        axes.set_ylim(top=1.12 * highest or 1)
    axes.set_ylabel(axis_label(group[0]), fontsize=8.5, color=INK)
    put_legend(axes, columns=3)


def _wrapped(measure: Measure, after: Summary) -> str:
    """The text under a metric's bars: its label, and the number of its facts unless that is all facts."""
    first, *rest = measure.label.split(" (", 1)
    lines = [*textwrap.wrap(first, _LINE), *(f"({part}" for part in rest)]
    averaged = after.averages.get(measure.key)
    if averaged is not None and averaged.facts < after.facts[measure.evaluator]:
        lines.append(f"[{counted(averaged.facts, 'fact')}]")
    return "\n".join(lines)


def per_relation_figure(
    before: Mapping[str, Summary], after: Mapping[str, Summary], *, measure: Measure, title: str
) -> Figure:
    """One metric per relation: a line from before to after, so that the relations that suffer stand out.

    Relations without a value are left out.
    """
    rows = [
        (relation, before[relation].value(measure.key), after[relation].value(measure.key))
        for relation in before
        if relation in after
    ]
    rows = [row for row in rows if not math.isnan(row[1]) and not math.isnan(row[2])]
    rows.sort(key=lambda row: (row[2] - row[1], row[0]), reverse=True)
    figure, axes = new_figure(height=1.1 + 0.2 * max(1, len(rows)))
    places = range(len(rows))
    axes.hlines(places, [row[1] for row in rows], [row[2] for row in rows], color=GRID, linewidth=3, zorder=1)
    axes.scatter([row[1] for row in rows], places, color=BEFORE, s=22, label="before", zorder=2)
    axes.scatter([row[2] for row in rows], places, color=AFTER, s=22, label="after", zorder=3)
    axes.set_yticks(places, [shortened(row[0]) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    quantity_axis(axes.xaxis, lambda *_ends: axes.set_xlim(-2, 102), axes.set_xlabel, measure, axes.set_xticks)
    put_title(figure, axes, title)
    return figure
