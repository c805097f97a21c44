"""``editctl run``: the main job."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import SaveDtype, Strict, refuse_used_save, with_options

if TYPE_CHECKING:
    from editcore.plugins.registry import Plugins
    from editcore.runs.config import RunConfig
    from editcore.runs.record import RunRecord
    from editcore.runs.results import RunResult

__all__ = ["RunOptions", "app", "settings_from"]

app = typer.Typer()

_MOST_REJECTIONS = 20
"""Most rejected facts that are shown; ``editctl ledger RUN show`` lists all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options that make a :class:`RunConfig`. ``None`` means that an option was not given."""

    editor: Annotated[str | None, typer.Option(help="The editing method; 'editctl editors' lists them.")] = None
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="An extension for this run; may be given several times. 'editctl plugins' lists them."
        ),
    ] = None
    backend: Annotated[str | None, typer.Option(help="How changes of weights are applied. [default: raw]")] = None
    model: Annotated[
        str | None, typer.Option(help="A catalogue name, a model folder or a hub id. [default: smollm2-135m]")
    ] = None
    dataset: Annotated[
        str | None, typer.Option(help="A data set (NAME or NAME:ARGUMENT) or a file of records. [default: worldfacts]")
    ] = None
    edits: Annotated[int | None, typer.Option(help="How many facts to edit. [default: all of the data set]")] = None
    strict: Strict = None
    batch_size: Annotated[int | None, typer.Option(help="Facts solved together. [default: 10]")] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything random but the second moments' text. [default: 0]")
    ] = None
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, or auto: over all accelerators. [default: cpu]")
    ] = None
    dtype: Annotated[str | None, typer.Option(help="Type of the weights. [default: float32]")] = None
    preset: Annotated[
        str | None, typer.Option(help="The editor's preset. [default: the one named like the model, if there is one]")
    ] = None
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template", help="Put the model's chat template around every prompt (instruct models)."),
    ] = None
    corpus: Annotated[
        str | None, typer.Option(help="Text for the second moments: self, docs, hf:NAME or a file. [default: self]")
    ] = None
    corpus_tokens: Annotated[
        int | None,
        typer.Option(help="Length of that text, in tokens. [default: ten times the projection's input width]"),
    ] = None
    corpus_seed: Annotated[
        int | None, typer.Option(help="Seed of the text 'self', the same for every --seed. [default: 0]")
    ] = None
    evaluator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An evaluator; may be given several times. [default: counterfact and generation]",
        ),
    ] = None
    eval_every: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Measure all edits made so far again after every N facts. [default: only at the end]"
        ),
    ] = None
    eval_sample: Annotated[
        int | None, typer.Option(metavar="N", help="Facts measured at a checkpoint, of all ages. [default: all]")
    ] = None
    eval_text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text for the perplexity at checkpoints: docs, hf:NAME or a file. [default: text of the model itself]",
        ),
    ] = None
    eval_text_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of that text, from its start. [default: 2048]")
    ] = None

    def values(self) -> dict[str, Any]:
        """The options that were given, by the names of the fields of :class:`RunConfig`."""
        from editcore.settings.toml import run_values

        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return run_values({name: value for name, value in named.items() if value not in (None, [])})


@app.command()
@with_options(RunOptions)
def run(
    ctx: typer.Context,
    options: RunOptions,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file with these options and a table per plugin.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A hyperparameter of the editor, or NAME.KEY=VALUE of a plugin, evaluator or data set.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory. [default: runs/EDITOR-DATASET-TIME]")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the edited model as a normal model folder.")
    ] = None,
    save_dtype: SaveDtype = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out; begin it if there is none.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, and say what would be edited; load and write nothing.")
    ] = False,
) -> None:
    """Edit many facts, measure before and after, keep a record.

    Options given here override those of --config, which override the preset. Resume an interrupted run with
    --resume --out DIR.
    """
    plugins = loaded_plugins(ctx)

    from editcore._util.lock import LOCK_NAME, locked, refuse_held
    from editcore.interfaces.errors import EditcoreError, HParamsError, RunError
    from editcore.runs.early import check_run
    from editcore.runs.record import RunRecord
    from editcore.runs.resume import has_begun, is_finished, refuse_unlike
    from editcore.settings.toml import read_toml, run_values

    values = {**(run_values(read_toml(config)) if config else {}), **options.values()}
    if resume and out is None:
        raise HParamsError("--resume needs --out DIR, the directory of the run.")
    if out is not None:
        refuse_held(out)
    begun = RunRecord.read(out) if resume and out is not None and has_begun(out) else None
    resolved = _config(values, assignments or [], plugins, begun, resume=resume)
    if begun is not None and out is not None:
        refuse_unlike(begun, resolved, out)
        if is_finished(out):
            if (out / LOCK_NAME).exists():  # the process was killed after the last write, or is about to end
                with locked(out):
                    pass
            if save is not None:
                raise RunError(
                    f"The run in {out} is finished; --save {save} would write nothing. 'editctl pack' and 'editctl "
                    "apply --save' write its edited model."
                )
            typer.echo(f"The run in {out} is finished; there is nothing to resume.")
            return
    refuse_used_save(save, save_dtype)
    if begun is None:
        check_run(resolved, plugins)
    if dry_run:
        _say_what_would_be_done(resolved, plugins, begun=begun is not None)
        return

    from editcore.cli.console import TerminalProgress
    from editcore.figures.runs import draw_run
    from editcore.runs import job

    directory = out or job.default_directory(resolved)
    ours = resume or not has_begun(directory)
    try:
        result = job.run(
            resolved,
            directory,
            job.RunOptions(
                plugins=plugins,
                progress=TerminalProgress(),
                command=["editctl", *sys.argv[1:]],
                save=save,
                save_dtype=save_dtype,
                resume=resume,
                draw=draw_run,
            ),
        )
    except (EditcoreError, KeyboardInterrupt) as error:
        if ours:
            _say_how_to_go_on(directory, interrupted=isinstance(error, KeyboardInterrupt))
        raise
    show_result(result)
    if save is not None:
        typer.echo(f"Edited model: {save}")


def _config(
    values: dict[str, Any], assignments: list[str], plugins: Plugins, begun: RunRecord | None, *, resume: bool
) -> RunConfig:
    """The configuration of the run. If the run was begun earlier, options that were not given are taken from it."""
    from editcore.interfaces.errors import HParamsError
    from editcore.runs.config import RunConfig

    base = begun.config.model_dump() if begun else {}
    if "editor" not in {**base, **values}:
        if resume:
            raise HParamsError("There is no run in --out that could be resumed, and no --editor to begin one with.")
        installed = ", ".join(sorted(plugins.editors())) or "none"
        raise HParamsError(f"No editor was given. Installed: {installed}. Choose one with --editor.")
    editor = str({**base, **values}["editor"])
    wanted = settings_from(assignments, values.get("settings", {}), editor=editor)
    settings = {section: dict(known) for section, known in base.get("settings", {}).items()}
    for section, given in wanted.items():
        resolved = begun.settings.get(section, {}) if begun else {}
        settings.setdefault(section, {}).update(
            {name: value for name, value in given.items() if name not in resolved or resolved[name] != value}
        )
    return RunConfig.create({**base, **values, "settings": settings}, plugins)


def _say_what_would_be_done(config: RunConfig, plugins: Plugins, *, begun: bool) -> None:
    from editcore._util.words import counted
    from editcore.interfaces.errors import HParamsError
    from editcore.runs.facts import records_of

    if begun:
        raise HParamsError("--dry-run is for a new run; 'editctl ledger RUN show' says what a begun one has written.")
    records, notes = records_of(config, plugins)
    size = min(config.batch_size, plugins.editor(config.editor).capabilities.max_batch or config.batch_size)
    batches = math.ceil(len(records) / size)
    beside = f" with {', '.join(config.plugins)}" if config.plugins else ""
    typer.echo(
        f"{config.editor}{beside} would write {counted(len(records), 'fact')} of {config.dataset} into {config.model}, "
        f"in {batches} {'batch' if batches == 1 else 'batches'}. Nothing was written."
    )
    for note in notes:
        typer.echo(f"Note: {note}")


def _say_how_to_go_on(directory: Path, *, interrupted: bool) -> None:
    from editcore._util.lock import LOCK_NAME
    from editcore.runs.resume import has_begun, is_finished, resume_command

    if not has_begun(directory) or is_finished(directory):
        if interrupted:
            typer.echo("Interrupted before anything was written.", err=True)
        return
    if not (directory / LOCK_NAME).exists():  # otherwise another process works on it
        said = "Interrupted. " if interrupted else ""
        typer.echo(f"{said}What is written stays; go on with: {resume_command(directory)}", err=True)


def settings_from(assignments: list[str], base: dict[str, dict[str, Any]], *, editor: str) -> dict[str, dict[str, Any]]:
    """``--set`` values by section; a key without a dot belongs to the editor."""
    from editcore.settings.hparams import parse_assignment

    settings = {section: dict(values) for section, values in base.items()}
    for assignment in assignments:
        key, value = parse_assignment(assignment)
        section, dot, name = key.rpartition(".")
        settings.setdefault(section if dot else editor, {})[name] = value
    return settings


def show_result(result: RunResult) -> None:
    """Print the results of a finished run."""
    from editcore._util.words import counted, cut
    from editcore.cli.console import make_console, print_table
    from editcore.cli.measures_view import show_measures

    console = make_console()
    show_measures({"before": result.before, "after": result.after}, counted(result.edits, "edit"), result.edits)
    console.print()
    print_table(
        ("prompt", "edited to", "before", "after"),
        [
            (cut(s.prompt, keep="end"), cut(s.target_new), cut(_first_line(s.before)), cut(_first_line(s.after)))
            for s in result.samples
        ],
        title="What the model says",
        console=console,
    )
    console.print()
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items() if seconds >= 0.05)
    console.print(f"{result.seconds_per_edit:.2f} s per edit; seconds by stage: {stages}")
    console.print(f"Peak memory {result.peak_memory_bytes / 2**30:.2f} GiB")
    if result.rejections:
        print_table(
            ("edit", "prompt", "edited to", "by", "why"),
            [
                (
                    rejection.request.id,
                    cut(rejection.request.text, keep="end"),
                    cut(rejection.request.target_new),
                    rejection.by,
                    rejection.reason,
                )
                for _, rejection in result.rejections[:_MOST_REJECTIONS]
            ],
            title="Rejected",
            console=console,
        )
        more = len(result.rejections) > _MOST_REJECTIONS
        rest = f" The first {_MOST_REJECTIONS} are shown." if more else ""
        console.print(
            f"{counted(result.rejected, 'fact')} {'was' if result.rejected == 1 else 'were'} rejected; "
            f"{result.directory / 'batches.jsonl'} has the figures.{rest}"
        )
    for note in result.notes:
        console.print(f"Note: {note}")
    for tally in result.tallies:
        console.print(tally.sentence())
    if (curve := result.directory / "figures" / "forgetting_curve.png").exists():
        console.print(f"Checkpoints: editctl forgetting {shlex.quote(str(result.directory))}; their picture is {curve}")
    console.print(f"Everything is in {result.directory}; the picture is {result.directory / 'figures' / 'summary.png'}")
    console.print(f"A page about it: {shlex.join(['editctl', 'report', str(result.directory)])}")


def _first_line(text: str) -> str:
    return " ".join(text.split())
