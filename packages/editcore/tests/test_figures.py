"""Figures are drawn without a display, say what they show, and are written whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from editcore import figures
from editcore.evaluation import Metric, Summary
from editcore.figures.style import COLUMN_WIDTH
from editcore.interfaces.errors import EditcoreError
from editcore.locate_then_edit.located import KINDS, Tracing
from editcore.runs.checkpoints import Checkpoint
from editcore.runs.forgetting import forgetting
from matplotlib.backends.backend_agg import FigureCanvasAgg


def summary(es: float, ps: float, ns: float, **more: float) -> Summary:
    values = {"ES": es, "PS": ps, "NS": ns, **more}
    return Summary(metrics={k: Metric(mean=v, std=20.0, cases=40, prompts=80) for k, v in values.items()}, cases=40)


def texts(figure: object) -> list[str]:
    axes = figure.axes[0]  # type: ignore[attr-defined]
    return [text.get_text() for text in axes.texts]


def test_summary_figure_shows_both_sides() -> None:
    figure = figures.summary_figure(summary(20, 25, 74), summary(100, 91, 72), title="40 edits")
    assert texts(figure) == ["20", "25", "74", "29", "100", "91", "72", "86"]
    axes = figure.axes[0]
    assert axes.get_ylabel() == "prompts won (%)"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["before (40 facts)", "after (40 facts)", "95 % interval"]
    assert isinstance(figure.canvas, FigureCanvasAgg)


def test_what_cannot_be_computed_is_marked() -> None:
    nothing = Summary(metrics={}, cases=1)
    assert texts(figures.summary_figure(nothing, nothing, title="no true objects")) == ["n/a"] * 8


def test_relations_that_lose_most_stand_at_the_top() -> None:
    before = {"a": summary(0, 0, 70), "b": summary(0, 0, 60), "only before": summary(0, 0, 1)}
    after = {"a": summary(0, 0, 40), "b": summary(0, 0, 65)}
    axes = figures.per_relation_figure(before, after, title="by relation").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]  # drawn from the bottom up
    assert axes.get_xlabel() == "NS (%)"
    figures.per_relation_figure({}, {}, title="empty")


def test_names_from_elsewhere_are_shown_as_they_are(tmp_path: Path) -> None:
    """Dollars would begin mathematics, and what is no mathematics could not be drawn."""
    name = "$\\no{$ " + "x" * 200
    figure = figures.per_relation_figure({name: summary(1, 2, 3)}, {name: summary(4, 5, 6)}, title=name)
    figures.save(figure, tmp_path / "odd.png")
    [label] = figure.axes[0].get_yticklabels()
    assert label.get_text().replace("\\$", "$").startswith("$\\no{$ xxx")
    assert len(label.get_text()) < 40


def tracing(kinds: Sequence[str] = KINDS) -> Tracing:
    effects = np.linspace(-0.1, 0.3, 24).reshape(6, 4)
    effects[1] = np.nan
    return Tracing(
        model="m", fingerprint="f", effects=dict.fromkeys(kinds, effects), counts=(3, 0, 3, 3, 2, 3), asked=9, used=3,
        clean=0.5, corrupted=0.1, noise=3.0, draws=1, window=2, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:2]])
def test_a_tracing_has_a_panel_for_each_kind_and_one_scale(kinds: Sequence[str]) -> None:
    """Where the attention's output is not known, there is no panel for it."""
    *panels, bar = figures.tracing_figure(tracing(kinds), title="t").axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "block output restored",
        "MLPs of 2 layers around restored",
        "attentions of 2 layers around restored",
    ][: len(kinds)]
    assert {axes.images[0].get_clim() for axes in panels} == {(-0.3, 0.3)}, "zero is white"
    assert [label.get_text() for label in panels[0].get_yticklabels()][:3] == [
        "first subject token (3)",
        "middle subject tokens (0)",
        "last subject token (3)",
    ]
    assert bar.get_ylabel() == "indirect effect on p(attribute)"


def test_a_scan_shows_each_layer_and_what_was_there_before() -> None:
    trials = {7: summary(90, 80, 60), 2: summary(100, 90, 70)}
    axes = figures.layers_figure(trials, summary(10, 20, 75), chosen=2, title="t").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["ES"].get_xdata()) == [2, 7]
    assert list(lines["NS"].get_ydata()) == [70, 60]
    assert set(lines["NS before"].get_ydata()) == {75}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ES", "PS", "NS", "score", "NS before"]


def checkpoints(change: float, name: str = "model.layers.3.mlp.down_proj.weight") -> list[Checkpoint]:
    return [
        Checkpoint(
            batch=n, num_edits=10 * (n + 1), facts=10 * (n + 1), ES=100 - change * n, PS=None, NS=70, score=None,
            before={"ES": 1, "PS": None, "NS": 75, "score": None}, interval={"ES": (50, 100), "NS": (60, 80)},
            perplexity=20, perplexity_ratio=1.1, relative_change={name: 0.01 * (n + 1)}, seconds=1,
        )
        for n in range(3)
    ]  # fmt: skip


def test_a_forgetting_curve_has_every_measurement_and_the_half_life() -> None:
    observations = [("a", 0, True), ("a", 10, True), ("a", 20, False)]
    found = forgetting(observations, step=10)
    metrics, text, size, age = figures.forgetting_figure(checkpoints(5), found, title="t").axes
    lines = {line.get_label(): line for line in metrics.lines}
    assert list(lines["ES"].get_xdata()) == [10, 20, 30]
    assert list(lines["ES"].get_ydata()) == [100, 95, 90]
    assert np.isnan(lines["PS"].get_ydata()).all()
    assert set(lines["NS unedited"].get_ydata()) == {75}
    assert list(text.lines[0].get_ydata()) == [1.1] * 3
    assert list(size.lines[0].get_ydata()) == pytest.approx([1, 2, 3])
    assert [one.get_text() for one in size.get_legend().get_texts()] == ["layer 3"]
    assert list(age.lines[0].get_ydata()) == [100, 100, 0]
    assert age.get_title(loc="left") == "half-life: 20 facts; mean over ages: 75.0 %"
    figures.forgetting_figure([], forgetting([], step=1), title="nothing yet")


def test_runs_are_compared_on_common_axes() -> None:
    runs = {name: (checkpoints(change), forgetting([("a", 0, True)], step=10)) for name, change in (("x", 0), ("y", 9))}
    first, *_, ratio, age = figures.forgetting_runs_figure(runs, title="t").axes
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["x", "y"]
    assert [list(line.get_ydata()) for line in first.lines] == [[100, 100, 100], [100, 91, 82]]
    assert len({line.get_color() for line in first.lines}) == 2
    assert ratio.get_xlabel() == "facts edited"
    assert age.get_xlabel() == "age (facts edited since)"


def test_save_writes_a_png_of_200_dpi_or_nothing(tmp_path: Path) -> None:
    figure = figures.summary_figure(summary(20, 25, 74), summary(100, 91, 72), title="t")
    path = tmp_path / "figures" / "summary.png"
    figures.save(figure, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) == round(COLUMN_WIDTH * 200)
    assert list(path.parent.iterdir()) == [path]
    figures.save(figure, path)
    assert path.read_bytes() == data


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_failed_save_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figures.summary_figure(summary(20, 25, 74), summary(100, 91, 72), title="t")
    path = tmp_path / "summary.png"
    figures.save(figure, path)
    data = path.read_bytes()
    real = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda _path, **options: real("/dev/full", **options))
    with pytest.raises(EditcoreError, match="Cannot write"):
        figures.save(figure, path)
    assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["summary.png"]  # noqa: PTH208


def test_pyplot_is_never_imported() -> None:
    code = "import sys; import editcore.figures.runs; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
