"""``editctl edit``: writes facts into a directory, or tries one on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import (
    ChatTemplate,
    Corpus,
    CorpusSeed,
    Device,
    Dtype,
    ModelOption,
    Save,
    SaveDtype,
    options_given,
    refuse_used_save,
    with_options,
)

if TYPE_CHECKING:
    from editcore.interfaces.values import EditRequest, FactRecord
    from editcore.runs.batches import BatchResult
    from editcore.runs.planned_edit import PlannedEdit
    from editcore.runs.record import RunRecord

__all__ = ["WriteOptions", "app", "write_into"]

app = typer.Typer()

_OF_A_DIRECTORY = (
    "editor", "model", "dtype", "preset", "chat_template", "corpus", "corpus_seed", "seed", "assignments", "tokens",
    "save", "save_dtype",
)  # fmt: skip
"""Parameters that a directory decides, or that it has no use for."""
_WITHOUT_A_DIRECTORY = ("facts", "note", "author", "again", "dry_run")
"""Parameters that need a directory."""
_SHOWN = 20
"""Most facts that a table lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How facts are written into a directory."""

    note: Annotated[str, typer.Option(metavar="TEXT", help="Why, for 'editctl log DIR'.")] = ""
    author: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who, for 'editctl log DIR'. [default: your user name]")
    ] = None
    again: Annotated[
        bool, typer.Option("--again", help="Write facts into DIR that are active with the same target already.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written into DIR, and load and write nothing.")
    ] = False


@app.command()
@with_options(WriteOptions)
def edit(
    ctx: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="A run directory that keeps the facts, of 'editctl run' or 'editctl init'. [default: nothing is kept]",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A sentence opening with {} for the subject: '{} is a city in'.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Text that should follow the prompt.")] = None,
    join: Annotated[
        str | None,
        typer.Option(
            help="Text between the prompt and the target. [default: a space, and nothing behind white space, "
            "opening quotes and brackets, and scripts without spaces]"
        ),
    ] = None,
    subject: Annotated[
        str, typer.Option(help="The entity that {} stands for. [default: none, for editors that need none]")
    ] = "",
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Facts to write into DIR: a .jsonl, .json, .csv, .tsv or .md file, or - for standard input.",
        ),
    ] = None,
    options: WriteOptions = WriteOptions(),
    editor: Annotated[
        str | None, typer.Option(help="The editing method. [default: a preferred one with a preset for the model]")
    ] = None,
    model: ModelOption = "smollm2-135m",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    preset: Annotated[str | None, typer.Option(help="The editor's preset.")] = None,
    chat_template: ChatTemplate = False,
    corpus: Corpus = "self",
    corpus_seed: CorpusSeed = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything random but the second moments' text.")] = 0,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter of the editor.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to show.")] = 20,
    save: Save = None,
    save_dtype: SaveDtype = None,
) -> None:
    """Write facts into a directory, or try one on a model.

    With DIR, facts are kept there, with its model, its editor and its settings. Without DIR, one fact is written into a
    model in memory, and its answers before and after are shown.
    """
    from editcore.interfaces.errors import HParamsError
    from editcore.interfaces.values import FactRecord
    from editcore.runs.record import RunRecord

    kept, quick = (options_given(ctx, names) for names in (_OF_A_DIRECTORY, _WITHOUT_A_DIRECTORY))
    if directory is not None and kept:
        raise HParamsError(
            f"{', '.join(kept)}: {directory} has its own model and settings, and keeps what is written. Leave it out."
        )
    if directory is None and quick:
        raise HParamsError(f"{', '.join(quick)}: this is for a directory. 'editctl init DIR' makes one.")
    fact = [] if facts is not None and subject == "" and prompt is None and target is None else [(prompt, target)]
    if facts is not None and fact:
        raise HParamsError("--facts FILE and a fact on the command line were both given; give one of them.")
    requests = [_request(subject, text, object_, join) for text, object_ in fact]
    if directory is not None:
        RunRecord.read(directory)  # an error here is told before one in the facts
        records = [FactRecord(request=request) for request in requests] if facts is None else _records(ctx, facts)
        write_into(ctx, directory, records, options, device=device if options_given(ctx, ["device"]) else None)
        return
    (request,) = requests

    from editcore.cli.run import settings_from
    from editcore.runs.config import SessionConfig
    from editcore.runs.early import check_session
    from editcore.runs.fit import check_savable, check_subjects, with_needed_parts
    from editcore.runs.resolved import default_editor, editor_settings

    refuse_used_save(save, save_dtype)
    plugins = loaded_plugins(ctx)
    editor = editor or default_editor(plugins, model)
    config = SessionConfig.create(
        {
            "editor": editor,
            "preset": preset,
            "settings": settings_from(assignments or [], {}, editor=editor),
            "corpus": corpus,
            "corpus_seed": corpus_seed,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "chat_template": chat_template,
        }
    )
    check_subjects([request], plugins.editor(editor), editor_settings(plugins, config, model))
    if save is not None:
        check_savable(plugins, editor, with_needed_parts(plugins, editor, (), None)[1])
    check_session(plugins, model, config)

    from editcore.cli.console import TerminalProgress, print_table
    from editcore.runs.session import EditSession

    session = EditSession.open(model, config, registry=plugins, progress=TerminalProgress())
    before = session.generate([request.text], max_new_tokens=tokens)[0]
    (result,) = session.edit([request])
    after = session.generate([request.text], max_new_tokens=tokens)[0]
    (evidence, *_) = result.proposal.evidence
    shown = session.model.prompt_form.shown
    print_table(("", "text"), [("before", shown(request.text, before)), ("after", shown(request.text, after))])
    names = ("steps", "target_probability", "said_probability")
    steps, found, said = (evidence.figures.get(name) for name in names)
    typer.echo(
        f"\n{result.seconds:.1f} s"
        + (f", {steps:.0f} steps" if steps else "")
        + (f"; probability of '{request.target_new}' when its optimisation ended: {found:.2f}" if found else "")
        + (f"; after the prompt, as the model is now: {said:.2f}" if said is not None else "")
    )
    for text in filter(None, [*result.proposal.notes, result.not_said]):
        typer.echo(f"Note: {text}")
    if save is not None:
        session.save(save, dtype=save_dtype)
        typer.echo(f"Edited model: {save}")


def _request(subject: str, prompt: str | None, target: str | None, join: str | None) -> EditRequest:
    from editcore.interfaces.errors import HParamsError
    from editcore.interfaces.values import EditRequest

    if prompt is None or target is None:
        missing = "--prompt" if prompt is None else "--target"
        raise HParamsError(
            f"{missing} is missing. A fact has --prompt and --target, and most editors need --subject; "
            "'editctl edit DIR --facts FILE' reads facts from a file."
        )
    return EditRequest.create(subject=subject, prompt=prompt, target_new=target, join=join)


def write_into(
    ctx: typer.Context,
    directory: Path,
    records: Sequence[FactRecord],
    options: WriteOptions,
    *,
    device: str | None = None,
) -> None:
    """Write facts into a directory, and say what was written; or, for a dry run, what would be."""
    from editcore.ledger.ledger import Ledger
    from editcore.runs.facts import recorded_editor
    from editcore.runs.fit import check_subjects
    from editcore.runs.planned_edit import plan_edit
    from editcore.runs.record import RunRecord
    from editcore.runs.resume import refuse_unfinished
    from editcore.runs.workspace import signed, workspace

    plugins = loaded_plugins(ctx)
    record = RunRecord.read(directory)
    refuse_unfinished(directory, record)
    check_subjects([fact.request for fact in records], *recorded_editor(plugins, record))
    planned = plan_edit(Ledger.read(directory), records, again=options.again)
    _show_plan(planned, record, directory, dry_run=options.dry_run)
    if options.dry_run or not planned.records:
        return
    signature = signed(options.note, options.author)

    from editcore.cli.console import TerminalProgress

    with workspace(directory, device=device, plugins=plugins, progress=TerminalProgress()) as opened:
        planned = opened.plan(records, again=options.again)  # another process may have written meanwhile
        results = opened.write(planned, signature)
        active = len(opened.ledger.facts())
    _show_results(results)
    typer.echo(f"Active facts: {active}. 'editctl check {directory}' asks all of them again.")


def _records(ctx: typer.Context, facts: Path) -> list[FactRecord]:
    from editcore.datasets import load_records

    notes: list[str] = []
    records = load_records(facts, plugins=loaded_plugins(ctx), notes=notes)
    for text in notes:
        typer.echo(f"Note: {text}")
    return records


def _show_plan(planned: PlannedEdit, record: RunRecord, directory: Path, *, dry_run: bool) -> None:
    """What is about to be written, and which active facts it concerns."""
    from editcore._util.words import counted
    from editcore.cli.console import print_table
    from editcore.runs.log import read_batches
    from editcore.runs.outcome import seconds_per_edit

    if planned.active_already:
        facts = counted(len(planned.active_already), "fact")
        be, it = ("is", "is") if len(planned.active_already) == 1 else ("are", "are")
        typer.echo(f"{facts} {be} active already and {it} not written again (--again writes it).")
    if dry_run and planned.records:
        config = record.config
        each = seconds_per_edit(read_batches(directory))
        takes = f", in about {max(1, round(each * len(planned.records)))} s beside loading the model" if each else ""
        typer.echo(
            f"{config.method} would write {counted(len(planned.records), 'fact')} into {config.model}, "
            f"{config.batch_size} at a time{takes}. Nothing was loaded or written."
        )
    if planned.corrections:
        print_table(
            ("prompt", "now", "corrected to"),
            [(old.text, old.target_new, new.target_new) for old, new in planned.corrections[:_SHOWN]],
            title="Corrections of active facts",
        )
    if planned.same_subject:
        print_table(
            ("new", "active"),
            [
                (
                    f"{new.text} → {new.target_new}",
                    "; ".join(f"{request.text} → {request.target_new}" for request in others),
                )
                for new, others in planned.same_subject[:_SHOWN]
            ],
            title="Active facts about the same subjects",
        )


def _show_results(results: Sequence[BatchResult]) -> None:
    from editcore.cli.console import print_table

    rows = []
    for result in results:
        said = {evidence.request_id: evidence.figures.get("said_probability") for evidence in result.proposal.evidence}
        for request in result.batch.new_requests:
            probability = said.get(request.id)
            shown = "" if probability is None else f"{probability:.2f}"
            state = "written" if result.applied else f"rejected: {result.reason}"
            rows.append((request.id, request.text, request.target_new, shown, state))
        rows += [
            (left.request.id, left.request.text, left.request.target_new, "", f"rejected: {left.reason}")
            for left in result.rejected
        ]
    print_table(
        ("edit", "prompt", "edited to", "probability", "state"),
        rows[:_SHOWN],
        title=None if len(rows) <= _SHOWN else f"{_SHOWN} of {len(rows)} facts",
        right=("probability",),
    )
    for result in results:
        for text in filter(None, [*result.proposal.notes, result.not_said]):
            typer.echo(f"Note: {text}")
