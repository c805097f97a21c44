"""Subcommands that are imported when they run, so that ``editctl --help`` costs nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from editcore.interfaces.errors import PluginError

if TYPE_CHECKING:
    from typer._click import Command, Context

    from editcore.plugins.registry import Plugins

__all__ = ["CommandRow", "lazy_group", "loaded_plugins"]


@dataclass(frozen=True, slots=True)
class CommandRow:
    """One line of ``editctl --help``."""

    name: str
    target: str
    """``"module:attribute"`` of a ``typer.Typer``. An app with a single command becomes that command."""
    help: str


def loaded_plugins(context: Context) -> Plugins:
    """The plugins of this process. They are loaded on first use, and shared by all commands of one ``editctl``."""
    root = context.find_root()
    if root.obj is None:
        from editcore.plugins.registry import Plugins

        root.obj = Plugins.load()
    plugins: Plugins = root.obj
    return plugins


def lazy_group(rows: tuple[CommandRow, ...]) -> type[TyperGroup]:
    """A group with the commands of ``rows``, then its own, then those of plugins."""

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands = {row.name: _LazyCommand(row) for row in rows} | dict(self.commands)

        def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
            if cmd_name not in self.commands:
                self._add_plugin_commands(ctx)
            return super().get_command(ctx, cmd_name)

        def list_commands(self, ctx: Context) -> list[str]:
            try:
                self._add_plugin_commands(ctx)
            except PluginError as error:  # help must also work with a broken installation
                print(f"Warning: {error}", file=sys.stderr)
            return super().list_commands(ctx)

        def _add_plugin_commands(self, ctx: Context) -> None:
            for name, spec in loaded_plugins(ctx).commands().items():
                self.commands.setdefault(name, _LazyCommand(CommandRow(name, spec.target, spec.summary)))

    return LazyGroup


class _LazyCommand(TyperCommand):
    """A placeholder for a command in listings. The command is imported when its arguments are parsed."""

    def __init__(self, row: CommandRow) -> None:
        super().__init__(row.name, help=row.help, rich_markup_mode=None)
        self._row = row

    def make_context(
        self, info_name: str | None, args: list[str], parent: Context | None = None, **extra: Any
    ) -> Context:
        return self._load().make_context(info_name, args, parent=parent, **extra)

    def _load(self) -> Command:
        from editcore.plugins.calls import resolve

        app = resolve(self._row.target)
        if not isinstance(app, typer.Typer):
            raise PluginError(
                f"The command '{self._row.name}' cannot run: '{self._row.target}' is not a typer.Typer "
                f"but of type {type(app).__name__}."
            )
        app.rich_markup_mode = None  # all help is plain text, as in app.py
        command = get_command(app)
        command.name = self._row.name
        command.params = [p for p in command.params if p.name not in {"install_completion", "show_completion"}]
        return command
