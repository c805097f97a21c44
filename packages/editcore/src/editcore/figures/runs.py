"""The pictures that every run directory has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editcore.figures.forgetting import forgetting_figure
from editcore.figures.scores import summary_figure
from editcore.figures.style import save
from editcore.runs.results import FIGURES_NAME

if TYPE_CHECKING:
    from editcore.runs.results import RunResult

__all__ = ["draw_run"]


def draw_run(result: RunResult) -> None:
    """Write the figures of a run into its directory: scores before and after, and the forgetting curve if it has
    checkpoints.

    Raises:
        StorageError: a figure cannot be written.
    """
    folder = result.directory / FIGURES_NAME
    save(summary_figure(result.before, result.after, title=result.title), folder / "summary.png")
    if (history := result.checkpoints) is not None:
        figure = forgetting_figure(history, title=result.title)
        save(figure, folder / "forgetting_curve.png")
