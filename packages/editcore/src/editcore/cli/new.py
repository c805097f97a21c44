"""``editctl new``: starts a plugin package."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import loaded_plugins

if TYPE_CHECKING:
    from editcore.plugins.installed import PluginInfo

__all__ = ["app"]

app = typer.Typer()


@app.command()
def new(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="The word users will type, such as my-plugin.")],
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="editor, backend, extension, evaluator, dataset or attachment.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the package into this folder. [default: the current one]")
    ] = None,
    summary: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What it does, in a sentence for listings. [default: the template's]"),
    ] = None,
) -> None:
    """Start a plugin package that works, with tests and a README that says what to change."""
    from editcore.plugins.scaffold import create_package

    installed = loaded_plugins(ctx).listing()
    package = create_package(name, kind=kind, folder=out or Path(), summary=summary, installed=installed)
    typer.echo(f"Wrote {package}\n")
    for step, command in _next_steps(name, kind, package, installed):
        typer.echo(f"{step}:\n    {command}")


def _next_steps(name: str, kind: str, package: Path, installed: Sequence[PluginInfo]) -> list[tuple[str, str]]:
    """What to do next, each with its command."""
    from editcore.plugins.scaffold import KINDS

    # Without a slash, pip would take the path for the name of a package.
    folder = str(package) if package.is_absolute() else f"./{package}"
    editors = sorted(name for plugin in installed for name in plugin.offers.get("editcore_editors", ()))
    options = KINDS[kind].options.format(
        name=name, editor=editors[0] if editors else "EDITOR", package=shlex.quote(folder)
    )
    use = "Use it" if editors or "{editor}" not in KINDS[kind].options else "Use it, with an editor that you install"
    return [
        ("Install it, with what its tests need", f"pip install -e {shlex.quote(f'{folder}[test]')}"),
        ("See it", f"editctl plugins\n    editctl describe {name}"),
        ("Test it", f"pytest {shlex.quote(folder)}"),
        (use, f"editctl run {options}"),
        ("Read what to change", shlex.quote(f"{folder}/README.md")),
    ]
