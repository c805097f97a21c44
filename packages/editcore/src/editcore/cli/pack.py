"""``editctl pack`` and ``editctl apply``: write a set of edits as one file, and apply it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.edit import WriteOptions, write_into
from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import Device, Save, SaveDtype, options_given, refuse_used_save, with_options

if TYPE_CHECKING:
    from editcore.interfaces.values import EditRequest

__all__ = ["apply_app", "pack_app"]

pack_app = typer.Typer()
apply_app = typer.Typer()

_MOST_FACTS = 10
"""Most facts of a pack that are listed."""


@pack_app.command()
def pack(
    ctx: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="RUN FILE", help="A run directory, and the file to write, such as facts.editpack."),
    ],
    listed: Annotated[bool, typer.Option("--list", help="Say what is in FILE, and write nothing.")] = False,
) -> None:
    """Put the active edits of a run into one file, or list what is in one (--list FILE)."""
    from editcore._util.words import counted
    from editcore.interfaces.errors import HParamsError
    from editcore.runs.record import RunRecord

    if len(paths) != (1 if listed else 2):
        raise HParamsError(
            f"{counted(len(paths), 'path')} given; 'editctl pack RUN FILE' takes two, 'editctl pack --list FILE' one."
        )
    if listed:
        _describe(paths[0])
        return
    directory, file = paths
    RunRecord.read(directory)  # an error is found before torch is imported

    from editcore.runs.pack import write_pack

    made = write_pack(directory, file, loaded_plugins(ctx))
    size = file.stat().st_size / 1e6
    typer.echo(f"{counted(len(made.requests), 'edit')} of {made.manifest.model} in {file} ({size:.1f} MB).")
    _list_facts(made.requests)


def _describe(file: Path) -> None:
    """Everything that a reviewer of a pack reads: its base, its method and every fact."""
    from editcore._util.words import counted
    from editcore.runs.pack_file import read_manifest

    manifest = read_manifest(file)
    requests = manifest.requests
    typer.echo(
        f"{counted(len(requests), 'edit')} of {manifest.model} ({manifest.fingerprint[:12]}) by {manifest.editor}, in "
        f"{counted(len(manifest.batches), 'batch', 'batches')}; {file.stat().st_size / 1e6:.1f} MB."
    )
    _list_facts(requests, most=len(requests))


def _list_facts(requests: Sequence[EditRequest], *, most: int = _MOST_FACTS) -> None:
    """List the first facts, a line each, and say how many more there are."""
    from editcore._util.words import cut

    for request in requests[:most]:
        typer.echo(f"  {cut(request.text, keep='end')} → {cut(request.target_new)}")
    if (more := len(requests) - most) > 0:
        typer.echo(f"  and {more:,} more")


@apply_app.command()
@with_options(WriteOptions)
def apply(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that 'editctl pack' wrote.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to continue.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A catalogue name, a model folder or a hub id. [default: the pack's]")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the facts into a run directory, with its editor and settings, as 'editctl edit' does.",
        ),
    ] = None,
    options: WriteOptions = WriteOptions(),  # noqa: B008  frozen
    force: Annotated[bool, typer.Option("--force", help="Apply even if the base model is not the pack's.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 30,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Type of the weights. [default: the pack's]")] = None,
    save: Save = None,
    save_dtype: SaveDtype = None,
) -> None:
    """Apply a file of edits to a model, or write its facts into a directory (--into DIR)."""
    from editcore._util.words import counted
    from editcore.interfaces.errors import HParamsError
    from editcore.interfaces.values import FactRecord
    from editcore.models.sources import check_dtype, look_at
    from editcore.runs.pack_file import read_manifest

    # What is wrong with file, model or options is told before torch is imported.
    refuse_used_save(save, save_dtype)
    manifest = read_manifest(file)
    if into is not None:
        if given := options_given(ctx, ("prompts", "model", "force", "tokens", "dtype", "save", "save_dtype")):
            raise HParamsError(
                f"{', '.join(given)}: {into} has its own model, and keeps what is written. Leave it out."
            )
        latest = {request.fact_key: FactRecord(request=request) for request in manifest.requests}
        typer.echo(f"{counted(len(latest), 'fact')} in {file}, by {manifest.editor} for {manifest.model}.")
        device_given = device if options_given(ctx, ["device"]) else None
        write_into(ctx, into, list(latest.values()), options, device=device_given)
        return
    if given := options_given(ctx, [field.name for field in fields(WriteOptions)]):
        raise HParamsError(f"{', '.join(given)}: this is for --into DIR.")
    if model is not None:
        look_at(model)
    dtype = dtype or manifest.dtype
    check_dtype(dtype)

    from editcore.cli.console import TerminalProgress, print_table
    from editcore.models import LanguageModel, LoadOptions
    from editcore.runs.pack import read_pack

    packed = read_pack(file)
    loaded = LanguageModel.load(
        model or packed.manifest.model,
        LoadOptions(device=device, dtype=dtype, chat_template=manifest.chat_template),
        families=loaded_plugins(ctx).family_paths(),
        progress=TerminalProgress(),
    )
    edited = packed.apply(loaded, loaded_plugins(ctx), force=force)
    if save is not None:
        edited.check_all_in_weights("saved")
    typer.echo(f"{counted(len(packed.requests), 'edit')} by {packed.manifest.editor} applied to {loaded.name}.")
    _list_facts(packed.requests)
    if prompts:
        answers = loaded.generate(prompts, max_new_tokens=tokens)
        print_table(("text",), [(prompt + answer,) for prompt, answer in zip(prompts, answers, strict=True)])
    if save is not None:
        edited.save(save, dtype=save_dtype)
        typer.echo(f"Edited model: {save}")
    elif not prompts:
        typer.echo("The edits fit. Nothing was kept; --save DIR writes the edited model.")
