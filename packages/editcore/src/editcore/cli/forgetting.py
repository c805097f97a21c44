"""``editctl forgetting``: compares the checkpoints of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editcore.cli.options import AsJson
from editcore.evaluation.measures import Measure, legend, shown

if TYPE_CHECKING:
    from editcore.runs.checkpoint_history import CheckpointHistory

__all__ = ["app"]

app = typer.Typer()


@app.command()
def forgetting(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories with checkpoints, finished or not.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw all runs into one picture.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table, a row per run and checkpoint.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare how runs with checkpoints (run --eval-every N) forget."""
    from editcore.cli.console import make_console, print_json, print_table
    from editcore.interfaces.errors import RunError
    from editcore.runs.checkpoint_history import read_checkpoint_history
    from editcore.runs.record import RunRecord

    if out is not None and out.suffix != ".png":
        raise RunError(f"--out {out}: the picture is a PNG; give a file that ends in .png.")
    labels = _labels(runs)
    found = {label: read_checkpoint_history(run) for label, run in labels.items()}
    methods = {label: RunRecord.read(run).config.method for label, run in labels.items()}
    rows = list(_rows(found, methods))
    if csv is not None:
        _write_csv(rows, csv)
    if out is not None:
        from editcore.figures.forgetting import forgetting_runs_figure
        from editcore.figures.style import save

        title = "What is left of the edits: " + (next(iter(labels)) if len(labels) == 1 else f"{len(labels)} runs")
        save(forgetting_runs_figure(found, title=title), out)
    if as_json:
        print_json({label: history.model_dump(mode="json") for label, history in found.items()})
        return
    console = make_console()
    metrics = _metrics(found)
    columns = ("edits", "facts", *metrics, "perplexity", "ratio", "‖ΔW‖/‖W‖ %", "seconds")
    print_table(
        ("run", *columns),
        [_shown(row, metrics) for row in rows],
        title=f"At each checkpoint; {legend(metrics.values())}",
        right=columns,
        console=console,
    )
    console.print()
    print_table(
        ("run", "method", "half-life", "mean retention %", "retained at age 0 %", "at the last age %"),
        [(label, methods[label], *_totals(history)) for label, history in found.items()],
        title="Forgetting; ages in facts edited since",
        right=("half-life", "mean retention %", "retained at age 0 %", "at the last age %"),
        console=console,
    )
    if len({(history.text.source, history.text.tokens, history.text.window) for history in found.values()}) > 1:
        console.print(
            "Note: the perplexities are on different texts and cannot be compared; their ratios only roughly."
        )
    for path in (out, csv):
        if path is not None:
            console.print(f"Written: {path}")


def _labels(runs: Sequence[Path]) -> Mapping[str, Path]:
    """Runs by a short name: the directory's name, or the whole path if two have the same name.

    Raises:
        RunError: a run is named twice.
    """
    from editcore.interfaces.errors import RunError

    names = [run.resolve().name for run in runs]
    labels = {name if names.count(name) == 1 else str(run): run for name, run in zip(names, runs, strict=True)}
    if len(labels) < len(runs) or len({run.resolve() for run in runs}) < len(runs):
        raise RunError(f"A run is named twice: {', '.join(map(str, runs))}.")
    return labels


def _metrics(found: Mapping[str, CheckpointHistory]) -> Mapping[str, Measure]:
    """The metrics of all runs that tables show, by key."""
    return {measure.key: measure for history in found.values() for measure in shown(history.metrics, history.known)}


def _rows(found: Mapping[str, CheckpointHistory], methods: Mapping[str, str]) -> Iterator[dict[str, object]]:
    metrics = _metrics(found)
    for label, history in found.items():
        for checkpoint in history.checkpoints:
            yield {
                "run": label,
                "method": methods[label],
                "num_edits": checkpoint.num_edits,
                "facts": checkpoint.facts,
                **{key: checkpoint.values.get(key) for key in metrics},
                "perplexity": checkpoint.perplexity,
                "perplexity_ratio": checkpoint.perplexity_ratio,
                "relative_change": max(checkpoint.relative_change.values(), default=0.0),
                "seconds": checkpoint.seconds,
                "half_life": history.forgetting.half_life,
                "auc": history.forgetting.auc,
            }


def _shown(row: Mapping[str, Any], metrics: Mapping[str, Measure]) -> tuple[str, ...]:
    numbers = (
        *(measure.text(row[key]) for key, measure in metrics.items()),
        _text(row["perplexity"], 2),
        _text(row["perplexity_ratio"], 3),
    )
    change = row["relative_change"]
    assert isinstance(change, float)
    return (
        str(row["run"]), str(row["num_edits"]), str(row["facts"]), *numbers, _text(100 * change, 2),
        _text(row["seconds"], 1),
    )  # fmt: skip


def _totals(history: CheckpointHistory) -> tuple[str, ...]:
    bins = history.forgetting.retention_by_age
    ends = (bins[0].retention if bins and bins[0].first == 0 else None, bins[-1].retention if bins else None)
    half_life = history.forgetting.half_life
    return (
        str(half_life) if half_life is not None else "never" if history.forgetting.auc is not None else "-",
        *(_text(share, 1) for share in (history.forgetting.auc, *ends)),
    )


def _text(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _write_csv(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Write the table: UTF-8, with a heading. Unknown values are empty."""
    import csv
    import io

    from editcore._util.files import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
