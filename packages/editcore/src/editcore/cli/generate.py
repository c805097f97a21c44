"""``editctl generate``: compares the edited model of a run with the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import RunDevice, Save, SaveDtype, refuse_used_save

__all__ = ["app"]

app = typer.Typer()


@app.command()
def generate(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 30,
    device: RunDevice = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Whether to put the model's chat template around the prompts. [default: as in the run]",
        ),
    ] = None,
    save: Save = None,
    save_dtype: SaveDtype = None,
) -> None:
    """Generate text with the edited and the unedited model."""
    from editcore._util.words import counted
    from editcore.runs.record import RunRecord

    refuse_used_save(save)
    RunRecord.read(directory)  # an error is found before torch is imported

    from editcore.cli.console import TerminalProgress, print_table
    from editcore.runs.reopening import open_run

    refuse_used_save(save, save_dtype)
    edited, ledger = open_run(
        directory,
        device=device,
        chat_template=chat_template,
        plugins=loaded_plugins(ctx),
        progress=TerminalProgress(),
    )
    model = edited.model
    if save is not None:
        edited.check_all_in_weights("saved")
    answers = model.generate(prompts, max_new_tokens=tokens)
    if save is not None:
        edited.save(save, dtype=save_dtype)
    edited.rebuild([])
    original = model.generate(prompts, max_new_tokens=tokens)
    rows = []
    for prompt, before, after in zip(prompts, original, answers, strict=True):
        shown = model.prompt_form.shown
        rows += [("original", shown(prompt, before)), ("edited", shown(prompt, after))]
    count = sum(entry.num_new for entry in ledger.history())
    print_table(("model", "text"), rows, title=f"{model.name}, {counted(count, 'edit')}")
    if save is not None:
        typer.echo(f"Edited model: {save}")
