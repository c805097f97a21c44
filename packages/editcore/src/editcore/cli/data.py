"""``editctl data``: list, check, fetch and convert data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import Strict

if TYPE_CHECKING:
    from editcore.datasets import Finding, Findings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="List, check, fetch and convert data sets.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="A file of records, or a data set (NAME or NAME:ARGUMENT).")
]

_MOST_LINES = 10
"""Lines that are named for each kind of finding; --json has all."""

_MOST_TOGETHER = 4
"""Lines that are named for one finding about several records."""


@app.command("list")
def list_data(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the data sets that are installed, the published files that 'pull' fetches, and the formats that are read."""
    from editcore.cli.console import print_json, print_table
    from editcore.datasets import FORMAT
    from editcore.datasets.published import published_files, published_path

    plugins = loaded_plugins(ctx)
    installed = plugins.datasets().values()
    formats = plugins.components(FORMAT).values()
    if as_json:
        print_json(
            {
                "installed": [
                    {"name": spec.name, "argument": spec.argument, "summary": spec.summary} for spec in installed
                ],
                "published": [
                    {
                        "name": entry.name,
                        "file": str(path) if (path := published_path(entry)).exists() else None,
                        "url": entry.url,
                        "licence": entry.licence,
                        "size": entry.size,
                        "sha256": entry.sha256,
                        "summary": entry.summary,
                    }
                    for entry in published_files().values()
                ],
                "formats": [{"name": spec.name, "summary": spec.summary} for spec in formats],
            }
        )
        return
    print_table(
        ("data set", "argument", "summary"),
        [(spec.name, spec.argument or "-", spec.summary) for spec in installed],
        title="Installed: --dataset NAME or NAME:ARGUMENT",
    )
    typer.echo()
    print_table(
        ("file", "here", "verified by", "licence", "summary"),
        [
            (
                entry.name,
                "yes" if published_path(entry).exists() else "no",
                "size and SHA-256" if entry.sha256 else "nothing",
                entry.licence,
                entry.summary,
            )
            for entry in published_files().values()
        ],
        title="Published elsewhere: editctl data pull NAME",
    )
    typer.echo()
    print_table(
        ("format", "summary"),
        [(spec.name, spec.summary) for spec in formats],
        title="Formats of files, found by the fields of their records",
    )


@app.command("check")
def check_data(ctx: typer.Context, data: DataArgument, as_json: AsJson = False) -> None:
    """Look for records that cannot be used, contradictions, duplicates and leaks.

    Exits with 1 if a record cannot be used or contradicts another one. The rest are known flaws of published data.
    """
    from dataclasses import asdict

    from editcore.cli.console import print_json
    from editcore.datasets import findings_in

    found = findings_in(data, plugins=loaded_plugins(ctx))
    if as_json:
        print_json({**asdict(found), "faults": found.faults})
    else:
        _show(found)
    if found.faults:
        raise typer.Exit(1)


def _show(found: Findings) -> None:
    from editcore._util.words import counted
    from editcore.cli.console import print_table

    formats = ", ".join(title if len(found.formats) == 1 else f"{title} {count:,}" for title, count in found.formats)
    typer.echo(f"{found.name}: {counted(found.records, 'fact')}{f', format {formats}' if formats else ''}.")
    asked = ", ".join(f"{kind} {count:,}" for kind, count in found.probes)
    typer.echo(f"Questions: {asked or 'none beside the edits'}.")
    for caution in found.cautions:
        typer.echo(f"Note: {caution}")
    if not found.findings:
        typer.echo("Nothing was found that is wrong with it.")
        return
    kinds: dict[str, list[Finding]] = {}
    for finding in found.findings:
        kinds.setdefault(finding.kind, []).append(finding)
    typer.echo()
    print_table(
        ("found", "number", "lines", "the first"),
        [(kind, f"{len(group):,}", _lines(group), group[0].about) for kind, group in kinds.items()],
        right=("number",),
    )


def _lines(findings: list[Finding]) -> str:
    places = [_places(finding) for finding in findings]
    distinct = list(dict.fromkeys(places))
    more = f" and {len(distinct) - _MOST_LINES:,} more" if len(distinct) > _MOST_LINES else ""
    return ", ".join(distinct[:_MOST_LINES]) + more


def _places(finding: Finding) -> str:
    lines = [str(line) for line in (finding.line, *finding.others)]
    return "+".join(lines if len(lines) <= _MOST_TOGETHER else [*lines[: _MOST_TOGETHER - 1], "…"])


@app.command("pull")
def pull_data(
    name: Annotated[str, typer.Argument(help="A name that 'editctl data list' shows as published.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there instead of into the cache.")] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Another address, such as of a mirror.")] = None,
) -> None:
    """Fetch the official file of a published data set, and verify it. Standard output has only its path.

    An interrupted fetch is continued by the same command.
    """
    from editcore.cli.console import TerminalProgress
    from editcore.datasets import find_published, pull_file
    from editcore.datasets.published import published_path

    entry = find_published(name)
    pulled = pull_file(entry, out or published_path(entry), url=url, progress=TerminalProgress())
    typer.echo(f"{name} is {'here' if pulled.fetched else 'already here'}. Licence: {entry.licence}.", err=True)
    if pulled.verified:
        typer.echo("Its size and SHA-256 are those that are recorded.", err=True)
    else:
        typer.echo(f"Not verified: no size and SHA-256 are recorded for it. Its SHA-256 is {pulled.sha256}.", err=True)
    typer.echo(pulled.path)


@app.command("convert")
def convert_data(
    ctx: typer.Context,
    data: DataArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, a .jsonl that is not there yet.")],
    first: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N facts.")] = None,
    strict: Strict = None,
) -> None:
    """Write a data set as JSON lines in editcore's own form, with every question and its kind."""
    from editcore._util.files import write_text
    from editcore._util.words import counted
    from editcore.datasets import Selection, load_records
    from editcore.interfaces.errors import DatasetError

    if out.suffix != ".jsonl":
        raise DatasetError(f"{out}: JSON lines are written; give a name that ends with .jsonl.")
    if out.exists():
        raise DatasetError(f"{out} is already there; give another name, or remove it.")
    notes: list[str] = []
    selection = Selection(first=first, strict=bool(strict))
    records = load_records(data, plugins=loaded_plugins(ctx), notes=notes, selection=selection)
    write_text(out, "".join(f"{record.model_dump_json()}\n" for record in records))
    for note in notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"Wrote {counted(len(records), 'fact')} to {out}.")
