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
    from editcore.runs.checkpoint_history import Checkpoint, CheckpointHistory
    from editcore.runs.forgetting import AgeBin

__all__ = ["forgetting_figure", "forgetting_runs_figure"]

_RUNS = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
    (INK, "X"),
)  # fmt: skip
"""Colour (Okabe and Ito) and marker of each compared run; they repeat after the last."""


def forgetting_figure(history: CheckpointHistory, *, title: str) -> Figure:
    """The measurements at a run's checkpoints against the number of edits; retention by age below. Both have 95 %
    intervals.

    Dotted lines are the values of the unedited model on the facts of each checkpoint. Only metrics that an edit should
    not change have them.
    """
    checkpoints, forgetting = history.checkpoints, history.forgetting
    groups = by_axis([measure for measure in shown(history.metrics, history.known) if not measure.of])
    heights = [2.1 if index == 0 else 1.5 for index in range(len(groups))]
    figure, panels = stacked_panels(
        len(groups) + 3, height=5.0 + 1.15 * sum(heights), ratios=(*heights, 1, 1, 1.6), share=False
    )
    *measured, text, size, age = panels
    for axes, group in zip(measured, groups, strict=True):
        _metric_panel(axes, checkpoints, group)
    num_edits = [checkpoint.num_edits for checkpoint in checkpoints]
    text.plot(num_edits, _ratios(checkpoints), color=AFTER, marker="o", markersize=3.5, linewidth=1)
    text.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    label_axes(text, y="perplexity\nratio")
    _size_panel(size, checkpoints)
    for axes in (*measured, text, size):
        _edits_axis(axes, max([1, *num_edits]))
    for axes in (*measured, text):
        axes.tick_params(labelbottom=False)
    for axes in measured[1:]:
        put_legend(axes, columns=4)
    _retention(age, forgetting.retention_by_age, color=AFTER, marker="o", **layered(0, 1))
    _age_axis(age)
    if forgetting.half_life is not None:
        age.axvline(forgetting.half_life, color=INK, linewidth=0.8, linestyle=":")
    half = "unknown" if forgetting.auc is None else "never"
    half = half if forgetting.half_life is None else f"{forgetting.half_life} facts"
    area = "unknown" if forgetting.auc is None else f"{forgetting.auc:.1f} %"
    age.set_title(f"half-life: {half}; mean over ages: {area}", fontsize=8, color=INK, loc="left", pad=3)
    put_title(figure, panels[0], title, columns=4)
    return figure


def forgetting_runs_figure(runs: Mapping[str, CheckpointHistory], *, title: str) -> Figure:
    """The checkpoints of several runs on common axes: every metric, perplexity ratio, and retention by age."""
    measures: dict[str, Measure] = {}
    for history in runs.values():
        for measure in shown(history.metrics, history.known):
            if not measure.of:
                measures.setdefault(measure.key, measure)
    figure, panels = stacked_panels(
        len(measures) + 2, height=3.3 + 1.65 * len(measures) + 0.2 * (len(runs) // 2), share=False
    )
    *measured, text, age = panels
    most = max([1, *(checkpoint.num_edits for history in runs.values() for checkpoint in history.checkpoints)])
    for index, (label, history) in enumerate(runs.items()):
        colour, marker = _RUNS[index % len(_RUNS)]
        style: dict[str, Any] = {"color": colour, "marker": marker, **layered(index, len(runs))}
        checkpoints = history.checkpoints
        for axes, key in zip(measured, measures, strict=True):
            _curve(axes, checkpoints, key, label=label, **style)
        text.plot([checkpoint.num_edits for checkpoint in checkpoints], _ratios(checkpoints), **style)
        _retention(age, history.forgetting.retention_by_age, **style)
    for axes, measure in zip(measured, measures.values(), strict=True):
        _metric_axis(axes, measure, label=_in_lines(measure))
    label_axes(text, y="perplexity\nratio", x="facts edited")
    text.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    for axes in (*measured, text):
        _edits_axis(axes, most)
        axes.tick_params(labelbottom=axes is text)
    _age_axis(age)
    put_title(figure, panels[0], title, columns=2)
    return figure


def _metric_panel(axes: Any, checkpoints: Sequence[Checkpoint], group: Sequence[Measure]) -> None:
    looks = look_of(group)
    num_edits = [checkpoint.num_edits for checkpoint in checkpoints]
    for index, measure in enumerate(group):
        key = measure.key
        colour, marker = looks[key]
        _curve(axes, checkpoints, key, label=key, color=colour, marker=marker, **layered(index, len(group)))
        unedited = [number_or_nan(checkpoint.before.get(key)) for checkpoint in checkpoints]
        if measure.keep and not all(map(math.isnan, unedited)):
            # White between the dots, and on top, so that the line is visible where both models have the same value.
            axes.plot(
                num_edits, unedited, color=colour, linewidth=1.4, linestyle=":", gapcolor="white", zorder=3,
                label=f"{key} unedited",
            )  # fmt: skip
    _metric_axis(axes, group[0], label=axis_label(group[0]))


def _size_panel(axes: Any, checkpoints: Sequence[Checkpoint]) -> None:
    """How much each edited weight has changed."""
    num_edits = [checkpoint.num_edits for checkpoint in checkpoints]
    weights = sorted({weight for checkpoint in checkpoints for weight in checkpoint.relative_change})
    for index, weight in enumerate(weights):
        colour, marker = _RUNS[index % len(_RUNS)]
        values = [100 * number_or_nan(checkpoint.relative_change.get(weight)) for checkpoint in checkpoints]
        axes.plot(num_edits, values, color=colour, marker=marker, label=_short(weight), **layered(index, len(weights)))
    label_axes(axes, y="‖ΔW‖/‖W‖\n(%)", x="facts edited")
    axes.set_ylim(bottom=0)
    if axes.get_lines():
        put_legend(axes, columns=4)


def _ratios(checkpoints: Sequence[Checkpoint]) -> list[Any]:
    return [checkpoint.perplexity_ratio for checkpoint in checkpoints]


def _edits_axis(axes: Any, most: int) -> None:
    axes.set_xlim(0, 1.03 * most)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.grid(color=GRID, linewidth=0.6)


def _metric_axis(axes: Any, measure: Measure, *, label: str) -> None:
    if measure.share:
        percent_axis(axes.yaxis, axes.set_yticks)
        axes.set_ylim(-3, 105)
    label_axes(axes, y=label)


def _curve(axes: Any, checkpoints: Sequence[Checkpoint], key: str, *, color: str, **style: Any) -> None:
    """A metric at each checkpoint with its 95 % interval as a band.

    Args:
        style: further arguments of matplotlib's ``plot``.
    """
    num_edits = [checkpoint.num_edits for checkpoint in checkpoints]
    values = [number_or_nan(checkpoint.values.get(key)) for checkpoint in checkpoints]
    axes.plot(num_edits, values, color=color, **style)
    intervals = [checkpoint.interval.get(key, (math.nan, math.nan)) for checkpoint in checkpoints]
    lows, highs = [low for low, _ in intervals], [high for _, high in intervals]
    axes.fill_between(num_edits, lows, highs, color=color, alpha=0.13, lw=0)


def _retention(axes: Any, bins: Sequence[AgeBin], **style: Any) -> None:
    """Each bin at the mean age seen in it, with its 95 % interval."""
    ages = [age_bin.age for age_bin in bins]
    values = [age_bin.retention for age_bin in bins]
    below = [max(0.0, age_bin.retention - age_bin.interval[0]) for age_bin in bins]
    above = [max(0.0, age_bin.interval[1] - age_bin.retention) for age_bin in bins]
    axes.errorbar(ages, values, yerr=[below, above], elinewidth=0.8, capsize=2, **style)


def _age_axis(axes: Any) -> None:
    percent_axis(axes.yaxis, axes.set_yticks)
    axes.set_ylim(-3, 105)
    oldest = max(1.0, float(axes.dataLim.x1)) if axes.has_data() else 1.0
    axes.set_xlim(-0.03 * oldest, 1.03 * oldest)
    axes.xaxis.get_major_locator().set_params(integer=True)
    label_axes(axes, y="retained (%)", x="age (facts edited since)")


def _in_lines(measure: Measure) -> str:
    """A metric and its unit, in lines short enough for a low panel. Words are not broken."""
    text = f"{measure.key} ({measure.unit})" if measure.unit else measure.key
    return "\n".join(textwrap.wrap(text, 16, break_long_words=False))


def _short(weight: str) -> str:
    """The short name of a weight: its block's number, if the name has just one number."""
    numbers = [part for part in weight.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else weight
