"""Write docs/reference/cli.md from the help of every command: python tools/make_cli_reference.py [--check]"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import re
import sys
from pathlib import Path

__all__ = ["main", "reference"]

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "reference" / "cli.md"
WIDTH = 100

_HEAD = """\
# The command line

Written by `tools/make_cli_reference.py` from `editctl COMMAND --help`.

Errors that the user can fix end with a message of one paragraph and exit code 2; an interrupted command ends with 130.
A bug shows its traceback.
"""


def reference() -> str:
    """The page: one section per command, in the order in which help lists them."""
    _our_packages_alone()
    pages = [_HEAD]
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        command = waiting.pop(0)
        text = _help(command)
        pages.append(f"## editctl{''.join(f' {word}' for word in command)}\n\n```text\n{text}```\n")
        waiting[:0] = [(*command, *_arguments(text), name) for name in _subcommands(text)]
    return "\n".join(pages)


def _our_packages_alone() -> None:
    """Sets this process's environment: help of the packages of this repository, as wide as the page."""
    ours = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
    entries = importlib.metadata.entry_points(group="editcore")
    foreign = [entry.name for entry in entries if entry.dist is None or entry.dist.name not in ours]
    os.environ.update(COLUMNS=str(WIDTH), NO_COLOR="1", EDITCORE_DISABLE_PLUGINS=",".join(foreign))


def _help(command: tuple[str, ...]) -> str:
    """What ``editctl COMMAND --help`` prints."""
    from editcore.cli import main as editctl

    given, sys.argv = sys.argv, ["editctl", *command, "--help"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            editctl()
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"editctl {' '.join(command)} --help failed") from end
    finally:
        sys.argv = given
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().strip().splitlines())


def _subcommands(text: str) -> list[str]:
    """The names that a help page lists under "Commands:"."""
    _, _, listed = text.partition("\nCommands:\n")
    return re.findall(r"^  ([a-z][a-z0-9-]*)", listed, re.MULTILINE)


def _arguments(text: str) -> list[str]:
    """What stands before the subcommand: ``RUN`` of ``editctl ledger [OPTIONS] RUN COMMAND [ARGS]...``."""
    usage = re.search(r"^Usage: .*\[OPTIONS\] (.*)COMMAND \[ARGS\]", text, re.MULTILINE)
    return usage[1].replace("{", "").replace("}", "").split() if usage else []


def main(arguments: list[str] | None = None) -> int:
    """Write the page; with ``--check``, only say whether it is up to date."""
    parser = argparse.ArgumentParser(prog="make_cli_reference.py", description="Write docs/reference/cli.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    given = parser.parse_args(arguments)
    page = reference()
    if given.check:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page:
            return 0
        print(f"{TARGET.relative_to(ROOT)} is out of date. Run: python tools/make_cli_reference.py", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(page, encoding="utf-8")
    print(f"Wrote {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
