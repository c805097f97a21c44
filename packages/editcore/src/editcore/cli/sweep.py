"""``editctl sweep``, ``compare`` and ``ablate``: run many variations of a run."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import ExecutorSettings, Strict, with_options

if TYPE_CHECKING:
    from editcore.plugins.registry import Plugins
    from editcore.sweeps import Plan, Sweep, SweepFile, SweepResult

__all__ = ["ablate_app", "compare_app", "sweep_app"]

sweep_app = typer.Typer()
compare_app = typer.Typer()
ablate_app = typer.Typer()

Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Sweep directory. [default: runs/NAME]")]
Model = Annotated[str | None, typer.Option(help="A catalogue name, a model folder or a hub id.")]
Dataset = Annotated[str | None, typer.Option(help="A data set (NAME or NAME:ARGUMENT) or a file of records.")]
Edits = Annotated[int | None, typer.Option(help="How many facts each trial edits.")]
BatchSizes = Annotated[
    list[int] | None, typer.Option("--batch-size", help="Facts solved together; several values make an axis.")
]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="A seed; give several for intervals over seeds.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto: over all accelerators.")]
Arms = Annotated[
    list[str] | None, typer.Option("--arm", metavar="NAME", help="Run only this arm; may be given several times.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of every trial, or NAME.KEY=VALUE of an editor, plugin or data set.",
    ),
]
Axes = Annotated[
    list[str] | None,
    typer.Option("--grid", metavar="KEY=[V, ...]", help="An axis to add, or to replace the one of that name."),
]
ExecutorName = Annotated[str, typer.Option("--executor", help="Where the trials run.")]
Workers = Annotated[int | None, typer.Option(help="How many trials run at a time. [default: the executor's]")]
Address = Annotated[str | None, typer.Option(help="Address of the executor's cluster.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run the trials again that failed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it will cost; run nothing.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _SweepOptions:
    """The options that all three commands have."""

    out: Out = None
    model: Model = None
    dataset: Dataset = None
    edits: Edits = None
    strict: Strict = None
    batch_size: BatchSizes = None
    seed: Seeds = None
    device: Device = None
    arm: Arms = None
    assignments: Assignments = None
    axes: Axes = None
    executor: ExecutorName = "local"
    workers: Workers = None
    address: Address = None
    executor_settings: ExecutorSettings = None
    retry_failed: RetryFailed = False
    dry_run: DryRun = False

    def base(self) -> dict[str, Any]:
        """Options of every trial, by the names of the fields of :class:`RunConfig`."""
        named = {name: getattr(self, name) for name in ("model", "dataset", "edits", "strict", "device")}
        [size] = self.batch_size if self.batch_size and len(self.batch_size) == 1 else [None]
        return {name: value for name, value in {**named, "batch_size": size}.items() if value is not None}

    def all_axes(self) -> list[str]:
        """The axes that were given, as ``KEY=[V, ...]``."""
        sizes = self.batch_size or []
        return [*(self.axes or []), *([f"batch_size={sizes}"] if len(sizes) > 1 else [])]

    def for_executor(self) -> dict[str, Any]:
        """Settings of the executor."""
        from editcore.settings.hparams import parse_assignment

        named = {name: getattr(self, name) for name in ("workers", "address")}
        given = {name: value for name, value in named.items() if value is not None}
        return {**given, **dict(map(parse_assignment, self.executor_settings or []))}


@sweep_app.command()
@with_options(_SweepOptions)
def sweep(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A TOML file: a run with variations.")],
    *,
    options: _SweepOptions,
) -> None:
    """Run a grid of trials, and put the results into one table.

    The same command resumes a sweep: finished trials are not run again, failed ones only with
    --retry-failed. Options given here override those of the file.
    """
    from editcore.sweeps import load_sweep

    _run(loaded_plugins(ctx), load_sweep(file), options, name=file.stem)


@compare_app.command()
@with_options(_SweepOptions)
def compare(
    ctx: typer.Context,
    editor: Annotated[
        list[str] | None,
        typer.Option(
            "--editor", metavar="NAME", help="Compare only this editor; may be given several times. [default: all]"
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME=EDITOR+PLUGIN",
            help="An arm with plugins beside its editor, or an editor's name. Without --editor, only these run.",
        ),
    ] = None,
    *,
    options: _SweepOptions,
) -> None:
    """Compare the installed methods on the same facts.

    Every installed editor is an arm with its name. An editor that cannot run on the model or the data is left out with
    a note, but it is an error if it was asked for by --editor or --arm. The first row is the unedited model, and
    baselines follow.
    """
    from editcore.sweeps import make_comparison

    plugins = loaded_plugins(ctx)
    _run(plugins, make_comparison(plugins, editors=editor or (), arms=arm or ()), options, name="compare")


@ablate_app.command()
@with_options(_SweepOptions)
def ablate(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help="A study of an installed package; left out, list them.")
    ] = None,
    *,
    options: _SweepOptions,
) -> None:
    """Vary the settings of one plugin, as defined by a study of its package."""
    from editcore.sweeps import STUDY, load_study

    plugins = loaded_plugins(ctx)
    if name is not None:
        _run(plugins, load_study(plugins, name), options, name=f"ablate-{name}")
        return
    from editcore.cli.console import print_table

    studies = plugins.components(STUDY)
    print_table(("study", "summary"), [(spec.name, spec.summary) for spec in studies.values()])


def _run(plugins: Plugins, file: SweepFile, options: _SweepOptions, *, name: str) -> None:
    """Plan and run a sweep. Its directory is ``runs/name`` unless the options have one."""
    from editcore.execution.executors import make_executor
    from editcore.sweeps import make_plan
    from editcore.sweeps.state import refuse_other

    directory = options.out or Path("runs") / name
    executor = make_executor(plugins, options.executor, options.for_executor())
    refuse_other(directory)
    plan = make_plan(replace(file, sweep=_changed(file.sweep, options)), plugins)
    if options.dry_run:
        _print_plan(plan, directory)
        return

    from editcore.cli.sweep_view import SweepView
    from editcore.sweeps import run_sweep  # torch: what is wrong with the plan has been told

    try:
        with SweepView() as view:
            result = run_sweep(
                plan,
                directory,
                executor=executor,
                retry_failed=options.retry_failed,
                watch=view,
                command=["editctl", *sys.argv[1:]],
            )
    except KeyboardInterrupt:
        again = shlex.join(["editctl", *sys.argv[1:]])
        typer.echo(f"Interrupted. What is written stays; go on with: {again}", err=True)
        raise
    _show(result)
    if result.failures:
        raise typer.Exit(1)


def _changed(sweep: Sweep, options: _SweepOptions) -> Sweep:
    from editcore.interfaces.errors import HParamsError
    from editcore.settings.hparams import parse_assignment

    base, settings, grid = options.base(), dict[str, dict[str, Any]](), dict[str, list[Any]]()
    for name, value in map(parse_assignment, options.assignments or []):
        section, dot, key = name.rpartition(".")
        if dot:
            settings.setdefault(section, {})[key] = value
        else:
            base[name.replace("-", "_")] = value
    for name, values in map(parse_assignment, options.all_axes()):
        if not isinstance(values, list) or not values:
            raise HParamsError(f"--grid {name} takes a list of values, such as --grid '{name}=[1, 2]'.")
        grid[name if "." in name else name.replace("-", "_")] = values
    return sweep.changed(base=base, settings=settings, grid=grid, seeds=options.seed or [], arms=options.arm or [])


def _print_plan(plan: Plan, directory: Path) -> None:
    from editcore._util.words import counted
    from editcore.cli.console import make_console, print_table
    from editcore.sweeps import state_of
    from editcore.sweeps.estimate import estimate_cost

    console = make_console()
    states = {key: state_of(directory, key) for key in plan.trials}
    print_table(
        ("trial", "arm", *plan.axes, "seed", "facts", "state"),
        [
            (
                point.key[:8], point.arm, *(point.values.get(name, "") for name in plan.axes), point.seed,
                plan.trials[point.key].facts, states[point.key],
            )
            for point in plan.points
        ],
        title=f"{plan.title}: {plan.sweep.summary}".removesuffix(": "),
        console=console,
    )  # fmt: skip
    for note in plan.notes:
        console.print(f"Note: {note}")
    due = [key for key, state in states.items() if state != "finished"]
    cost = estimate_cost(plan, due, (directory / "trials", directory.parent))
    console.print(
        f"{counted(len(plan.points), 'combination')}, {counted(len(plan.trials), 'trial')}; {cost.trials} to run, with "
        f"{counted(cost.edits, 'edit')} in {cost.batches:,} {'batch' if cost.batches == 1 else 'batches'}."
    )
    if math.isnan(cost.seconds):
        console.print(
            "Their time cannot be estimated: not every editor has a finished run with this model in "
            f"{directory} or beside it."
        )
    elif due:
        console.print(f"About {_time(cost.seconds)} on one worker, estimated from {cost.runs} finished runs.")


def _time(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _show(result: SweepResult) -> None:
    """Print means over seeds, failures, and where the files are."""
    import pandas as pd

    from editcore.cli.console import make_console, print_table
    from editcore.evaluation.measures import legend, shown

    console = make_console()
    means = pd.read_csv(result.tables / f"{result.plan.title}_mean.csv", dtype=dict.fromkeys(result.plan.axes, str))
    known = {str(name) for name in means if means[name].notna().any()}
    measures = {measure.key: measure for measure in shown(result.plan.measures, known)}
    names = [name for name in (*measures, "retention") if name in means]
    rows = [
        (
            row["arm"],
            *("" if pd.isna(row[axis]) else row[axis] for axis in result.plan.axes),
            *(measures[name].text(row[name]) if name in measures else _percent(row[name]) for name in names),
        )
        for _, row in means.iterrows()
    ]
    console.print()
    seeds = len({point.seed for point in result.plan.points})
    over = f"means over {seeds} seeds; " if seeds > 1 else ""
    print_table(
        ("arm", *result.plan.axes, *names), rows, title=f"{over}{legend(measures.values())}", right=names,
        console=console,
    )  # fmt: skip
    console.print()
    for failure in result.failures:
        console.print(f"Failed: {failure.key[:8]}: {failure.error}")
    if result.failures:
        console.print(
            f"{len(result.failures)} of {len(result.plan.trials)} trials failed; --retry-failed runs them again."
        )
    for note in result.notes:
        console.print(f"Note: {note}")
    console.print(f"Tables and figures are in {result.tables}, the runs in {result.directory / 'trials'}")


def _percent(value: float) -> str:
    return "-" if value != value else f"{value:.1f}"
