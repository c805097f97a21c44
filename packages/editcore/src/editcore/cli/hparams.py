"""``editctl hparams``: imports hyperparameters from other frameworks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import loaded_plugins

if TYPE_CHECKING:
    from editcore.settings.reference import Imported

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)


@app.callback()
def hparams() -> None:
    """Import hyperparameters from other frameworks."""


@app.command("import")
def import_hparams(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="JSON or YAML of a method's own repository or of EasyEdit.")],
    editor: Annotated[
        str | None, typer.Option(help="Their editor. [default: the file's alg_name, or its folder's name]")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write here. [default: print]")] = None,
) -> None:
    """Turn a file of another framework into TOML for 'editctl run --config'.

    What was added or left out, and why, is printed on stderr: settings of the variant of a method that the file is for,
    and settings that such files leave to their code.
    """
    from editcore._util.files import write_text
    from editcore.interfaces.errors import StorageError
    from editcore.settings.reference import import_file

    if out is not None and out.exists():
        raise StorageError(f"--out {out} is already there; give a file that does not exist yet.")
    imported = import_file(file, loaded_plugins(ctx), editor=editor)
    if out is None:
        typer.echo(imported.toml(), nl=False)
    else:
        write_text(out, imported.toml())
    _report(imported)
    if out is not None:
        typer.echo(f"Wrote {out}. Try: editctl run --config {out}", err=True)


def _report(imported: Imported) -> None:
    for what, why in imported.added.items():
        typer.echo(f"Added {what}: {why}.", err=True)
    reasons: dict[str, list[str]] = {}
    for name, why in imported.dropped.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        typer.echo(f"Dropped {', '.join(names)}: {why}.", err=True)
