"""``editctl init``, ``status``, ``log`` and ``check``: a run directory that takes edits day after day."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import AsJson, RunDevice, with_options
from editcore.cli.run import RunOptions, settings_from

if TYPE_CHECKING:
    from editcore.interfaces.history import Signature
    from editcore.runs.check_record import CheckRecord
    from editcore.runs.overview import Event

__all__ = ["check_app", "init_app", "log_app", "status_app"]

init_app, status_app, log_app, check_app = typer.Typer(), typer.Typer(), typer.Typer(), typer.Typer()

_OF_A_RUN = ("dataset", "edits", "strict", "eval_every", "eval_sample", "eval_text", "eval_text_tokens")
"""Options that are about the facts of a run."""
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]
_SHOWN = 10
"""Most facts and answers of a kind that a check lists; --json has all."""


@init_app.command()
@with_options(RunOptions, without=_OF_A_RUN)
def init(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to make.")],
    options: RunOptions,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A hyperparameter of the editor, or NAME.KEY=VALUE of a plugin."
        ),
    ] = None,
) -> None:
    """Begin a directory for edits of a model, without an edit.

    It has the settings, the second moments and what the editor learns from the unedited model. 'editctl edit DIR' then
    writes facts into it.
    """
    from editcore.runs.config import RunConfig
    from editcore.runs.early import check_session
    from editcore.runs.resolved import default_editor
    from editcore.runs.resume import refuse_used

    plugins = loaded_plugins(ctx)
    refuse_used(directory)
    values = options.values()
    model = str(values.get("model", RunConfig.model_fields["model"].default))
    editor = str(values.get("editor") or default_editor(plugins, model))
    settings = settings_from(assignments or [], {}, editor=editor)
    config = RunConfig.create({**values, "editor": editor, "dataset": str(directory), "settings": settings}, plugins)
    check_session(plugins, config.model, config)

    from editcore.cli.console import TerminalProgress
    from editcore.runs.begin import begin

    begin(config, directory, plugins=plugins, progress=TerminalProgress(), command=["editctl", *sys.argv[1:]])
    typer.echo(f"{directory} takes edits of {config.model} by {config.method}: editctl edit {directory} --help")


@status_app.command()
def status(ctx: typer.Context, directory: Directory, as_json: AsJson = False) -> None:
    """Say what a directory's model was told, how much its weights changed, and what the last check found."""
    from editcore._util.memory import uncollected
    from editcore._util.words import counted
    from editcore.cli.console import print_json, print_table
    from editcore.ledger.ledger import Ledger
    from editcore.runs.check_record import perplexity_in_words
    from editcore.runs.overview import overview
    from editcore.runs.record import RunRecord

    record = RunRecord.read(directory)
    with uncollected():
        found = overview(directory, record, Ledger.read(directory))
    if as_json:
        print_json(
            {
                "model": record.config.model,
                "fingerprint": record.model.fingerprint,
                "method": record.config.method,
                "backend": record.config.backend,
                "facts": found.facts,
                "batches": found.batches,
                "undone": found.undone,
                "rejected": found.rejected,
                "relative_change": found.relative_change,
                "last": None if found.last is None else _event_json(found.last),
                "check": None if found.check is None else found.check.model_dump(mode="json"),
            }
        )
        return
    rows = [
        ("model", f"{record.config.model} ({record.model.fingerprint[:12]})"),
        ("method", record.config.method),
        (
            "facts",
            f"{found.facts} active, in {counted(found.batches, 'batch', 'batches')}; {found.undone} undone, "
            f"{found.rejected} rejected",
        ),
    ]
    if found.last is not None:
        rows.append(("last change", f"{found.last.what} {_facts_in_words(found.last)}{_by(found.last.signature)}"))
    if found.relative_change is None:
        rows.append(("size of the change", f"not measured since the last change; 'editctl check {directory}' does"))
    for address, share in (found.relative_change or {}).items():
        rows.append((f"change of {address}", f"{100 * share:.2f} % of the weight's norm"))
    if found.check is None:
        rows.append(("check", f"never; 'editctl check {directory}' asks all facts again"))
    else:
        check, behind = found.check, found.changes_since_check
        since = "" if behind <= 0 else f"; {counted(behind, 'change')} since"
        rows.append(
            (
                "check",
                f"{check.time[:10]}: {check.facts - len(check.lost)} of {check.facts} facts said, "
                f"{check.neighbours_moved:.0f} % of neighbours moved, text "
                f"{perplexity_in_words(check.perplexity_ratio)} (perplexity × {check.perplexity_ratio:.3f}){since}",
            )
        )
    print_table(("", str(directory)), rows)


@log_app.command()
def log(ctx: typer.Context, directory: Directory, as_json: AsJson = False) -> None:
    """Say who wrote or undid what, when, and why."""
    from editcore.cli.console import print_json, print_table
    from editcore.ledger.ledger import Ledger
    from editcore.runs.overview import events_of
    from editcore.runs.record import RunRecord

    record = RunRecord.read(directory)
    events = list(events_of(Ledger.read(directory)))
    if as_json:
        print_json([_event_json(event) for event in events])
        return
    rows = []
    for event in events:
        signature = event.signature
        when = (record.started or "") if signature is None else signature.time
        rows.append(
            (
                when[:16].replace("T", " "),
                "the run" if signature is None else signature.author,
                event.what if event.batch is None else f"{event.what} batch {event.batch}",
                _facts_in_words(event),
                "" if signature is None else signature.note,
            )
        )
    print_table(("when (UTC)", "who", "what", "facts", "why"), rows)


@check_app.command()
def check(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR|PACK", help="A run directory, or a pack of edits.")],
    model: Annotated[
        str | None, typer.Option(help="The base model of a pack. [default: the one that it names]")
    ] = None,
    min_said: Annotated[float, typer.Option(metavar="PERCENT", help="Facts that must be said.")] = 95.0,
    max_perplexity: Annotated[float, typer.Option(metavar="RATIO", help="Most that perplexity may grow.")] = 1.05,
    max_moved: Annotated[float, typer.Option(metavar="PERCENT", help="Neighbours that may move.")] = 5.0,
    neighbours: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts about other subjects to ask.")] = 100,
    text: Annotated[str, typer.Option(help="Text for the perplexity: docs, self, hf:NAME or a file.")] = "docs",
    text_tokens: Annotated[int, typer.Option(min=256, metavar="N", help="Tokens of that text.")] = 2048,
    device: RunDevice = None,
    as_json: AsJson = False,
) -> None:
    """Ask an edited model again: its facts, other subjects, and a text. The exit code is 1 if a limit is passed."""
    from editcore.interfaces.errors import HParamsError
    from editcore.runs.check_record import CheckLimits
    from editcore.runs.pack_file import read_manifest
    from editcore.runs.record import RunRecord
    from editcore.second_moments.corpora import open_corpus

    open_corpus(text)
    manifest = read_manifest(directory) if directory.is_file() else None
    if manifest is None:
        RunRecord.read(directory)
        if model is not None:
            raise HParamsError("--model is for a pack; a run directory knows its model.")

    from editcore.cli.console import TerminalProgress, print_json
    from editcore.runs.checking import CheckOptions, check_pack, check_unwritable
    from editcore.runs.workspace import workspace

    options, progress = CheckOptions(neighbours=neighbours, text=text, text_tokens=text_tokens), TerminalProgress()
    plugins = loaded_plugins(ctx)
    if manifest is not None:
        found = check_pack(
            directory, model or manifest.model, options, plugins=plugins, device=device, progress=progress
        )
    elif os.access(directory, os.W_OK):
        with workspace(directory, device=device, plugins=plugins, progress=progress) as opened:
            found = opened.check(options)
    else:
        typer.echo(f"Note: {directory} cannot be written, so what is found is not kept.", err=True)
        found = check_unwritable(directory, options, plugins=plugins, device=device, progress=progress)
    passed = list(
        found.passed_limits(CheckLimits(min_said=min_said, max_perplexity=max_perplexity, max_moved=max_moved))
    )
    if as_json:
        print_json(
            {
                **found.model_dump(mode="json"),
                "said": found.said,
                "neighbours_moved": found.neighbours_moved,
                "passed_limits": passed,
            }
        )
    else:
        _show_check(found)
        for sentence in passed:
            typer.echo(sentence)
    if passed:
        raise typer.Exit(1)


def _show_check(found: CheckRecord) -> None:
    from editcore.cli.console import print_table
    from editcore.runs.check_record import perplexity_in_words

    said = found.facts - len(found.lost)
    print_table(
        ("asked", "found"),
        [
            ("facts", f"{said} of {found.facts} are said"),
            ("other subjects", f"{len(found.moved)} of {found.neighbours} answers moved"),
            ("the edited subjects, otherwise", f"{len(found.subjects_moved)} of {found.subjects} answers moved"),
            (
                f"text ({found.text}, {found.tokens} tokens)",
                f"{perplexity_in_words(found.perplexity_ratio)}: perplexity × {found.perplexity_ratio:.3f}",
            ),
        ],
    )
    if found.lost:
        print_table(
            ("prompt", "edited to", "probability", "says", ""),
            [
                (
                    fact.prompt,
                    fact.target_new,
                    f"{fact.probability:.2g}",
                    _one_line(fact.said),
                    "said later in the answer" if fact.in_answer else "",
                )
                for fact in found.lost[:_SHOWN]
            ],
            title=_title("Facts that are not said", len(found.lost)),
            right=("probability",),
        )
    for title, answers in (
        ("Answers about other subjects that moved", found.moved),
        ("Answers about the edited subjects that moved", found.subjects_moved),
        ("Longer answers", found.samples),
    ):
        if answers:
            rows = [(answer.prompt, _one_line(answer.before), _one_line(answer.after)) for answer in answers[:_SHOWN]]
            print_table(("prompt", "before", "after"), rows, title=_title(title, len(answers)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _title(what: str, count: int) -> str:
    return what if count <= _SHOWN else f"{what}, {_SHOWN} of {count}"


def _facts_in_words(event: Event) -> str:
    """The first facts of an event, and how many more."""
    named = [f"{request.text} → {request.target_new}" for request in event.requests[:2]]
    if len(event.requests) > len(named):
        named.append(f"{len(event.requests) - len(named)} more")
    if event.rejected:
        named.append(f"{event.rejected} rejected")
    return "; ".join(named)


def _by(signature: Signature | None) -> str:
    return "" if signature is None else f" ({signature.author}, {signature.day})"


def _event_json(event: Event) -> dict[str, Any]:
    signature = event.signature
    return {
        "what": event.what,
        "batch": event.batch,
        "edits": [
            {"id": request.id, "prompt": request.text, "target_new": request.target_new} for request in event.requests
        ],
        "rejected": event.rejected,
        **({} if signature is None else {field.name: getattr(signature, field.name) for field in fields(signature)}),
    }
