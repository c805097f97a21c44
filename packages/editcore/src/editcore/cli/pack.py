"""``editctl pack`` and ``editctl apply``: write a set of edits as one file, and apply it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import Device, Dtype, Save, SaveDtype, refuse_used_save

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
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, such as facts.editpack.")],
) -> None:
    """Put the active edits of a run into one file."""
    from editcore._util.words import counted
    from editcore.runs.record import RunRecord

    RunRecord.read(directory)  # an error is found before torch is imported

    from editcore.runs.pack import write_pack

    made = write_pack(directory, file, loaded_plugins(ctx))
    size = file.stat().st_size / 1e6
    typer.echo(f"{counted(len(made.requests), 'edit')} of {made.manifest.model} in {file} ({size:.1f} MB).")
    _list_facts(made.requests)


def _list_facts(requests: Sequence[EditRequest]) -> None:
    """List the first facts, a line each, and say how many more there are."""
    from editcore._util.words import cut

    for request in requests[:_MOST_FACTS]:
        typer.echo(f"  {cut(request.text, keep='end')} → {cut(request.target_new)}")
    if (more := len(requests) - _MOST_FACTS) > 0:
        typer.echo(f"  and {more:,} more")


@apply_app.command()
def apply(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that 'editctl pack' wrote.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to continue.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A catalogue name, a model folder or a hub id. [default: the pack's]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Apply even if the base model is not the pack's.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 30,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    save: Save = None,
    save_dtype: SaveDtype = None,
) -> None:
    """Apply a file of edits to a model."""
    from editcore._util.words import counted
    from editcore.models.sources import check_dtype, look_at
    from editcore.runs.pack_file import read_manifest

    # What is wrong with file, model or options is told before torch is imported.
    refuse_used_save(save, save_dtype)
    read_manifest(file)
    if model is not None:
        look_at(model)
    check_dtype(dtype)

    from editcore.cli.console import TerminalProgress, print_table
    from editcore.models import LanguageModel, LoadOptions
    from editcore.runs.pack import read_pack

    packed = read_pack(file)
    loaded = LanguageModel.load(
        model or packed.manifest.model,
        LoadOptions(device=device, dtype=dtype),
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
