"""The root of ``editctl``: what it can do, and the commands that only look.

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
    from collections.abc import Mapping

    from editcore.interfaces.specs import Spec
    from editcore.plugins.registry import PluginInfo, Plugins
    from editcore.settings.hparams import Setting

__all__ = ["COMMANDS", "app"]

COMMANDS = (
    CommandRow("run", "editcore.cli.run:app", "Edit many facts, measure before and after, keep a record."),
    CommandRow("sweep", "editcore.cli.sweep:sweep_app", "Run a grid of trials, and put the results into one table."),
    CommandRow("compare", "editcore.cli.sweep:compare_app", "Compare the installed methods on the same facts."),
    CommandRow("ablate", "editcore.cli.sweep:ablate_app", "Vary the settings of one plugin, as its study says."),
    CommandRow("edit", "editcore.cli.edit:app", "Write one fact and compare what the model says."),
    CommandRow("generate", "editcore.cli.generate:app", "Let a run's edited model speak beside the original."),
    CommandRow("forgetting", "editcore.cli.forgetting:app", "Compare how runs with checkpoints forget."),
    CommandRow("ledger", "editcore.cli.ledger:app", "Look at the edits of a run, and take them back."),
    CommandRow("report", "editcore.cli.report:app", "Write a page about a run or a sweep."),
    CommandRow("pack", "editcore.cli.pack:pack_app", "Put the active edits of a run into one file."),
    CommandRow("apply", "editcore.cli.pack:apply_app", "Apply a file of edits to a model."),
    CommandRow("onboard", "editcore.cli.onboard:app", "Find out how a new model is edited, and write its presets."),
    CommandRow("trace", "editcore.cli.trace:app", "Find where a model keeps what it knows."),
    CommandRow("models", "editcore.cli.models:app", "List, fetch and inspect models."),
    CommandRow("hparams", "editcore.cli.hparams:app", "Bring hyperparameters from elsewhere."),
    CommandRow("stats", "editcore.cli.stats:app", "Compute and list second moments of activations."),
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
        str | None, typer.Option(metavar="NAME", help="Only those that answer this hook, such as editcore_editors.")
    ] = None,
) -> None:
    """List what is installed, what it offers, what is broken and why."""
    rows = loaded_plugins(ctx).listing()
    if hook is not None:
        rows = _answering(rows, hook)
    if as_json:
        _print_json([_plugin_json(row) for row in rows])
        return
    from editcore.cli.console import print_table

    print_table(
        ("plugin", "package", "version", "status", "offers"),
        [(row.name, row.distribution, row.version, row.status, row.reason or _offers(row)) for row in rows],
    )


@app.command()
def editors(ctx: typer.Context) -> None:
    """List the editing methods that are installed."""
    from editcore.cli.console import print_table

    print_table(
        ("editor", "presets", "summary"),
        [(spec.name, _presets(spec), spec.summary) for spec in loaded_plugins(ctx).editors().values()],
    )


@app.command()
def describe(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="An editor, a backend, a plugin or a data set.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Explain an editor, backend, plugin or data set and its hyperparameters."""
    found = _named(loaded_plugins(ctx), name)
    if as_json:
        _print_json([_description_json(kind, spec) for kind, spec in found.items()])
        return
    for kind, spec in found.items():
        _print_description(kind, spec)


def _answering(rows: list[PluginInfo], hook: str) -> list[PluginInfo]:
    from dataclasses import replace

    from editcore.interfaces.errors import UnknownNameError
    from editcore.plugins.registry import REGISTRATION_HOOKS

    if hook not in REGISTRATION_HOOKS:
        raise UnknownNameError("hook", hook, REGISTRATION_HOOKS)
    return [replace(row, offers={hook: row.offers[hook]}) for row in rows if hook in row.offers]


def _plugin_json(row: PluginInfo) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(row)


def _offers(row: PluginInfo) -> str:
    parts = (f"{hook.removeprefix('editcore_')}: {', '.join(names)}" for hook, names in row.offers.items())
    return "; ".join(parts)


def _named(plugins: Plugins, name: str) -> dict[str, Spec]:
    """Everything that can be described under a name, by kind."""
    from editcore.interfaces.errors import UnknownNameError

    kinds: dict[str, Mapping[str, Spec]] = {
        "editor": plugins.editors(),
        "backend": plugins.backends(),
        "plugin": plugins.extensions(),
        "data set": plugins.datasets(),
    }
    found = {kind: registry[name] for kind, registry in kinds.items() if name in registry}
    if not found:
        known = {known for registry in kinds.values() for known in registry}
        raise UnknownNameError("editor, backend, plugin or data set", name, known, hint=plugins.hint(name))
    return found


def _settings(spec: Spec) -> list[Setting]:
    from editcore.plugins.registry import resolve
    from editcore.settings import hparams as _hparams

    hparams: str | None = getattr(spec, "hparams", None)
    return _hparams.describe(resolve(hparams)) if hparams else []


def _presets(spec: Spec) -> str:
    """The names of its presets, the user's own marked as such."""
    from editcore.settings.presets import presets_of

    return ", ".join(f"{name} (yours)" if preset.own else name for name, preset in presets_of(spec).items())


def _description_json(kind: str, spec: Spec) -> dict[str, object]:
    from dataclasses import asdict

    from editcore.settings.presets import presets_of

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return sorted(value) if isinstance(value, frozenset) else value

    return {
        "kind": kind,
        **{name: plain(value) for name, value in asdict(spec).items()},
        "presets": list(presets_of(spec)),
        "settings": [asdict(setting) for setting in _settings(spec)],
    }


def _print_description(kind: str, spec: Spec) -> None:
    from editcore.cli.console import print_table

    typer.echo(f"{spec.name} ({kind}): {spec.summary}")
    if presets := _presets(spec):
        typer.echo(f"Presets: {presets}")
    if argument := getattr(spec, "argument", ""):
        typer.echo(f"Argument: {argument} (--dataset {spec.name}:{argument.upper()})")
    settings = _settings(spec)
    if not settings:
        typer.echo("It has no hyperparameters.")
        return
    print_table(
        ("setting", "type", "default", "allowed", "meaning"),
        [(row.name, row.type, _default(row), row.allowed, row.meaning) for row in settings],
    )


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    if setting.default is None:
        return "none"
    return setting.default if isinstance(setting.default, str) else json.dumps(setting.default, ensure_ascii=False)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
