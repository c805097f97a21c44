"""``editctl sweep``, ``compare`` and ``ablate``: the same run many times, with something changed."""

from __future__ import annotations

import inspect
import math
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import ExecutorSettings, Strict

if TYPE_CHECKING:
    from editcore.plugins.registry import Plugins
    from editcore.sweeps import Plan, Sweep, SweepFile, SweepResult

__all__ = ["ablate_app", "compare_app", "sweep_app"]

sweep_app = typer.Typer()
compare_app = typer.Typer()
ablate_app = typer.Typer()

Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Sweep directory. [default: runs/NAME, named like it]")]
Model = Annotated[str | None, typer.Option(help="A catalogue name, a model folder or a hub id.")]
Dataset = Annotated[str | None, typer.Option(help="A data set (NAME or NAME:ARGUMENT) or a file of records.")]
Edits = Annotated[int | None, typer.Option(help="How many facts each trial edits.")]
BatchSizes = Annotated[
    list[int] | None, typer.Option("--batch-size", help="Facts solved together; several make an axis of it.")
]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="A seed; give several for intervals over seeds.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto: over all accelerators.")]
Arms = Annotated[list[str] | None, typer.Option("--arm", metavar="NAME", help="Only this arm, or these.")]
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
    typer.Option("--grid", metavar="KEY=[V, ...]", help="An axis, in place of the one of that name or beside them."),
]
ExecutorName = Annotated[str, typer.Option("--executor", help="Where the trials run.")]
Workers = Annotated[int | None, typer.Option(help="How many trials run at a time. [default: the executor's]")]
Address = Annotated[str | None, typer.Option(help="Of the executor's cluster.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run the trials again that failed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it will cost; run nothing.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the three commands have in common; ``compare`` has its own ``--arm``."""

    base: Mapping[str, Any]
    assignments: list[str]
    axes: list[str]
    seeds: list[int]
    arms: list[str]
    executor: str
    executor_values: Mapping[str, Any]
    executor_assignments: list[str]
    directory: Path | None
    """Left out, it is named after the command."""
    retry_failed: bool
    dry_run: bool


def _asked(
    out: Out = None,
    model: Model = None,
    dataset: Dataset = None,
    edits: Edits = None,
    strict: Strict = None,
    batch_size: BatchSizes = None,
    seed: Seeds = None,
    device: Device = None,
    arm: Arms = None,
    assignments: Assignments = None,
    axes: Axes = None,
    executor: ExecutorName = "local",
    workers: Workers = None,
    address: Address = None,
    executor_settings: ExecutorSettings = None,
    retry_failed: RetryFailed = False,
    dry_run: DryRun = False,
) -> _Asked:
    """What the options that all three commands have come to."""
    options = {"model": model, "dataset": dataset, "edits": edits, "strict": strict, "device": device}
    sizes = batch_size or []
    if len(sizes) == 1:
        options["batch_size"] = sizes[0]
    return _Asked(
        base={name: value for name, value in options.items() if value is not None},
        assignments=assignments or [],
        axes=[*(axes or []), *([f"batch_size={sizes}"] if len(sizes) > 1 else [])],
        seeds=seed or [],
        arms=arm or [],
        executor=executor,
        executor_values={k: v for k, v in {"workers": workers, "address": address}.items() if v is not None},
        executor_assignments=executor_settings or [],
        directory=out,
        retry_failed=retry_failed,
        dry_run=dry_run,
    )


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of :func:`_asked` behind its own; it gets them as ``asked``. Its own option replaces
    the shared one of the same name."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = {name: one for name, one in inspect.signature(_asked, eval_str=True).parameters.items() if name not in own}

    def called(**values: Any) -> None:
        asked = _asked(**{name: values.pop(name) for name in shared})
        command(**values, asked=asked)

    parameters = [*(own[name] for name in own if name != "asked"), *shared.values()]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    called.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return called


@sweep_app.command()
@_with_options
def sweep(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A TOML file: a run, and what is varied in it.")],
    *,
    asked: _Asked,
) -> None:
    """Run a grid of trials, and put the results into one table.

    The same command goes on where an earlier one stopped: trials that are finished are not run again, those that failed
    only with --retry-failed. Options given here win over those of the file.
    """
    from editcore.sweeps import load_sweep

    _run(loaded_plugins(ctx), load_sweep(file), asked, name=file.stem)


@compare_app.command()
@_with_options
def compare(
    ctx: typer.Context,
    editor: Annotated[
        list[str] | None,
        typer.Option("--editor", metavar="NAME", help="Only this installed editor, or these. [default: all]"),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME=EDITOR+PLUGIN",
            help="An arm with plugins beside its editor, or an editor's name. Without --editor: only this, or these.",
        ),
    ] = None,
    *,
    asked: _Asked,
) -> None:
    """Compare the installed methods on the same facts.

    Every installed editor is an arm, under its name. One that cannot run on the model or the data is left out with a
    note; one that was asked for by --editor or --arm is refused. The unedited model is the first row.
    """
    from editcore.sweeps import make_comparison

    plugins = loaded_plugins(ctx)
    _run(plugins, make_comparison(plugins, editors=editor or (), arms=arm or ()), asked, name="compare")


@ablate_app.command()
@_with_options
def ablate(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help="A study of an installed package; left out, list them.")
    ] = None,
    *,
    asked: _Asked,
) -> None:
    """Vary the settings of one plugin, as the study that it brings says."""
    from editcore.sweeps import STUDY, load_study

    plugins = loaded_plugins(ctx)
    if name is not None:
        _run(plugins, load_study(plugins, name), asked, name=f"ablate-{name}")
        return
    from editcore.cli.console import print_table

    studies = plugins.components(STUDY)
    print_table(("study", "summary"), [(spec.name, spec.summary) for spec in studies.values()])


def _run(plugins: Plugins, file: SweepFile, asked: _Asked, *, name: str) -> None:
    """Plan and run; ``name`` is that of the directory unless one is given."""
    from editcore.execution.executors import make_executor
    from editcore.settings.hparams import parse_assignment
    from editcore.sweeps import make_plan, run_sweep
    from editcore.sweeps.run import refuse_other

    directory = asked.directory or Path("runs") / name
    settings = {**asked.executor_values, **dict(map(parse_assignment, asked.executor_assignments))}
    executor = make_executor(plugins, asked.executor, settings)
    refuse_other(directory)
    plan = make_plan(replace(file, sweep=_changed(file.sweep, asked)), plugins)
    if asked.dry_run:
        _print_plan(plan, directory)
        return
    from editcore.cli.sweep_view import SweepView

    try:
        with SweepView() as view:
            result = run_sweep(
                plan,
                directory,
                executor=executor,
                retry_failed=asked.retry_failed,
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


def _changed(sweep: Sweep, asked: _Asked) -> Sweep:
    from editcore.interfaces.errors import HParamsError
    from editcore.settings.hparams import parse_assignment

    base, settings, grid = dict(asked.base), dict[str, dict[str, Any]](), dict[str, list[Any]]()
    for name, value in map(parse_assignment, asked.assignments):
        section, dot, key = name.rpartition(".")
        if dot:
            settings.setdefault(section, {})[key] = value
        else:
            base[name.replace("-", "_")] = value
    for name, values in map(parse_assignment, asked.axes):
        if not isinstance(values, list) or not values:
            raise HParamsError(f"--grid {name} takes a list of values, such as --grid '{name}=[1, 2]'.")
        grid[name if "." in name else name.replace("-", "_")] = values
    return sweep.changed(base=base, settings=settings, grid=grid, seeds=asked.seeds, arms=asked.arms)


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
            "Their time cannot be told: not all of these editors have a finished run with the model in "
            f"{directory} or beside it."
        )
    elif due:
        console.print(f"About {_time(cost.seconds)} of one worker, going by {cost.runs} finished runs.")


def _time(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _show(result: SweepResult) -> None:
    """Means over seeds, failures, and where everything is."""
    import pandas as pd

    from editcore.cli.console import make_console, print_table
    from editcore.evaluation.measures import legend, shown

    console = make_console()
    means = pd.read_csv(result.tables / f"{result.plan.title}_mean.csv", dtype=dict.fromkeys(result.plan.axes, str))
    known = {str(name) for name in means if means[name].notna().any()}
    measures = {one.key: one for one in shown(result.plan.measures, known)}
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
