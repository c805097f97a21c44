"""``editctl ledger``: shows the edits of a run, explains them, and takes them back."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.ledger_diff import diff
from editcore.cli.options import AsJson, RunDevice, with_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from editcore.ledger.ledger import Ledger
    from editcore.ledger.states import Edit

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

Ids = Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Ids of edits; 'show --edits' lists them.")]
Batches = Annotated[list[int] | None, typer.Option("--batch", metavar="N", help="All edits of a batch.")]


class OnConflict(StrEnum):
    """What to do about a fact with two targets."""

    error = "error"
    first = "first"
    last = "last"


@app.callback()
def ledger(
    ctx: typer.Context, directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
) -> None:
    """List, check, undo and compare the edits of a run, and find the edits behind an answer."""
    ctx.meta["run"] = directory


@app.command()
def show(
    ctx: typer.Context,
    edits: Annotated[bool, typer.Option("--edits", help="A line per edit instead of one per batch.")] = False,
    as_json: AsJson = False,
) -> None:
    """List batches or edits, and which of them are active."""
    from editcore.cli.console import print_json, print_table
    from editcore.ledger.ledger import Ledger

    found = Ledger.read(_run(ctx))
    if as_json:
        print_json(list(_edit_rows(found) if edits else _batch_rows(found)))
        return
    active = len(found.facts())
    header = f"{found.header.model}, {found.header.editor}; " if found.header else ""
    title = f"{header}batches: {len(found.batches)}, active facts: {active}"
    if edits:
        rows = [(row["id"], row["batch"], row["state"], row["prompt"], row["target_new"]) for row in _edit_rows(found)]
        print_table(("edit", "batch", "state", "prompt", "edited to"), rows, title=title, right=("batch",))
    else:
        columns = ("batch", "state", "new", "rejected", "undone", "replayed", "scale", "reason")
        table = [tuple(row[name] for name in columns) for row in _batch_rows(found)]
        print_table(columns, table, title=title, right=columns[:1] + columns[2:7])
    rejected = [
        (
            rejection.request.id,
            entry.batch,
            rejection.request.text,
            rejection.request.target_new,
            rejection.by,
            rejection.reason,
        )
        for entry in found.batches
        for rejection in entry.all_rejected
    ]
    if rejected:
        print_table(("edit", "batch", "prompt", "edited to", "by", "why"), rejected, title="Rejected", right=("batch",))
    if found.note:
        typer.echo(f"Note: {found.note}")


@app.command()
def verify(ctx: typer.Context) -> None:
    """Check every line and every tensor file against its hash."""
    from editcore.cli.console import TerminalProgress
    from editcore.ledger.verify import verify as check

    found = check(_run(ctx), progress=TerminalProgress())
    for note in found.notes:
        typer.echo(f"Note: {note}")
    for problem in found.problems:
        typer.echo(problem)
    if found.problems:
        typer.echo(f"{_run(ctx)}: {len(found.problems)} problems in {found.lines} lines and {found.files} files.")
        raise typer.Exit(2)
    typer.echo(f"{_run(ctx)}: {found.lines} lines and {found.files} files are as they were written.")


app.command()(diff)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meant:
    """The options that say which edits are meant, who changes them, and why."""

    batches: Batches = None
    subject: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="All edits about a subject; may be given several times.")
    ] = None
    since: Annotated[
        str | None,
        typer.Option(metavar="DATE", help="All edits that 'editctl edit' wrote on that day (UTC) or later."),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(metavar="FACTS", help="The facts in a .jsonl, .json, .csv, .tsv or .md file, or in - (input)."),
    ] = None
    note: Annotated[str, typer.Option(metavar="TEXT", help="Why, for 'editctl log RUN'.")] = ""
    author: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who, for 'editctl log RUN'. [default: your user name]")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False


@app.command()
@with_options(_Meant)
def undo(
    ctx: typer.Context,
    options: _Meant,
    edits: Ids = None,
    as_if_never: Annotated[
        bool,
        typer.Option(
            "--as-if-never",
            help="Solve later batches again, for the keys and values that they have: as if the edits had never been "
            "solved. [default: later batches stay as they were solved]",
        ),
    ] = False,
) -> None:
    """Undo edits: their changes are left out of the model.

    A batch that keeps some of its edits is solved again without the others; later batches stay as they were solved,
    unless --as-if-never is given.
    """
    _change(ctx, "undo", edits or [], options, as_if_never=as_if_never)


@app.command()
@with_options(_Meant)
def redo(ctx: typer.Context, options: _Meant, edits: Ids = None) -> None:
    """Redo edits that were undone."""
    _change(ctx, "redo", edits or [], options)


@app.command()
def bisect(
    ctx: typer.Context,
    failing: Annotated[str, typer.Option(metavar="PROMPT", help="A prompt whose answer went wrong.")],
    expect: Annotated[str, typer.Option(metavar="TEXT", help="How the answer should begin.")],
    device: RunDevice = None,
) -> None:
    """Find the batch after which an answer changed."""
    from editcore.runs.record import RunRecord

    RunRecord.read(_run(ctx))

    from editcore.cli.console import TerminalProgress, print_table
    from editcore.ledger.bisect import bisect as search
    from editcore.runs.reopening import open_run

    edited, found = open_run(_run(ctx), device=device, plugins=loaded_plugins(ctx), progress=TerminalProgress())
    place = search(edited, found.history(), failing, expect)
    print_table(
        ("model", "text"),
        [("without it", failing + place.before), ("with it", failing + place.after)],
        title=f"Batch {place.entry.batch}; {place.tried} models asked",
    )
    rows = [(request.id, request.text, request.target_new) for request in place.entry.new_requests]
    print_table(("edit", "prompt", "edited to"), rows, title="What it wrote")


@app.command()
def blame(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="A text that the model continues.")],
    answer: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Its first token is scored. [default: what the model says]")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Edits to show.")] = 10,
    device: RunDevice = None,
    as_json: AsJson = False,
) -> None:
    """Rank edits by what they add to the logit of an answer."""
    from editcore.runs.record import RunRecord

    RunRecord.read(_run(ctx))

    from editcore.cli.console import TerminalProgress, print_json, print_table
    from editcore.ledger.blame import blame as rank
    from editcore.runs.reopening import open_run

    progress = TerminalProgress()
    edited, found = open_run(_run(ctx), device=device, plugins=loaded_plugins(ctx), progress=progress)
    blamed = rank(edited, found.history(), prompt, answer=answer, progress=progress)
    rows = [
        {
            "edit": ", ".join(request.id for request in contribution.requests),
            "batches": list(contribution.batches),
            "logit": contribution.logit,
            "log_probability": contribution.log_probability,
            "prompt": "; ".join(request.text for request in contribution.requests),
            "target_new": "; ".join(request.target_new for request in contribution.requests),
        }
        for contribution in blamed.contributions
    ]
    if as_json:
        print_json({"token": blamed.token, "probability": blamed.probability, "edits": rows})
        return
    print_table(
        ("edit", "batches", "logit", "log p", "prompt", "edited to"),
        [
            (
                row["edit"],
                ", ".join(map(str, contribution.batches)),
                f"{contribution.logit:+.3f}",
                f"{contribution.log_probability:+.3f}",
                row["prompt"],
                row["target_new"],
            )
            for row, contribution in zip(rows[:top], blamed.contributions, strict=False)
        ],
        title=f"What each edit adds to {blamed.token!r} (p = {blamed.probability:.3f}) after '{prompt}'",
        right=("logit", "log p"),
    )


@app.command()
def compose(
    ctx: typer.Context,
    others: Annotated[list[Path], typer.Argument(metavar="RUN...", help="More runs on the same base model.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run directory to write.")],
    on_conflict: Annotated[
        OnConflict, typer.Option(help="What to do about a fact with two targets: refuse, or keep one.")
    ] = OnConflict.error,
) -> None:
    """Join the edits of several runs and solve them together."""
    from editcore._util.words import counted
    from editcore.runs.record import RunRecord

    for directory in (_run(ctx), *others):
        RunRecord.read(directory)

    from editcore.cli.console import TerminalProgress, print_table
    from editcore.runs.compose import compose as join

    made = join(
        [_run(ctx), *others],
        out,
        on_conflict=on_conflict.value,
        plugins=loaded_plugins(ctx),
        progress=TerminalProgress(),
        command=["editctl", *sys.argv[1:]],
    )
    if made.conflicts:
        print_table(
            ("prompt", "asked", "kept"),
            [
                (
                    conflict.kept.text,
                    ", ".join(f"{request.target_new} ({run})" for run, request in conflict.asked),
                    conflict.kept.target_new,
                )
                for conflict in made.conflicts
            ],
            title=f"{counted(len(made.conflicts), 'fact')} had two targets",
        )
    for note in made.notes:
        typer.echo(f"Note: {note}")
    are = "is" if made.edits == 1 else "are"
    typer.echo(f"{counted(made.edits, 'edit')} of {1 + len(others)} runs {are} in {made.directory}.")


def _run(ctx: typer.Context) -> Path:
    directory: Path = ctx.meta["run"]
    return directory


def _change(
    ctx: typer.Context,
    kind: Literal["undo", "redo"],
    edits: list[str],
    options: _Meant,
    *,
    as_if_never: bool = False,
) -> None:
    """Change the ledger alone. The model is loaded only if a batch must be solved again."""
    from editcore._util.lock import locked
    from editcore.cli.console import TerminalProgress, print_table
    from editcore.ledger.ledger import Ledger
    from editcore.ledger.undo import requests_of
    from editcore.runs.record import RunRecord
    from editcore.runs.workspace import Workspace, signed

    directory = _run(ctx)
    RunRecord.read(directory)
    if options.dry_run:
        found = Ledger.read(directory)
        meant = _meant(ctx, found, kind, edits, options)
        again = found.unsolved(found.state_after(kind, meant, as_if_never=as_if_never))
        changed, title = requests_of(found, meant), "Would be undone" if kind == "undo" else "Would be active again"
        last = f"Batches that would be solved again: {', '.join(map(str, again)) or 'none'}. Nothing was changed."
    else:
        with locked(directory):
            opened = Workspace(directory, device=None, plugins=loaded_plugins(ctx), progress=TerminalProgress())
            meant = _meant(ctx, opened.ledger, kind, edits, options)
            signature = signed(options.note, options.author)
            changed = opened.change(kind, meant, signature, as_if_never=as_if_never)
        title = "Undone" if kind == "undo" else "Active again"
        last = f"Active facts: {len(opened.ledger.facts())}."
    rows = [(request.id, request.text, request.target_new) for request in changed]
    print_table(("edit", "prompt", "edited to"), rows, title=title)
    typer.echo(last)


def _meant(
    ctx: typer.Context, found: Ledger, kind: Literal["undo", "redo"], edits: list[str], options: _Meant
) -> tuple[Edit, ...]:
    """The edits that arguments and options name, and whose state would change."""
    from editcore.datasets import load_records
    from editcore.ledger.finding import edits_of_facts, edits_of_subject, edits_since, moment
    from editcore.ledger.undo import changing, edits_named

    meant = [*edits_named(found, edits, options.batches or [])]
    for subject in options.subject or []:
        meant += edits_of_subject(found, subject)
    if options.since is not None:
        meant += edits_since(found, moment(options.since))
    if options.file is not None:
        records = load_records(options.file, plugins=loaded_plugins(ctx))
        meant += edits_of_facts(found, [record.request for record in records])
    return changing(found, kind, meant)


def _batch_rows(found: Ledger) -> Iterator[dict[str, object]]:
    for entry in found.batches:
        yield {
            "batch": entry.batch,
            "state": found.state(entry),
            "new": entry.num_new,
            "rejected": len(entry.all_rejected),
            "undone": len(found.undone(entry.batch)),
            "replayed": len(entry.requests) - entry.num_new,
            "scale": entry.scale,
            "reason": entry.reason,
        }


def _edit_rows(found: Ledger) -> Iterator[dict[str, object]]:
    states = found.states()
    for entry in found.batches:
        for request in entry.new_requests:
            yield {
                "id": request.id,
                "batch": entry.batch,
                "state": states[entry.batch, request.id],
                "prompt": request.text,
                "target_new": request.target_new,
                "reason": "" if entry.applied else entry.reason,
            }
        for rejection in entry.rejected:
            yield {
                "id": rejection.request.id,
                "batch": entry.batch,
                "state": "rejected",
                "prompt": rejection.request.text,
                "target_new": rejection.request.target_new,
                "reason": f"{rejection.by}: {rejection.reason}",
            }
