"""Start a plugin package: python tools/new_plugin.py NAME --kind editor|extension

The package is a copy of ``tools/template/KIND`` under its own name: it works, is tested, and does little.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

__all__ = ["create", "main"]

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "tools" / "template"
KINDS = ("editor", "extension")
LONGEST = 30
"""Letters in a name, so that no line of the template grows beyond what the formatter allows."""

_SUMMARY = "TEMPLATE SUMMARY"
_DEFAULT_SUMMARIES = {
    "editor": "Say in one sentence what the method writes.",
    "extension": "Count the batches of a run.",
}


def create(name: str, *, kind: str, summary: str = "", packages: Path = ROOT / "packages") -> Path:
    """Write the package ``edit-NAME`` into ``packages``, and say where.

    Raises:
        ValueError: the name or the summary does not do, or the package is there already; the message says why.
    """
    _check_name(name)
    summary = summary or _DEFAULT_SUMMARIES[kind]
    if re.search(r'["\\\n]', summary) or not summary.endswith("."):
        raise ValueError(f"A summary is one sentence with a full stop, without quotes or backslashes: {summary!r}")
    package = packages / f"edit-{name}"
    if package.exists():
        raise ValueError(f"{package} exists already. Choose another name, or remove it first.")
    template = TEMPLATES / kind
    for source in sorted(template.rglob("*")):
        if source.is_file() and "__pycache__" not in source.parts:
            target = package / _renamed(source.relative_to(template).as_posix(), name)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8")
            target.write_text(_renamed(text, name).replace(_SUMMARY, summary), encoding="utf-8")
    return package


def _check_name(name: str) -> None:
    if name.startswith("edit-"):
        raise ValueError(f"Give the name without 'edit-': {name.removeprefix('edit-')}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > LONGEST:
        raise ValueError(
            f"{name!r} does not do as a name: lower-case letters, digits and single hyphens, a letter first, "
            f"at most {LONGEST} in all. For example: my-method"
        )


def _renamed(text: str, name: str) -> str:
    """``text`` with the template's name, in its three spellings, replaced."""
    spellings = {
        "template-name": name,
        "template_name": name.replace("-", "_"),
        "TemplateName": "".join(part.capitalize() for part in name.split("-")),
    }
    for old, new in spellings.items():
        text = text.replace(old, new)
    return text


def _next_steps(name: str, kind: str) -> str:
    module = f"edit_{name.replace('-', '_')}"
    use = f"--editor {name}" if kind == "editor" else f"--editor emmet --plugin {name}"
    return f"""\
Next:
  1. Tell the tools of it, in pyproject.toml:
       mypy_path                                          "packages/edit-{name}/src"
       root_packages, forbidden_modules, and modules      "{module}"
  2. Install it:   make install
     See it:       .venv/bin/editctl describe {name}
     Try it:       .venv/bin/editctl run {use} --edits 10
  3. Write it:     packages/edit-{name}/src/{module}/{kind}.py
  4. Check it:     make test
docs/plugins/write-a-plugin.md says more."""


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and create the package; 2 for what the user can cure."""
    parser = argparse.ArgumentParser(prog="new_plugin.py", description="Start a plugin package.")
    parser.add_argument("name", help="the word users will type, such as my-method")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--summary", default="", help="one sentence for listings")
    parser.add_argument("--packages", type=Path, default=ROOT / "packages", help="folder to put it in (packages/)")
    given = parser.parse_args(arguments)
    try:
        package = create(given.name, kind=given.kind, summary=given.summary, packages=given.packages)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"Created {package}\n{_next_steps(given.name, given.kind)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
