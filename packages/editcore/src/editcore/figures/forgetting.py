"""Pictures of what a run forgets."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from editcore.evaluation.measures import Measure, shown
from editcore.figures.style import (
    AFTER,
    GRID,
    INK,
    axis_label,
    by_axis,
    label_axes,
    layered,
    look_of,
    number_or_nan,
    percent_axis,
    put_legend,
    put_title,
    stacked_panels,
)

if TYPE_CHECKING:
    from editcore.runs.forgetting import AgeBin
    from editcore.runs.watched import Checkpoint, Watched

__all__ = ["forgetting_figure", "forgetting_runs_figure"]

_RUNS = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
    (INK, "X"),
)  # fmt: skip
"""Colour (Okabe and Ito) and marker of each run that is compared; they begin again after the last."""


def forgetting_figure(watched: Watched, *, title: str) -> Figure:
    """What a run's checkpoints saw, against the number of edits, and retention by age below, with 95 % intervals.

    Dotted lines are what the unedited model had, on the facts that each checkpoint measured, of metrics that an edit
    should leave alone.
    """
    checkpoints, forgetting = watched.checkpoints, watched.forgetting
    groups = by_axis([one for one in shown(watched.metrics, watched.known) if not one.of])
    heights = [2.1 if number == 0 else 1.5 for number in range(len(groups))]
    figure, panels = stacked_panels(
        len(groups) + 3, height=5.0 + 1.15 * sum(heights), ratios=(*heights, 1, 1, 1.6), share=False
    )
    *measured, text, size, age = panels
    at = [one.num_edits for one in checkpoints]
    for axes, group in zip(measured, groups, strict=True):
        looks = look_of(group)
        for index, one in enumerate(group):
            colour, marker = looks[one.key]
            widths = layered(index, len(group))
            _curve(axes, at, checkpoints, one.key, colour=colour, marker=marker, label=one.key, widths=widths)
            held = [number_or_nan(checkpoint.before.get(one.key)) for checkpoint in checkpoints]
            if one.keep and not all(map(math.isnan, held)):
                # White between the dots, and on top: the line is seen where the edited model has the same.
                axes.plot(
                    at, held, color=colour, linewidth=1.4, linestyle=":", gapcolor="white", zorder=3,
                    label=f"{one.key} unedited",
                )  # fmt: skip
        _metric_axis(axes, group[0], y=axis_label(group[0]))
    ratios = [one.perplexity_ratio for one in checkpoints]
    text.plot(at, ratios, color=AFTER, marker="o", markersize=3.5, linewidth=1)
    text.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    label_axes(text, y="perplexity\nratio")
    names = sorted({name for one in checkpoints for name in one.relative_change})
    for index, name in enumerate(names):
        colour, marker = _RUNS[index % len(_RUNS)]
        values = [100 * number_or_nan(one.relative_change.get(name)) for one in checkpoints]
        size.plot(at, values, color=colour, marker=marker, label=_short(name), **layered(index, len(names)))
    label_axes(size, y="‖ΔW‖/‖W‖\n(%)", x="facts edited")
    size.set_ylim(bottom=0)
    if size.get_lines():
        put_legend(size, columns=4)
    for axes in (*measured, text, size):
        axes.set_xlim(0, 1.03 * max([1, *at]))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.grid(color=GRID, linewidth=0.6)
    for axes in (*measured, text):
        axes.tick_params(labelbottom=False)
    for axes in measured[1:]:
        put_legend(axes, columns=4)
    _retention(age, forgetting.retention_by_age, colour=AFTER, marker="o", widths=layered(0, 1))
    _age_axis(age)
    if forgetting.half_life is not None:
        age.axvline(forgetting.half_life, color=INK, linewidth=0.8, linestyle=":")
    half = "unknown" if forgetting.auc is None else "never"
    half = half if forgetting.half_life is None else f"{forgetting.half_life} facts"
    area = "unknown" if forgetting.auc is None else f"{forgetting.auc:.1f} %"
    age.set_title(f"half-life: {half}; mean over ages: {area}", fontsize=8, color=INK, loc="left", pad=3)
    put_title(figure, panels[0], title, columns=4)
    return figure


def _metric_axis(axes: Any, measure: Measure, *, y: str, x: str = "") -> None:
    if measure.share:
        percent_axis(axes.yaxis, axes.set_yticks)
        axes.set_ylim(-3, 105)
    label_axes(axes, y=y, x=x)


def forgetting_runs_figure(runs: Mapping[str, Watched], *, title: str) -> Figure:
    """The checkpoints of several runs on common axes: every metric, perplexity ratio, and retention by age."""
    known: dict[str, Measure] = {}
    for watched in runs.values():
        for one in shown(watched.metrics, watched.known):
            if not one.of:
                known.setdefault(one.key, one)
    figure, panels = stacked_panels(
        len(known) + 2, height=3.3 + 1.65 * len(known) + 0.2 * (len(runs) // 2), share=False
    )
    *measured, text, age = panels
    most = max([1, *(one.num_edits for watched in runs.values() for one in watched.checkpoints)])
    for index, (label, watched) in enumerate(runs.items()):
        colour, marker = _RUNS[index % len(_RUNS)]
        checkpoints = watched.checkpoints
        at = [one.num_edits for one in checkpoints]
        widths = layered(index, len(runs))
        for axes, key in zip(measured, known, strict=True):
            _curve(axes, at, checkpoints, key, colour=colour, marker=marker, label=label, widths=widths)
        text.plot(at, [one.perplexity_ratio for one in checkpoints], color=colour, marker=marker, **widths)
        _retention(age, watched.forgetting.retention_by_age, colour=colour, marker=marker, widths=widths)
    for axes, one in zip(measured, known.values(), strict=True):
        _metric_axis(axes, one, y=_in_lines(one))
    label_axes(text, y="perplexity\nratio", x="facts edited")
    text.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    for axes in (*measured, text):
        axes.set_xlim(0, 1.03 * most)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.grid(color=GRID, linewidth=0.6)
        axes.tick_params(labelbottom=axes is text)
    _age_axis(age)
    put_title(figure, panels[0], title, columns=2)
    return figure


def _curve(
    axes: Any,
    at: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    name: str,
    *,
    colour: str,
    marker: str,
    label: str,
    widths: Mapping[str, float],
) -> None:
    """A metric at each checkpoint with its 95 % interval as a band."""
    values = [number_or_nan(one.values.get(name)) for one in checkpoints]
    axes.plot(at, values, color=colour, marker=marker, label=label, **widths)
    bounds = [one.interval.get(name, (math.nan, math.nan)) for one in checkpoints]
    axes.fill_between(at, [low for low, _ in bounds], [high for _, high in bounds], color=colour, alpha=0.13, lw=0)


def _retention(axes: Any, bins: Sequence[AgeBin], *, colour: str, marker: str, widths: Mapping[str, float]) -> None:
    """Each bin at the mean age seen in it, with its 95 % interval."""
    places = [one.age for one in bins]
    values = [one.retention for one in bins]
    below = [max(0.0, one.retention - one.interval[0]) for one in bins]
    above = [max(0.0, one.interval[1] - one.retention) for one in bins]
    axes.errorbar(places, values, yerr=[below, above], color=colour, marker=marker, elinewidth=0.8, capsize=2, **widths)


def _age_axis(axes: Any) -> None:
    percent_axis(axes.yaxis, axes.set_yticks)
    axes.set_ylim(-3, 105)
    oldest = max(1.0, float(axes.dataLim.x1)) if axes.has_data() else 1.0
    axes.set_xlim(-0.03 * oldest, 1.03 * oldest)
    axes.xaxis.get_major_locator().set_params(integer=True)
    label_axes(axes, y="retained (%)", x="age (facts edited since)")


def _in_lines(measure: Measure) -> str:
    """A metric and its unit, in lines that a low panel has room for; words stay whole."""
    text = f"{measure.key} ({measure.unit})" if measure.unit else measure.key
    return "\n".join(textwrap.wrap(text, 16, break_long_words=False))


def _short(weight: str) -> str:
    """The part of a weight's name that tells it from the others: its block's number."""
    numbers = [part for part in weight.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else weight
