"""What the commands of plugins are made with: the installed plugins, tables, and the progress of long work."""

from __future__ import annotations

from editcore.cli.console import TerminalProgress, make_console, print_table
from editcore.cli.lazy import loaded_plugins

__all__ = ["TerminalProgress", "loaded_plugins", "make_console", "print_table"]
