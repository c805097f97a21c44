"""``editctl trace``: finds where a model keeps facts, by causal tracing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import ChatTemplate, Device, Dtype, ModelArgument, Strict

if TYPE_CHECKING:
    from editcore.locate_then_edit.located import Tracing

__all__ = ["app", "show_tracing", "write_tracing"]

app = typer.Typer()

_SHOWN = 5


@app.command()
def trace(
    ctx: typer.Context,
    model: ModelArgument,
    facts: Annotated[
        str,
        typer.Option(help="True facts: a data set (NAME or NAME:ARGUMENT) or a file (records, or known_1000)."),
    ] = "worldfacts",
    strict: Strict = None,
    num: Annotated[int, typer.Option(min=1, help="Facts to trace, of those that the model knows.")] = 20,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the noise for each fact.")] = 1,
    noise: Annotated[float, typer.Option(min=0.0, help="Noise, in standard deviations of the embeddings.")] = 3.0,
    window: Annotated[
        int | None, typer.Option(min=1, help="Layers restored together. [default: 10/48 of the depth]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    chat_template: ChatTemplate = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for table and picture. [default: runs/trace-MODEL-TIME]")
    ] = None,
) -> None:
    """Restore states of a corrupted run and see which bring a fact back (causal tracing, ROME section 2).

    The result is also kept for editors with layer_selection = "traced".
    """
    from editcore.models.sources import check_dtype, look_at

    look_at(model)
    check_dtype(dtype)

    from editcore._util.paths import fresh_directory
    from editcore.datasets import load_known_facts
    from editcore.settings.presets import model_stem

    plugins = loaded_plugins(ctx)
    notes: list[str] = []
    known = load_known_facts(facts, plugins=plugins, notes=notes, strict=bool(strict))
    directory = fresh_directory(out, f"trace-{model_stem(model)}")

    from editcore.cli.console import TerminalProgress
    from editcore.interfaces.errors import ModelError
    from editcore.locate_then_edit.located import store_tracing
    from editcore.models import LanguageModel, LoadOptions
    from editcore.onboarding.causal_tracing import TracingOptions, trace as trace_model

    options = TracingOptions(num=num, draws=draws, noise=noise, window=window, seed=seed)
    progress = TerminalProgress()
    for note in notes:
        typer.echo(f"Note: {note}")
    loaded = LanguageModel.load(
        model,
        LoadOptions(device=device, dtype=dtype, chat_template=chat_template),
        families=plugins.family_paths(),
        progress=progress,
    )
    tracing = trace_model(loaded, known, options=options, progress=progress)
    if tracing.used == 0:
        raise ModelError(
            f"{loaded.name} predicts none of {tracing.asked} facts of {facts} right, so there is nothing to trace. "
            "Give facts that it knows with --facts FILE."
        )
    store_tracing(tracing)
    show_tracing(tracing)
    for path in write_tracing(tracing, directory):
        typer.echo(f"Wrote {path}")


def show_tracing(tracing: Tracing) -> None:
    """Print what was traced, the greatest effect for each kind and role, and the layers with the greatest effects."""
    from editcore._util.words import counted
    from editcore.cli.console import print_table
    from editcore.locate_then_edit.located import ROLES

    typer.echo(
        f"Causal tracing of {tracing.model}: {counted(tracing.used, 'fact')}, those that it knows of {tracing.asked}. "
        f"p(attribute) {tracing.clean:.3f}, with noise on the subject {tracing.corrupted:.3f}."
    )
    rows = []
    for number, role in enumerate(ROLES):
        if tracing.counts[number]:
            cells = []
            for effects in tracing.effects.values():
                best = int(effects[number].argmax())
                cells.append(f"{effects[number, best]:+.3f} at {best}")
            rows.append((role, tracing.counts[number], *cells))
    print_table(
        ("token", "facts", *tracing.effects), rows, title="Greatest indirect effect, and its layer", right=("facts",)
    )
    if "attention" not in tracing.effects:
        typer.echo(
            "The attention's output projection of this model cannot be identified, so attentions were not restored."
        )
    named = ", ".join(map(str, tracing.ranked_layers()[:_SHOWN]))
    typer.echo(f"Layers whose MLPs carry most at the subject's last token: {named}.")


def write_tracing(tracing: Tracing, directory: Path) -> list[Path]:
    """Write the table and the picture of a tracing."""
    import pandas as pd

    from editcore._util.files import write_text
    from editcore._util.words import counted
    from editcore.figures.layers import tracing_figure
    from editcore.figures.style import save
    from editcore.settings.presets import model_stem

    table, picture = directory / "tracing.csv", directory / "figures" / "tracing.png"
    write_text(table, pd.DataFrame(tracing.rows()).to_csv(index=False))
    save(
        tracing_figure(
            tracing, title=f"Causal tracing of {model_stem(tracing.model)}, {counted(tracing.used, 'fact')}"
        ),
        picture,
    )
    return [table, picture]
