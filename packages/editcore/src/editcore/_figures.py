"""Pictures of results. One look for all of them, set here and nowhere else; needs no display and no global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from editcore._files import replacing

if TYPE_CHECKING:
    from editcore._checkpoints import Checkpoint
    from editcore._forgetting import AgeBin, Forgetting
    from editcore.causal_tracing import Tracing
    from editcore.evaluation import Summary

__all__ = [
    "AFTER",
    "BEFORE",
    "Estimate",
    "bars_figure",
    "curves_figure",
    "forgetting_figure",
    "forgetting_runs_figure",
    "layers_figure",
    "lines_figure",
    "new_figure",
    "per_relation_figure",
    "png",
    "save",
    "summary_figure",
    "tracing_figure",
]

# The blue of Okabe and Ito's palette and a pale grey-blue: they differ in lightness, so that colour-blind readers and
# grey prints tell them apart.
BEFORE = "#9DB4C0"
AFTER = "#0072B2"
INK = "#222222"
GRID = "#DDDDDD"
DPI = 200
COLUMN_WIDTH = 5.0
"""Inches. Text is set in the sizes below, so that the figure can be read at the width of a column."""

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#222222")
"""Okabe and Ito's, which every common form of colour vision tells apart. Lines have markers and dashes, too."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", ":", "-.")

_QUANTITIES: Mapping[str, str] = {
    "ES": "efficacy success (%)",
    "PS": "paraphrase success (%)",
    "NS": "neighbourhood specificity (%)",
    "score": "score, harmonic mean (%)",
    "retention": "retention (%)",
}

_NAMES: Mapping[str, str] = {
    "ES": "Efficacy\n(ES)",
    "PS": "Paraphrase\n(PS)",
    "NS": "Neighbourhood\n(NS)",
    "score": "Score\n(harmonic mean)",
}


def new_figure(*, width: float = COLUMN_WIDTH, height: float = 3.1) -> tuple[Figure, Any]:
    """An empty figure in the house style, and its axes."""
    figure, [axes] = _stacked(1, width=width, height=height)
    return figure, axes


def _stacked(
    count: int, *, width: float = COLUMN_WIDTH, height: float, ratios: Sequence[float] | None = None, share: bool = True
) -> tuple[Figure, list[Any]]:
    """A figure of several panels, one above the other, with a common horizontal axis unless ``share`` is false."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(count, 1, sharex=share, squeeze=False, height_ratios=ratios)[:, 0])
    for axes in panels:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(INK)
        axes.tick_params(labelsize=8, colors=INK, length=3)
        axes.set_axisbelow(True)
    return figure, panels


def save(figure: Figure, path: Path | str) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        StorageError: the disk is full or the folder read-only; nothing is left behind.
    """
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(png(figure))


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


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
    axes.set_yticks(places, [_plain(row[0]) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    _percent_axis(axes.xaxis, axes.set_xticks)
    axes.set_xlim(-2, 102)
    axes.set_xlabel(f"{metric} (%)", fontsize=8.5, color=INK)
    _head(figure, axes, title)
    return figure


_KINDS: Mapping[str, str] = {"hidden": "block output", "mlp": "MLPs", "attention": "attentions"}


def tracing_figure(tracing: Tracing, *, title: str) -> Figure:
    """Average indirect effects by role of the token and layer: one panel for each kind of state, one colour scale."""
    from editcore.causal_tracing import ROLES

    kinds = list(tracing.effects)
    figure, panels = _stacked(len(kinds), height=0.55 + 1.2 * len(kinds))
    largest = max(float(np.nanmax(np.abs(effect), initial=0.0)) for effect in tracing.effects.values())
    image: Any = None
    for axes, kind in zip(panels, kinds, strict=True):
        # Red and blue around white: told apart by every common form of colour vision, and zero is nothing.
        image = axes.imshow(
            tracing.effects[kind], aspect="auto", cmap="RdBu_r", vmin=-largest or -1, vmax=largest or 1,
            interpolation="nearest",
        )  # fmt: skip
        axes.set_yticks(range(len(ROLES)), [f"{role} ({n})" for role, n in zip(ROLES, tracing.counts, strict=True)])
        axes.tick_params(axis="y", length=0, labelsize=6.5)
        around = "" if kind == "hidden" or tracing.window == 1 else f" of {tracing.window} layers around"
        axes.set_title(f"{_KINDS[kind]}{around} restored", fontsize=8, color=INK, loc="left", pad=3)
    panels[-1].set_xlabel("layer", fontsize=8.5, color=INK)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02)
    bar.set_label("indirect effect on p(attribute)", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    figure.suptitle(title, fontsize=9.5, color=INK, x=0.02, ha="left")
    return figure


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
    figure, [metrics, text, size, age] = _stacked(4, height=7.4, ratios=(2.1, 1, 1, 1.6), share=False)
    at = [one.num_edits for one in checkpoints]
    for name in ("ES", "PS", "NS"):
        _curve(metrics, at, checkpoints, name, colour=_MARKS[name][1], marker=_MARKS[name][0], label=name)
    held = [_number(one.before.get("NS")) for one in checkpoints]
    metrics.plot(at, held, color=_MARKS["NS"][1], linewidth=1, linestyle=":", label="NS unedited")
    _percent_axis(metrics.yaxis, metrics.set_yticks)
    metrics.set_ylim(-3, 105)
    _label(metrics, y="prompts won (%)")
    ratios = [one.perplexity_ratio for one in checkpoints]
    text.plot(at, ratios, color=AFTER, marker="o", markersize=3.5, linewidth=1)
    text.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    _label(text, y="perplexity\nratio")
    for index, name in enumerate(sorted({name for one in checkpoints for name in one.relative_change})):
        colour, marker = _RUNS[index % len(_RUNS)]
        values = [100 * _number(one.relative_change.get(name)) for one in checkpoints]
        size.plot(at, values, color=colour, marker=marker, markersize=3.5, linewidth=1, label=_short(name))
    _label(size, y="‖ΔW‖/‖W‖\n(%)", x="facts edited")
    size.set_ylim(bottom=0)
    if size.get_lines():
        _legend(size, columns=4)
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
    _head(figure, metrics, title, columns=4)
    return figure


def forgetting_runs_figure(runs: Mapping[str, tuple[Sequence[Checkpoint], Forgetting]], *, title: str) -> Figure:
    """The checkpoints of several runs on common axes: ES, PS, NS, perplexity ratio, and retention by age."""
    figure, panels = _stacked(5, height=8.2 + 0.2 * (len(runs) // 2), share=False)
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
        _label(axes, y=name, x="facts edited" if axes is panels[3] else "")
        axes.tick_params(labelbottom=axes is panels[3])
    for axes in panels[:3]:
        _percent_axis(axes.yaxis, axes.set_yticks)
        axes.set_ylim(-3, 105)
    panels[3].axhline(1, color=INK, linewidth=0.8, linestyle=":")
    _age_axis(panels[4])
    _head(figure, panels[0], title, columns=2)
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
    values = [_number(getattr(one, name)) for one in checkpoints]
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
    _percent_axis(axes.yaxis, axes.set_yticks)
    axes.set_ylim(-3, 105)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _label(axes, y="retained (%)", x="age (facts edited since)")


def _label(axes: Any, *, y: str, x: str = "") -> None:
    axes.set_ylabel(y, fontsize=8.5, color=INK)
    axes.set_xlabel(x, fontsize=8.5, color=INK)


def _short(weight: str) -> str:
    """The part of a weight's name that tells it from the others: its block's number."""
    numbers = [part for part in weight.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else weight


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def layers_figure(trials: Mapping[int, Summary], before: Summary, *, chosen: int, title: str) -> Figure:
    """ES, PS, NS and score after editing each layer alone, in percent; the NS before any edit as a line to hold."""
    figure, axes = new_figure()
    layers = sorted(trials)
    axes.axvline(chosen, color=GRID, linewidth=8, zorder=0)
    for name, (marker, colour) in _MARKS.items():
        values = [_values(trials[layer], [name])[0] for layer in layers]
        axes.plot(layers, values, marker=marker, markersize=4, linewidth=1, color=colour, label=name)
    if not math.isnan(before.NS):
        axes.axhline(before.NS, color=_MARKS["NS"][1], linewidth=1, linestyle=":", label="NS before")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _percent_axis(axes.yaxis, axes.set_yticks)
    axes.set_ylim(0, 105)
    axes.set_xlabel("layer edited", fontsize=8.5, color=INK)
    axes.set_ylabel("prompts won (%)", fontsize=8.5, color=INK)
    _head(figure, axes, title, columns=5)
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval; NaN where there is none."""

    mean: float
    low: float = math.nan
    high: float = math.nan


Series = Mapping[str, Sequence[Estimate]]
"""Estimates by the name of what they belong to, one for each place along the axis."""


def bars_figure(
    groups: Sequence[str], series: Series, *, metric: str, title: str, before: float = math.nan, split: str = ""
) -> Figure:
    """A metric as horizontal bars, which leave room for long names: a group per place, a bar per series in it.

    Args:
        metric: a metric's name, or any column's, which is then the axis' label.
        before: value of the unedited model, drawn as a line; NaN for none.
        split: what the series differ in, for the legend; empty for a single series without one.
    """
    height = 0.8 / len(series)
    figure, axes = new_figure(height=1.2 + len(groups) * max(0.3, 0.17 * len(series)))
    for number, (label, estimates) in enumerate(series.items()):
        places = [index + (number - (len(series) - 1) / 2) * height for index in range(len(groups))]
        widths = [0.0 if math.isnan(one.mean) else one.mean for one in estimates]
        colour = PALETTE[number % len(PALETTE)]
        axes.barh(places, widths, height * 0.9, color=colour, label=f"{split} {label}".strip() if split else None)
        for place, one in zip(places, estimates, strict=True):
            _bar_end(axes, place, one)
    if not math.isnan(before):
        axes.axvline(before, color=INK, linewidth=1, linestyle=":", label="before any edit")
    axes.set_yticks(range(len(groups)), groups)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(groups) - 0.4, -0.6)  # the first on top
    _quantity_axis(axes.xaxis, axes.set_xlim, axes.set_xlabel, metric, axes.set_xticks)
    _head(figure, axes, title)
    return figure


def lines_figure(
    places: Sequence[object], panels: Mapping[str, Series], *, setting: str, title: str, split: str = ""
) -> Figure:
    """Metrics against a setting: a panel per metric, a line with its interval as a band per series.

    Args:
        places: values of the setting; numbers have a scale, anything else stands at equal distances.
        split: what the series differ in, for the legend; empty if their names say it.
    """
    figure, stacked = _stacked(len(panels), height=0.9 + (2.3 if len(panels) == 1 else 1.25 * len(panels)))
    numeric = all(isinstance(place, int | float) and not isinstance(place, bool) for place in places)
    at = [float(str(place)) for place in places] if numeric else [float(index) for index in range(len(places))]
    for axes, (metric, series) in zip(stacked, panels.items(), strict=True):
        for number, (label, estimates) in enumerate(series.items()):
            _line(axes, at, estimates, number, label=f"{split} {label}".strip())
        _quantity_axis(axes.yaxis, axes.set_ylim, axes.set_ylabel, metric, axes.set_yticks, short=len(panels) > 1)
    stacked[-1].set_xticks(at, [str(place) for place in places])
    stacked[-1].set_xlabel(setting, fontsize=8.5, color=INK)
    _head(figure, stacked[0], title)
    return figure


def curves_figure(curves: Mapping[str, Mapping[int, Estimate]], *, title: str, split: str = "") -> Figure:
    """Forgetting: efficacy after the last edit, by how many edits were made since a fact was edited."""
    figure, axes = new_figure(height=3.2)
    for number, (label, curve) in enumerate(curves.items()):
        ages = sorted(curve)
        _line(axes, ages, [curve[age] for age in ages], number, label=f"{split} {label}".strip())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("edits made since the fact was edited", fontsize=8.5, color=INK)
    _quantity_axis(axes.yaxis, axes.set_ylim, axes.set_ylabel, "ES", axes.set_yticks)
    _head(figure, axes, title)
    return figure


def _line(axes: Any, at: Sequence[float], estimates: Sequence[Estimate], number: int, *, label: str) -> None:
    colour, dash = PALETTE[number % len(PALETTE)], _DASHES[number // len(PALETTE) % len(_DASHES)]
    known = [index for index, one in enumerate(estimates) if not math.isnan(one.mean)]
    axes.plot(
        [at[index] for index in known], [estimates[index].mean for index in known], color=colour, linestyle=dash,
        marker=_MARKERS[number % len(_MARKERS)], markersize=4, linewidth=1.2, label=label, zorder=3,
    )  # fmt: skip
    banded = [index for index in known if not math.isnan(estimates[index].low)]
    axes.fill_between(
        [at[index] for index in banded], [estimates[index].low for index in banded],
        [estimates[index].high for index in banded], color=colour, alpha=0.15, linewidth=0,
    )  # fmt: skip


def _bar_end(axes: Any, place: float, one: Estimate) -> None:
    """The interval of a bar, and its number behind it."""
    end = 0.0 if math.isnan(one.mean) else one.mean
    if not math.isnan(one.low):
        reach = [[max(0.0, end - one.low)], [max(0.0, one.high - end)]]
        axes.errorbar(end, place, xerr=reach, color=INK, linewidth=1, capsize=2)
        end = max(end, one.high)
    text = "n/a" if math.isnan(one.mean) else f"{one.mean:.1f}" if abs(one.mean) >= 10 else f"{one.mean:.2g}"
    axes.annotate(
        text, (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7, color=INK
    )  # fmt: skip


def _quantity_axis(
    axis: Any, set_limits: Any, set_label: Any, metric: str, set_ticks: Any, *, short: bool = False
) -> None:
    """Percent from 0 to 100 for what is one; anything else as it comes, by the last part of its name."""
    name = metric.rpartition(".")[2]
    percent = f"{metric} (%)" if short else _QUANTITIES.get(metric, name)
    set_label(percent if metric in _QUANTITIES else name, fontsize=8.5, color=INK)
    if metric in _QUANTITIES:
        _percent_axis(axis, set_ticks)
        set_limits(0, 108)
    else:
        axis.grid(color=GRID, linewidth=0.6)


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


def _plain(text: str, most: int = 32) -> str:
    """A text from elsewhere, cut to ``most`` characters: matplotlib would read mathematics between two dollars."""
    text = " ".join(text.split())
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def _percent_axis(axis: Any, set_ticks: Any) -> None:
    set_ticks(range(0, 101, 20))
    axis.grid(color=GRID, linewidth=0.6)


def _head(figure: Figure, axes: Any, title: str, *, columns: int = 3) -> None:
    figure.suptitle(_plain(title, 100), fontsize=9.5, color=INK, x=0.02, ha="left")
    _legend(axes, columns=columns)


def _legend(axes: Any, *, columns: int) -> None:
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(
        fontsize=8, frameon=False, ncols=columns, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2,
        handlelength=1.2, handletextpad=0.5, columnspacing=1.2, labelcolor=INK,
    )  # fmt: skip
