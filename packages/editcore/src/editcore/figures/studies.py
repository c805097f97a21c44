"""Pictures of sweeps: bars, lines and curves with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from editcore.evaluation.measures import Measure
from editcore.figures.style import (
    DASHES,
    INK,
    MARKERS,
    PALETTE,
    layered,
    new_figure,
    percent_axis,
    put_title,
    quantity_axis,
    stacked_panels,
)
from editcore.interfaces.documented import documented

__all__ = ["Estimate", "Series", "bars_figure", "curves_figure", "lines_figure"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval. A missing number is NaN."""

    mean: float
    """The mean."""
    low: float = math.nan
    """Lower end of the interval."""
    high: float = math.nan
    """Upper end of the interval."""


Series = Mapping[str, Sequence[Estimate]]
"""By name of a series, its estimates, one for each place along the axis."""


def bars_figure(
    groups: Sequence[str],
    series: Series,
    *,
    metric: Measure | str,
    title: str,
    before: float = math.nan,
    split: str = "",
) -> Figure:
    """A metric as horizontal bars, which leave room for long names. There is a group per place with a bar per series.

    Args:
        metric: a metric, or the name of any column, which is then the axis' label.
        before: value of the unedited model, drawn as a line; NaN for none.
        split: the setting in which the series differ, for the legend; empty for a single series without a legend.
    """
    height = 0.8 / len(series)
    figure, axes = new_figure(height=1.2 + len(groups) * max(0.3, 0.17 * len(series)))
    for number, (label, estimates) in enumerate(series.items()):
        places = [index + (number - (len(series) - 1) / 2) * height for index in range(len(groups))]
        widths = [0.0 if math.isnan(estimate.mean) else estimate.mean for estimate in estimates]
        colour = PALETTE[number % len(PALETTE)]
        axes.barh(places, widths, height * 0.9, color=colour, label=f"{split} {label}".strip() if split else None)
        for place, estimate in zip(places, estimates, strict=True):
            _bar_end(axes, place, estimate)
    if not math.isnan(before):
        axes.axvline(before, color=INK, linewidth=1, linestyle=":", label="before any edit")
    axes.set_yticks(range(len(groups)), groups)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(groups) - 0.4, -0.6)  # the first on top
    quantity_axis(axes.xaxis, axes.set_xlim, axes.set_xlabel, metric, axes.set_xticks)
    put_title(figure, axes, title)
    return figure


def lines_figure(
    places: Sequence[object],
    panels: Sequence[tuple[Measure | str, Series]],
    *,
    setting: str,
    title: str,
    split: str = "",
) -> Figure:
    """Metrics against a setting: a panel per metric, and in it a line per series with its interval as a band.

    Args:
        places: values of the setting. Numbers are placed to scale, other values at equal distances.
        split: the setting in which the series differ, for the legend; empty if their names say it.
    """
    figure, stacked = stacked_panels(len(panels), height=0.9 + (2.3 if len(panels) == 1 else 1.25 * len(panels)))
    numeric = all(isinstance(place, int | float) and not isinstance(place, bool) for place in places)
    at = [float(str(place)) for place in places] if numeric else [float(index) for index in range(len(places))]
    for axes, (metric, series) in zip(stacked, panels, strict=True):
        for number, (label, estimates) in enumerate(series.items()):
            _line(axes, at, estimates, number, len(series), label=f"{split} {label}".strip())
        quantity_axis(axes.yaxis, axes.set_ylim, axes.set_ylabel, metric, axes.set_yticks, short=len(panels) > 1)
    stacked[-1].set_xticks(at, [str(place) for place in places])
    stacked[-1].set_xlabel(setting, fontsize=8.5, color=INK)
    put_title(figure, stacked[0], title)
    return figure


def curves_figure(curves: Mapping[str, Mapping[int, Estimate]], *, title: str, split: str = "") -> Figure:
    """Forgetting: the share of facts retained after the last edit, by the number of edits made since a fact was
    edited."""
    figure, axes = new_figure(height=3.2)
    for number, (label, curve) in enumerate(curves.items()):
        ages = sorted(curve)
        _line(axes, ages, [curve[age] for age in ages], number, len(curves), label=f"{split} {label}".strip())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("edits made since the fact was edited", fontsize=8.5, color=INK)
    percent_axis(axes.yaxis, axes.set_yticks)
    axes.set_ylim(0, 108)
    axes.set_ylabel("retained (%)", fontsize=8.5, color=INK)
    put_title(figure, axes, title)
    return figure


def _line(
    axes: Any, at: Sequence[float], estimates: Sequence[Estimate], number: int, count: int, *, label: str
) -> None:
    colour, dash = PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]
    known = [index for index, estimate in enumerate(estimates) if not math.isnan(estimate.mean)]
    axes.plot(
        [at[index] for index in known], [estimates[index].mean for index in known], color=colour, linestyle=dash,
        marker=MARKERS[number % len(MARKERS)], label=label, **layered(number, count),
    )  # fmt: skip
    banded = [index for index in known if not math.isnan(estimates[index].low)]
    axes.fill_between(
        [at[index] for index in banded], [estimates[index].low for index in banded],
        [estimates[index].high for index in banded], color=colour, alpha=0.15, linewidth=0,
    )  # fmt: skip


def _bar_end(axes: Any, place: float, estimate: Estimate) -> None:
    """The interval of a bar, and its number after it."""
    end = 0.0 if math.isnan(estimate.mean) else estimate.mean
    if not math.isnan(estimate.low):
        reach = [[max(0.0, end - estimate.low)], [max(0.0, estimate.high - end)]]
        axes.errorbar(end, place, xerr=reach, color=INK, linewidth=1, capsize=2)
        end = max(end, estimate.high)
    text = (
        "n/a"
        if math.isnan(estimate.mean)
        else f"{estimate.mean:.1f}"
        if abs(estimate.mean) >= 10
        else f"{estimate.mean:.2g}"
    )
    axes.annotate(
        text, (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7, color=INK
    )  # fmt: skip
