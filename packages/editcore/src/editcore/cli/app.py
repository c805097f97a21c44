"""The root of ``editctl``: the list of commands, and the commands that only list something.

Nothing here imports more than it needs to show help; each command imports its own work when it runs. Help is plain
text: loading rich's panels would double the time to the first line.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import CommandRow, lazy_group, loaded_plugins

if TYPE_CHECKING:
    from editcore.plugins.installed import PluginInfo

__all__ = ["COMMANDS", "app"]

COMMANDS = (
    CommandRow("run", "editcore.cli.run:app", "Edit many facts, measure before and after, keep a record."),
    CommandRow("sweep", "editcore.cli.sweep:sweep_app", "Run a grid of trials, and put the results into one table."),
    CommandRow("compare", "editcore.cli.sweep:compare_app", "Compare the installed methods on the same facts."),
    CommandRow("ablate", "editcore.cli.sweep:ablate_app", "Vary the settings of one plugin, as defined by its study."),
    CommandRow("edit", "editcore.cli.edit:app", "Write facts into a directory, or try one on a model."),
    CommandRow("init", "editcore.cli.workspace:init_app", "Begin a directory for edits of a model."),
    CommandRow("status", "editcore.cli.workspace:status_app", "Say what a directory holds."),
    CommandRow("log", "editcore.cli.workspace:log_app", "Say who wrote or undid what, when, and why."),
    CommandRow("check", "editcore.cli.workspace:check_app", "Ask an edited model all its facts again."),
    CommandRow("evaluate", "editcore.cli.evaluate:app", "Measure any model on facts, with its edits and without."),
    CommandRow("compare-results", "editcore.cli.compare_results:app", "Compare two results, fact by fact."),
    CommandRow("generate", "editcore.cli.generate:app", "Generate text with the edited and the unedited model."),
    CommandRow("forgetting", "editcore.cli.forgetting:app", "Compare how runs with checkpoints forget."),
    CommandRow("ledger", "editcore.cli.ledger:app", "List, check, undo and compare the edits of a run."),
    CommandRow("report", "editcore.cli.report:app", "Write a page about a run or a sweep."),
    CommandRow("pack", "editcore.cli.pack:pack_app", "Put the active edits of a run into one file."),
    CommandRow("apply", "editcore.cli.pack:apply_app", "Apply a file of edits to a model."),
    CommandRow("onboard", "editcore.cli.onboard:app", "Find settings for a new model, and write its presets."),
    CommandRow("trace", "editcore.cli.trace:app", "Find the layers that recall facts (causal tracing)."),
    CommandRow("models", "editcore.cli.models:app", "List, fetch and inspect models."),
    CommandRow("data", "editcore.cli.data:app", "List, check, fetch and convert data sets."),
    CommandRow("hparams", "editcore.cli.hparams:app", "Import hyperparameters from other frameworks."),
    CommandRow("stats", "editcore.cli.stats:app", "Compute and list second moments of activations."),
    CommandRow("new", "editcore.cli.new:app", "Start a plugin package of your own."),
)

app = typer.Typer(
    cls=lazy_group(COMMANDS),
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import editcore

        typer.echo(f"editctl {editcore.__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what editcore does, with the traceback of a failing plugin.")
    ] = False,
) -> None:
    """Edit what a language model knows."""
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("editcore").setLevel(logging.DEBUG)
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def plugins(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    hook: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only those that implement this hook, such as editcore_editors.")
    ] = None,
) -> None:
    """List the installed plugins and what they offer; and which are broken or incompatible, and why."""
    rows = loaded_plugins(ctx).listing()
    if hook is not None:
        rows = _answering(rows, hook)
    if as_json:
        _print_json([_plugin_json(row) for row in rows])
        return
    from editcore.cli.console import print_table

    print_table(
        ("plugin", "package", "version", "status", "offers"),
        [(row.name, row.distribution, row.version, row.status, _offers(row)) for row in rows],
    )


@app.command()
def editors(ctx: typer.Context) -> None:
    """List the editing methods that are installed."""
    from editcore.cli.console import print_table
    from editcore.cli.describe import presets

    print_table(
        ("editor", "presets", "summary"),
        [(spec.name, presets(spec), spec.summary) for spec in loaded_plugins(ctx).editors().values()],
    )


@app.command()
def describe(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(help="An editor, an evaluator, a data set: any name that 'editctl plugins' shows as an offer."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Explain anything that a plugin offers: what it is, and its hyperparameters, metrics and presets."""
    from editcore.cli.describe import as_values, print_description

    offers = loaded_plugins(ctx).named(name)
    if as_json:
        _print_json([as_values(offer) for offer in offers])
        return
    for number, offer in enumerate(offers):
        if number:
            typer.echo()
        print_description(offer)


def _answering(rows: list[PluginInfo], hook: str) -> list[PluginInfo]:
    from dataclasses import replace

    from editcore.interfaces.errors import UnknownNameError
    from editcore.plugins.kinds import REGISTRATION_HOOKS

    if hook not in REGISTRATION_HOOKS:
        raise UnknownNameError("hook", hook, REGISTRATION_HOOKS)
    return [replace(row, offers={hook: row.offers[hook]}) for row in rows if hook in row.offers]


def _plugin_json(row: PluginInfo) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(row)


def _offers(row: PluginInfo) -> str:
    """What a plugin offers; before it the reason, if the plugin is not active."""
    parts = (f"{hook.removeprefix('editcore_')}: {', '.join(names)}" for hook, names in row.offers.items())
    return "; ".join(filter(None, (row.reason, *parts)))


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
