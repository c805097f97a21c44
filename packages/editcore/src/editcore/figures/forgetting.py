"""Pictures of what a run forgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from editcore.figures.style import (
    AFTER,
    GRID,
    INK,
    label_axes,
    number_or_nan,
    percent_axis,
    put_legend,
    put_title,
    stacked_panels,
)

if TYPE_CHECKING:
    from editcore.runs.checkpoints import Checkpoint
    from editcore.runs.forgetting import AgeBin, Forgetting

__all__ = ["forgetting_figure", "forgetting_runs_figure"]

_MARKS: Mapping[str, tuple[str, str]] = {
    "ES": ("o", "#0072B2"), "PS": ("s", "#E69F00"), "NS": ("^", "#009E73"), "score": ("D", INK),
}  # fmt: skip

_RUNS = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
    (INK, "X"),
)  # fmt: skip
"""Colour (Okabe and Ito) and marker of each run that is compared; they begin again after the last."""


def forgetting_figure(checkpoints: Sequence[Checkpoint], forgetting: Forgetting, *, title: str) -> Figure:
    """What a run's checkpoints saw, against the number of edits, and retention by age below, with 95 % intervals.

    The dotted line is the NS of the unedited model on the facts that each checkpoint measured.
    """
    figure, [metrics, text, size, age] = stacked_panels(4, height=7.4, ratios=(2.1, 1, 1, 1.6), share=False)
    at = [one.num_edits for one in checkpoints]
    for name in ("ES", "PS", "NS"):
        _curve(metrics, at, checkpoints, name, colour=_MARKS[name][1], marker=_MARKS[name][0], label=name)
    held = [number_or_nan(one.before.get("NS")) for one in checkpoints]
    metrics.plot(at, held, color=_MARKS["NS"][1], linewidth=1, linestyle=":", label="NS unedited")
    percent_axis(metrics.yaxis, metrics.set_yticks)
    metrics.set_ylim(-3, 105)
    label_axes(metrics, y="prompts won (%)")
    ratios = [one.perplexity_ratio for one in checkpoints]
    text.plot(at, ratios, color=AFTER, marker="o", markersize=3.5, linewidth=1)
    text.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    label_axes(text, y="perplexity\nratio")
    for index, name in enumerate(sorted({name for one in checkpoints for name in one.relative_change})):
        colour, marker = _RUNS[index % len(_RUNS)]
        values = [100 * number_or_nan(one.relative_change.get(name)) for one in checkpoints]
        size.plot(at, values, color=colour, marker=marker, markersize=3.5, linewidth=1, label=_short(name))
    label_axes(size, y="‖ΔW‖/‖W‖\n(%)", x="facts edited")
    size.set_ylim(bottom=0)
    if size.get_lines():
        put_legend(size, columns=4)
    for axes in (metrics, text, size):
        axes.set_xlim(0, 1.03 * max([1, *at]))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.grid(color=GRID, linewidth=0.6)
    for axes in (metrics, text):
        axes.tick_params(labelbottom=False)
    _retention(age, forgetting.retention_by_age, colour=AFTER, marker="o")
    _age_axis(age)
    if forgetting.half_life is not None:
        age.axvline(forgetting.half_life, color=INK, linewidth=0.8, linestyle=":")
    half = "never" if forgetting.half_life is None else f"{forgetting.half_life} facts"
    area = "unknown" if forgetting.auc is None else f"{forgetting.auc:.1f} %"
    age.set_title(f"half-life: {half}; mean over ages: {area}", fontsize=8, color=INK, loc="left", pad=3)
    put_title(figure, metrics, title, columns=4)
    return figure


def forgetting_runs_figure(runs: Mapping[str, tuple[Sequence[Checkpoint], Forgetting]], *, title: str) -> Figure:
    """The checkpoints of several runs on common axes: ES, PS, NS, perplexity ratio, and retention by age."""
    figure, panels = stacked_panels(5, height=8.2 + 0.2 * (len(runs) // 2), share=False)
    most = max([1, *(one.num_edits for checkpoints, _ in runs.values() for one in checkpoints)])
    for index, (label, (checkpoints, forgetting)) in enumerate(runs.items()):
        colour, marker = _RUNS[index % len(_RUNS)]
        at = [one.num_edits for one in checkpoints]
        for axes, name in zip(panels, ("ES", "PS", "NS"), strict=False):
            _curve(axes, at, checkpoints, name, colour=colour, marker=marker, label=label)
        panels[3].plot(
            at, [one.perplexity_ratio for one in checkpoints], color=colour, marker=marker, markersize=3.5, linewidth=1
        )
        _retention(panels[4], forgetting.retention_by_age, colour=colour, marker=marker)
    for axes, name in zip(panels, ("ES (%)", "PS (%)", "NS (%)", "perplexity\nratio"), strict=False):
        axes.set_xlim(0, 1.03 * most)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.grid(color=GRID, linewidth=0.6)
        label_axes(axes, y=name, x="facts edited" if axes is panels[3] else "")
        axes.tick_params(labelbottom=axes is panels[3])
    for axes in panels[:3]:
        percent_axis(axes.yaxis, axes.set_yticks)
        axes.set_ylim(-3, 105)
    panels[3].axhline(1, color=INK, linewidth=0.8, linestyle=":")
    _age_axis(panels[4])
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
) -> None:
    """A metric at each checkpoint with its 95 % interval as a band."""
    values = [number_or_nan(getattr(one, name)) for one in checkpoints]
    axes.plot(at, values, color=colour, marker=marker, markersize=3.5, linewidth=1, label=label)
    bounds = [one.interval.get(name, (math.nan, math.nan)) for one in checkpoints]
    axes.fill_between(at, [low for low, _ in bounds], [high for _, high in bounds], color=colour, alpha=0.13, lw=0)


def _retention(axes: Any, bins: Sequence[AgeBin], *, colour: str, marker: str) -> None:
    """Each bin at the mean age seen in it, with its 95 % interval."""
    places = [one.age for one in bins]
    values = [one.retention for one in bins]
    below = [max(0.0, one.retention - one.interval[0]) for one in bins]
    above = [max(0.0, one.interval[1] - one.retention) for one in bins]
    axes.errorbar(
        places, values, yerr=[below, above], color=colour, marker=marker, markersize=3.5, linewidth=1, elinewidth=0.8,
        capsize=2,
    )  # fmt: skip


def _age_axis(axes: Any) -> None:
    percent_axis(axes.yaxis, axes.set_yticks)
    axes.set_ylim(-3, 105)
    axes.xaxis.get_major_locator().set_params(integer=True)
    label_axes(axes, y="retained (%)", x="age (facts edited since)")


def _short(weight: str) -> str:
    """The part of a weight's name that tells it from the others: its block's number."""
    numbers = [part for part in weight.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else weight
