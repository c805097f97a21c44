"""The style of all pictures. It needs no display and changes no global state of matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from editcore._util.files import replacing
from editcore._util.words import cut

if TYPE_CHECKING:
    from editcore.evaluation import Measure, Summary

__all__ = [
    "AFTER",
    "BEFORE",
    "COLUMN_WIDTH",
    "DASHES",
    "DPI",
    "GRID",
    "INK",
    "MARKERS",
    "PALETTE",
    "axis_label",
    "by_axis",
    "draw_intervals",
    "label_axes",
    "layered",
    "look_of",
    "new_figure",
    "number_or_nan",
    "percent_axis",
    "png",
    "put_legend",
    "put_title",
    "quantity_axis",
    "save",
    "shortened",
    "stacked_panels",
    "top_of_bar",
]

# The blue of Okabe and Ito's palette and a pale grey-blue: they differ in lightness, so that colour-blind readers and
# grey prints tell them apart.
BEFORE = "#9DB4C0"
AFTER = "#0072B2"
INK = "#222222"
GRID = "#DDDDDD"
DPI = 200
COLUMN_WIDTH = 5.0
"""Width in inches. Font sizes are chosen so that the figure is readable at the width of a column."""

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#222222")
"""Okabe and Ito's colours, which every common form of colour vision tells apart. Lines also differ in markers and
dashes."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")


_LEGEND_HANDLE, _LEGEND_CHARACTER, _LEGEND_MARGIN = 0.33, 0.062, 0.75
"""Inches: the width of a legend entry without its text, the width of a character, and the margin left of the axes."""


def layered(index: int, count: int) -> dict[str, float]:
    """Widths of the line and marker number ``index`` of ``count`` on the same axes.

    A later line is thinner and on top, so that lines with equal values can all be seen.
    """
    share = 0.0 if count < 2 else (count - 1 - index) / (count - 1)
    more = share * min(1.4 * (count - 1), 3.0)
    return {"linewidth": 1 + more, "markersize": 3.5 + 1.5 * more, "zorder": 2 + 0.5 * (1 - share)}


def new_figure(*, width: float = COLUMN_WIDTH, height: float = 3.1) -> tuple[Figure, Any]:
    """An empty figure in the house style, and its axes."""
    figure, [axes] = stacked_panels(1, width=width, height=height)
    return figure, axes


def stacked_panels(
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


def label_axes(axes: Any, *, y: str, x: str = "") -> None:
    """Name both axes."""
    axes.set_ylabel(y, fontsize=8.5, color=INK)
    axes.set_xlabel(x, fontsize=8.5, color=INK)


def number_or_nan(value: float | None) -> float:
    """``None`` as NaN, which matplotlib leaves out."""
    return math.nan if value is None else value


def quantity_axis(
    axis: Any, set_limits: Any, set_label: Any, measure: Measure | str, set_ticks: Any, *, short: bool = False
) -> None:
    """Label an axis with a metric. A share goes from 0 to 100. A column that is not a metric is named by the last part
    of its name.

    Args:
        short: whether to use the metric's key instead of its label, for low panels.
    """
    if isinstance(measure, str):
        set_label(measure.rpartition(".")[2], fontsize=8.5, color=INK)
    else:
        unit = f" ({measure.unit})" if measure.unit else ""
        set_label(f"{measure.key if short else measure.label}{unit}", fontsize=8.5, color=INK)
    if isinstance(measure, str) or not measure.share:
        axis.grid(color=GRID, linewidth=0.6)
        return
    percent_axis(axis, set_ticks)
    set_limits(0, 108)


def axis_label(measure: Measure) -> str:
    """The label of an axis that several metrics of one evaluator share."""
    return f"{measure.evaluator} ({measure.unit})" if measure.unit else measure.evaluator


def by_axis(measures: Sequence[Measure]) -> list[list[Measure]]:
    """Groups of metrics that can share an axis: the shares of an evaluator together, and any other metric alone."""
    groups: dict[tuple[str, str], list[Measure]] = {}
    for measure in measures:
        groups.setdefault((measure.evaluator, "" if measure.share else measure.key), []).append(measure)
    return list(groups.values())


def top_of_bar(summary: Summary, key: str, value: float) -> float:
    """The height of a bar with its interval, above which its number is written."""
    if math.isnan(value):
        return 0.0
    ends = summary.interval(key)
    return value if ends is None else max(value, ends[1])


def draw_intervals(
    axes: Any, summary: Summary, keys: Sequence[str], places: Sequence[float], *, label: str | None
) -> None:
    """The 95 % interval of each metric that has one, over its place on the axis."""
    for key, place in zip(keys, places, strict=True):
        ends = summary.interval(key)
        if ends is not None:
            mean = summary.value(key)
            axes.errorbar(
                place,
                mean,
                yerr=[[max(0.0, mean - ends[0])], [max(0.0, ends[1] - mean)]],
                color=INK,
                linewidth=1,
                capsize=2.5,
                label=label,
            )
            label = None  # only one entry in the legend


def look_of(measures: Sequence[Measure]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each metric, by key. Composites are black."""
    looks: dict[str, tuple[str, str]] = {}
    plain = 0
    for measure in measures:
        if measure.of:
            looks[measure.key] = (INK, "D")
        else:
            looks[measure.key] = (PALETTE[plain % (len(PALETTE) - 1)], MARKERS[plain % len(MARKERS)])
            plain += 1
    return looks


def shortened(text: str, most: int = 32) -> str:
    """A text, cut to ``most`` characters. Dollars are escaped, because matplotlib reads text between two of them as
    mathematics."""
    return cut(" ".join(text.split()), most).replace("$", r"\$")


def percent_axis(axis: Any, set_ticks: Any) -> None:
    """Ticks from 0 to 100, with a grid."""
    set_ticks(range(0, 101, 20))
    axis.grid(color=GRID, linewidth=0.6)


def put_title(figure: Figure, axes: Any, title: str, *, columns: int = 3) -> None:
    """The title, and the legend under it."""
    figure.suptitle(shortened(title, 100), fontsize=9.5, color=INK, x=0.02, ha="left")
    put_legend(axes, columns=columns)


def put_legend(axes: Any, *, columns: int) -> None:
    """The legend above the axes, if it has entries. It has fewer than ``columns`` columns if these would be wider than
    the figure."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    entry = _LEGEND_HANDLE + _LEGEND_CHARACTER * max(map(len, labels))  # inches
    fitting = int((axes.figure.get_figwidth() - _LEGEND_MARGIN) / entry)
    axes.legend(
        fontsize=8, frameon=False, ncols=max(1, min(columns, fitting)), loc="lower left",
        bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2, handlelength=1.2, handletextpad=0.5,
        columnspacing=1.2, labelcolor=INK,
    )  # fmt: skip
