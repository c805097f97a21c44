"""``editctl report``: writes a page about a run, a sweep or an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer()


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of a run, a sweep or an evaluation.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write it. [default: report, in DIR]")
    ] = None,
) -> None:
    """Write a page about a run, a sweep or an evaluation, with its figures and a Markdown summary.

    The page is one file that can be sent, opened without a network, and printed.
    """
    from editcore._util.words import counted
    from editcore.report import make_report

    made = make_report(directory, out)
    typer.echo(f"Page: {made.page}")
    typer.echo(f"Summary: {made.summary}, with {counted(len(made.figures), 'figure')} in {made.directory / 'figures'}")
