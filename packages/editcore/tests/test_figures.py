"""Figures are drawn without a display, say what they show, and are written whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from editcore import EvaluatorSpec, MetricSpec, figures
from editcore.evaluation import COUNTERFACT, Average, Measure, Summary, measures_of
from editcore.figures.style import COLUMN_WIDTH
from editcore.interfaces.errors import EditcoreError
from editcore.locate_then_edit.located import KINDS, Tracing
from editcore.runs.checkpoint_history import Checkpoint, CheckpointHistory
from editcore.runs.forgetting import Sighting, forgetting
from editcore.runs.held_out import TextInfo
from matplotlib.backends.backend_agg import FigureCanvasAgg

MEASURES = measures_of([COUNTERFACT])
NS = next(measure for measure in MEASURES if measure.key == "NS")
OTHER = EvaluatorSpec(
    "other",
    "m:Other",
    summary="Another.",
    metrics=(
        MetricSpec(name="won", label="Won at once", retention=True),
        MetricSpec(name="length", label="Length", unit="words", keep=True),
        MetricSpec(name="gap", label="Gap", signed=True, better="lower"),
        MetricSpec(name="hidden", label="Hidden", show="report"),
    ),
)
"""An evaluator with a metric of every unit."""


def summary(es: float, ps: float, ns: float, **more: float) -> Summary:
    return of(MEASURES, {"ES": es, "PS": ps, "NS": ns, **more}, counterfact=40)


def of(measures: tuple[Measure, ...], values: dict[str, float], **facts: int) -> Summary:
    """Of metrics with these means, each over as many facts as its evaluator saw."""
    of_key = {measure.key: measure for measure in measures}
    averages = {
        key: Average(mean=value, std=20.0, facts=facts[of_key[key].evaluator], prompts=80, share=of_key[key].share)
        for key, value in values.items()
    }
    return Summary(measures=measures, averages=averages, facts=facts)


def texts(figure: object, panel: int = 0) -> list[str]:
    axes = figure.axes[panel]  # type: ignore[attr-defined]
    return [text.get_text() for text in axes.texts]


def test_summary_figure_shows_both_sides() -> None:
    figure = figures.summary_figure(summary(20, 25, 74), summary(100, 91, 72), title="40 edits")
    assert texts(figure) == ["20", "25", "74", "29", "100", "91", "72", "86"]
    axes = figure.axes[0]
    assert axes.get_ylabel() == "counterfact (%)"
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "Efficacy\n(ES)", "Paraphrase\n(PS)", "Neighbourhood\n(NS)", "Score\n(harmonic mean)",
    ]  # fmt: skip
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["before (40 facts)", "after (40 facts)", "95 % interval"]
    assert isinstance(figure.canvas, FigureCanvasAgg)


def test_what_cannot_be_computed_is_marked() -> None:
    """On one side; what cannot be told at all is left out."""
    nothing = Summary(measures=MEASURES)
    some = of(MEASURES, {"ES": 100.0, "PS": 90.0}, counterfact=40)
    assert texts(figures.summary_figure(nothing, some, title="t")) == ["n/a", "n/a", "100", "90"]
    assert texts(figures.summary_figure(some, nothing, title="t")) == ["100", "90", "n/a", "n/a"]
    assert texts(figures.summary_figure(nothing, nothing, title="no true objects")) == []


def test_each_evaluator_and_unit_has_a_panel() -> None:
    measures = measures_of([COUNTERFACT, OTHER])
    before = of(measures, {"ES": 10, "won": 25, "length": 3.14159, "gap": -5, "hidden": 1}, counterfact=40, other=4)
    after = of(measures, {"ES": 90, "won": 75, "length": 1200.5, "gap": 7.5, "hidden": 2}, counterfact=40, other=4)
    figure = figures.summary_figure(before, after, title="t")
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "counterfact (%)", "other (%)", "other (words)", "other (%)",
    ]  # fmt: skip
    assert [texts(figure, panel) for panel in range(4)] == [
        ["10", "90"], ["25", "75"], ["3.14", "1.2e+03"], ["-5", "8"],
    ]  # fmt: skip
    shares, words, gap = figure.axes[1:]
    assert shares.get_ylim() == (0, 112)
    assert words.get_ylim()[1] > 1200.5
    assert gap.get_ylim()[0] < -5
    assert [text.get_text() for text in shares.get_legend().get_texts()] == [
        "before (4 facts)", "after (4 facts)", "95 % interval",
    ]  # fmt: skip
    for axes, mean, half in ((gap, 7.5, 1.96 * 10), (words, 1200.5, 1.96 * 10)):
        _before, bar = (line.get_segments()[0][:, 1] for line in axes.collections)
        assert list(bar) == pytest.approx([mean - half, mean + half], rel=1e-4)


def test_a_metric_of_fewer_facts_than_were_measured_says_so() -> None:
    several = of(MEASURES, {"ES": 50, "PS": 50}, counterfact=40)
    few = dict(several.averages) | {"PS": Average(mean=50, std=0, facts=1, prompts=2)}
    after = Summary(measures=MEASURES, averages=few, facts=several.facts)
    axes = figures.summary_figure(several, after, title="t").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Efficacy\n(ES)", "Paraphrase\n(PS)\n[1 fact]"]


def test_relations_that_lose_most_stand_at_the_top() -> None:
    before = {"a": summary(0, 0, 70), "b": summary(0, 0, 60), "only before": summary(0, 0, 1)}
    after = {"a": summary(0, 0, 40), "b": summary(0, 0, 65)}
    axes = figures.per_relation_figure(before, after, measure=NS, title="by relation").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]  # drawn from the bottom up
    assert axes.get_xlabel() == "Neighbourhood (NS) (%)"
    figures.per_relation_figure({}, {}, measure=NS, title="empty")


def test_a_relation_of_which_a_metric_cannot_be_told_is_left_out() -> None:
    before = {"a": summary(0, 0, 70), "b": of(MEASURES, {"ES": 10}, counterfact=40)}
    axes = figures.per_relation_figure(before, before, measure=NS, title="t").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a"]
    score = next(measure for measure in MEASURES if measure.key == "score")
    axes = figures.per_relation_figure(before, before, measure=score, title="t").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a"]
    assert axes.get_xlabel() == "Score (harmonic mean) (%)"


def test_names_from_elsewhere_are_shown_as_they_are(tmp_path: Path) -> None:
    """Dollars would begin mathematics, and what is no mathematics could not be drawn."""
    name = "$\\no{$ " + "x" * 200
    figure = figures.per_relation_figure({name: summary(1, 2, 3)}, {name: summary(4, 5, 6)}, measure=NS, title=name)
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


def test_a_scan_shows_the_shares_of_an_evaluator_alone() -> None:
    measures = measures_of([OTHER])
    trials = {1: of(measures, {"won": 50, "length": 900}, other=6), 0: of(measures, {"won": 25, "length": 1}, other=6)}
    axes = figures.layers_figure(trials, of(measures, {"length": 4}, other=6), chosen=1, title="t").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["won"]
    assert list({line.get_label(): line for line in axes.lines}["won"].get_ydata()) == [25, 50]


def checkpoints(change: float, name: str = "model.layers.3.mlp.down_proj.weight") -> tuple[Checkpoint, ...]:
    return tuple(
        Checkpoint(
            batch=n, num_edits=10 * (n + 1), facts=10 * (n + 1),
            values={"ES": 100 - change * n, "PS": None, "NS": 70, "score": None},
            before={"ES": 1, "PS": None, "NS": 75, "score": None}, interval={"ES": (50, 100), "NS": (60, 80)},
            perplexity=20, perplexity_ratio=1.1, relative_change={name: 0.01 * (n + 1)}, seconds=1,
        )
        for n in range(3)
    )  # fmt: skip


def watched(
    seen: tuple[Checkpoint, ...], sightings: list[Sighting], metrics: tuple[Measure, ...] = MEASURES, *, step: int = 10
) -> CheckpointHistory:
    return CheckpointHistory(
        eval_every=step,
        eval_sample=None,
        text=TextInfo(source="text", tokens=256, window=256, perplexity=20),
        metrics=metrics,
        retention="ES",
        checkpoints=seen,
        forgetting=forgetting(sightings, step=step),
    )


def test_a_forgetting_curve_has_every_measurement_and_the_half_life() -> None:
    found = watched(checkpoints(5), [("a", 0, True), ("a", 10, True), ("a", 20, False)])
    metrics, text, size, age = figures.forgetting_figure(found, title="t").axes
    lines = {line.get_label(): line for line in metrics.lines}
    assert list(lines) == ["ES", "PS", "NS", "NS unedited"], "composites have no curve"
    assert list(lines["ES"].get_xdata()) == [10, 20, 30]
    assert list(lines["ES"].get_ydata()) == [100, 95, 90]
    assert np.isnan(lines["PS"].get_ydata()).all()
    assert set(lines["NS unedited"].get_ydata()) == {75}
    assert metrics.get_ylabel() == "counterfact (%)"
    assert list(text.lines[0].get_ydata()) == [1.1] * 3
    assert list(size.lines[0].get_ydata()) == pytest.approx([1, 2, 3])
    assert [text.get_text() for text in size.get_legend().get_texts()] == ["layer 3"]
    assert list(age.lines[0].get_ydata()) == [100, 100, 0]
    assert age.get_ylabel() == "retained (%)"
    assert age.get_title(loc="left") == "half-life: 20 facts; mean over ages: 75.0 %"
    figures.forgetting_figure(watched((), [], step=1), title="nothing yet")
    figures.forgetting_figure(watched((), [], (), step=1), title="nothing measured")


def test_the_curves_of_another_evaluator_have_panels_of_their_own() -> None:
    metrics = measures_of([COUNTERFACT, OTHER])
    seen = tuple(
        checkpoint.model_copy(
            update={
                "values": {**checkpoint.values, "won": 50.0 + checkpoint.batch, "length": 4.5, "gap": -1.0},
                "before": {**checkpoint.before, "won": 1.0, "length": 6.0, "gap": 0.0},
            }
        )
        for checkpoint in checkpoints(5)
    )
    figure = figures.forgetting_figure(watched(seen, [("a", 0, True)], metrics), title="t")
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(panels)[:3] == ["counterfact (%)", "other (%)", "other (words)"]
    assert len(figure.axes) == 7, "the shares together, whatever else alone; then text, size and age"
    won, words, gap = figure.axes[1:4]
    assert {line.get_label(): list(line.get_ydata()) for line in won.lines} == {"won": [50, 51, 52]}
    assert {line.get_label(): list(line.get_ydata()) for line in words.lines} == {
        "length": [4.5] * 3, "length unedited": [6] * 3,
    }  # fmt: skip
    assert [line.get_label() for line in gap.lines] == ["gap"]
    assert won.get_ylim() == (-3, 105)


def test_runs_are_compared_on_common_axes() -> None:
    runs = {name: watched(checkpoints(change), [("a", 0, True)]) for name, change in (("x", 0), ("y", 9))}
    first, *_, ratio, age = figures.forgetting_runs_figure(runs, title="t").axes
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["x", "y"]
    assert [list(line.get_ydata()) for line in first.lines] == [[100, 100, 100], [100, 91, 82]]
    assert len({line.get_color() for line in first.lines}) == 2
    assert ratio.get_xlabel() == "facts edited"
    assert age.get_xlabel() == "age (facts edited since)"


def test_runs_by_different_evaluators_are_compared_where_they_can_be() -> None:
    half_won = tuple(checkpoint.model_copy(update={"values": {"won": 50.0}}) for checkpoint in checkpoints(0))
    runs = {
        "x": watched(checkpoints(5), [("a", 0, True)]),
        "y": watched(half_won, [("a", 0, True)], measures_of([OTHER])),
    }
    panels = figures.forgetting_runs_figure(runs, title="t").axes
    assert [axes.get_ylabel() for axes in panels][:6] == [
        "ES (%)", "PS (%)", "NS (%)", "won (%)", "length (words)", "gap (%)",
    ]  # fmt: skip
    own, others = panels[0].lines, panels[3].lines
    assert [list(line.get_ydata()) for line in (own[0], others[1])] == [[100, 95, 90], [50] * 3]
    assert np.isnan(own[1].get_ydata()).all()
    assert np.isnan(others[0].get_ydata()).all()


def test_a_curve_of_long_names_and_one_age_can_be_read() -> None:
    """A legend wider than the figure would press its panels together; one age alone has no scale of its own."""
    names = ("paraphrases_said_at_once", "consequences_said", "distinct_bigrams")
    long_names = EvaluatorSpec(
        "long", "m:Long", summary="Long names.",
        metrics=tuple(MetricSpec(name=name, label=name, keep=True, retention=name == names[0]) for name in names),
    )  # fmt: skip
    values = dict.fromkeys(names, 50.0)
    seen = tuple(
        checkpoint.model_copy(update={"values": values, "before": values}) for checkpoint in checkpoints(0)[:1]
    )
    found = watched(seen, [("a", 0, True)], measures_of([long_names]))
    figure = figures.forgetting_figure(found, title="t")
    figure.canvas.draw()
    panel, *_, age = figure.axes
    assert panel.get_position().width > 0.75
    assert panel.get_legend().get_window_extent().x1 <= figure.bbox.width
    assert age.get_xlim() == pytest.approx((-0.03, 1.03))
    drawn = [line for line in panel.lines if not line.get_label().endswith("unedited")]
    assert [line.get_linewidth() for line in drawn] == sorted({line.get_linewidth() for line in drawn}, reverse=True)
    assert len({line.get_markersize() for line in drawn}) == 3, "equal values are all seen"
    assert {line.get_gapcolor() for line in panel.lines if line not in drawn} == {"white"}
    labels = [axes.get_ylabel() for axes in figures.forgetting_runs_figure({"x": found}, title="t").axes]
    assert "consequences_said\n(%)" in labels, "no word is broken"


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
