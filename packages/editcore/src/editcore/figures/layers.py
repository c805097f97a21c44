"""Pictures over a model's layers: causal tracing, and the trials of onboarding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from editcore.evaluation.measures import shown
from editcore.figures.style import GRID, INK, layered, look_of, new_figure, percent_axis, put_title, stacked_panels

if TYPE_CHECKING:
    from editcore.evaluation import Summary
    from editcore.locate_then_edit.located import Tracing

__all__ = ["layers_figure", "tracing_figure"]

_KINDS: Mapping[str, str] = {"hidden": "block output", "mlp": "MLPs", "attention": "attentions"}


def tracing_figure(tracing: Tracing, *, title: str) -> Figure:
    """Average indirect effects by role of the token and layer: one panel for each kind of state, one colour scale."""
    from editcore.locate_then_edit.located import ROLES

    kinds = list(tracing.effects)
    figure, panels = stacked_panels(len(kinds), height=0.55 + 1.2 * len(kinds))
    largest = max(float(np.nanmax(np.abs(effect), initial=0.0)) for effect in tracing.effects.values())
    image: Any = None
    for axes, kind in zip(panels, kinds, strict=True):
        # Red and blue around white at zero, which every common form of colour vision tells apart.
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


def layers_figure(trials: Mapping[int, Summary], before: Summary, *, chosen: int, title: str) -> Figure:
    """Every metric that is a share, in percent, after editing each layer alone.

    A metric that an edit should leave alone has a dotted line at its value before any edit.
    """
    figure, axes = new_figure()
    layers = sorted(trials)
    axes.axvline(chosen, color=GRID, linewidth=8, zorder=0)
    measures = [measure for measure in shown(before.measures, before.values()) if measure.share]
    for index, (key, (colour, marker)) in enumerate(look_of(measures).items()):
        values = [trials[layer].value(key) for layer in layers]
        axes.plot(layers, values, marker=marker, color=colour, label=key, **layered(index, len(measures)))
    for measure in measures:
        value = before.value(measure.key)
        if measure.keep and not math.isnan(value):
            colour, _ = look_of(measures)[measure.key]
            axes.axhline(value, color=colour, linewidth=1, linestyle=":", zorder=3, label=f"{measure.key} before")
    axes.xaxis.get_major_locator().set_params(integer=True)
    percent_axis(axes.yaxis, axes.set_yticks)
    axes.set_ylim(0, 105)
    axes.set_xlabel("layer edited", fontsize=8.5, color=INK)
    axes.set_ylabel("percent", fontsize=8.5, color=INK)
    put_title(figure, axes, title, columns=5)
    return figure
