"""Count what makes the layout of a package easy or hard to follow: python tools/house.py [CHECKOUT ...]

Every import counts, wherever it stands: in a function, and under TYPE_CHECKING too. With the checkout of an earlier
commit as a second argument, the two stand side by side.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, order=True)
class Import:
    """One module that another one takes something from."""

    source: str
    target: str
    annotations: bool
    """Whether it stands under ``TYPE_CHECKING`` only."""


class House:
    """The modules of a package and what they import of each other.

    Args:
        package: the package's folder.
    """

    def __init__(self, package: Path) -> None:
        self.package = package
        self.modules: dict[str, Path] = {}
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            self.modules[".".join(parts).removesuffix(".__init__")] = path
        self.imports = sorted({found for module in self.modules for found in self._imports_of(module)})

    def room(self, module: str) -> str:
        """The folder that a module stands in, or its own name where it stands in none; empty for the package itself."""
        return module.removeprefix(self.package.name).removeprefix(".").partition(".")[0]

    def loose(self) -> list[str]:
        """Modules beside the rooms."""
        return sorted(path.stem for path in self.package.glob("*.py") if path.stem not in ("__init__", "__main__"))

    def rooms(self) -> list[str]:
        """Folders with modules."""
        return sorted(path.parent.name for path in self.package.glob("*/__init__.py"))

    def circles(self) -> list[list[str]]:
        """Groups of modules that reach each other by imports."""
        edges: dict[str, set[str]] = {module: set() for module in self.modules}
        for found in self.imports:
            edges[found.source].add(found.target)
        reached = {module: _reachable(edges, module) for module in edges}
        groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in edges}
        return sorted(sorted(group) for group in groups if group)

    def upward(self, order: Sequence[str], *, annotations: bool) -> list[Import]:
        """Imports of a room by one that stands below it.

        Args:
            order: the rooms, the highest first.
            annotations: look at those under ``TYPE_CHECKING``, or at the others.
        """
        place = {room: index for index, room in enumerate(order)}
        return [
            found
            for found in self.imports
            if found.annotations == annotations
            and self.room(found.source) in place
            and place.get(self.room(found.target), len(place)) < place[self.room(found.source)]
        ]

    def _imports_of(self, module: str) -> Iterator[Import]:
        tree = ast.parse(self.modules[module].read_text(encoding="utf-8"))
        guarded = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
            for statement in block.body
            for node in ast.walk(statement)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in self.modules:
                targets = {self._home(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                targets = {alias.name for alias in node.names if alias.name in self.modules}
            else:
                continue
            yield from (Import(module, target, id(node) in guarded) for target in targets - {module})

    def _home(self, module: str, name: str) -> str:
        """The module that a name comes from: a submodule, or where the list of a room has it from."""
        if f"{module}.{name}" in self.modules:
            return f"{module}.{name}"
        stub = self.modules[module].with_suffix(".pyi")
        if stub.is_file():
            for node in ast.parse(stub.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
                    return f"{module}.{node.module}"
        return module


WORDS = ("one", "Climb", "Tails", "_Asked", "_Seen", "_Looking", "making", "standing_aside")
"""Names in the code that say nothing, or that a reader of the field does not know."""


def sources(checkout: Path) -> list[Path]:
    """The modules of all packages, tests not among them."""
    return sorted(checkout.glob("packages/*/src/**/*.py"))


def crowded(path: Path) -> list[str]:
    """Functions of a module with more than six parameters; commands of Typer and ``self`` do not count."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(parameter.arg not in ("self", "cls") for parameter in named)
            if count > 6 and not any("command" in ast.unparse(mark) for mark in node.decorator_list):
                found.append(f"{node.name} ({count})")
    return found


def uses_of_words(path: Path) -> int:
    """How often names of a module are among :data:`WORDS`."""
    found = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
        found += sum(name in WORDS for name in names)
    return found


def layers(checkout: Path) -> list[str]:
    """The rooms in the order of the ``layers`` contract, the highest first; empty without one."""
    tools = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    found = [contract["layers"] for contract in tools["contracts"] if contract["type"] == "layers"]
    return [str(layer) for layer in found[0]] if found else []


def counts(checkout: Path) -> Mapping[str, object]:
    """What is counted, by its name in the table."""
    house = House(checkout / "packages" / "editcore" / "src" / "editcore")
    order = layers(checkout)
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in house.modules.values()}
    longest = max(lengths, key=lambda path: lengths[path])
    modules = sources(checkout)
    return {
        "loose modules in the root": len(house.loose()),
        "folders in the root": len(house.rooms()),
        "circles of modules": len(house.circles()),
        "modules in circles": sum(len(circle) for circle in house.circles()),
        "imports upward": len(house.upward(order, annotations=False)) if order else "no order",
        "names of higher rooms in annotations": len(house.upward(order, annotations=True)) if order else "no order",
        "longest module": f"{longest.relative_to(house.package)} ({lengths[longest]} lines)",
        "modules of more than 500 lines": sum(count > 500 for count in lengths.values()),
        "functions of more than 6 parameters": sum(len(crowded(path)) for path in modules),
        "names that say nothing": sum(uses_of_words(path) for path in modules),
    }


def _reachable(edges: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in edges[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="house.py", description="Count what makes a layout easy or hard to follow.")
    parser.add_argument("checkouts", metavar="CHECKOUT", nargs="*", type=Path, help="a folder [default: this one]")
    checkouts = parser.parse_args(arguments).checkouts or [ROOT]
    for checkout in checkouts:
        if not (checkout / "packages" / "editcore").is_dir():
            parser.error(f"'{checkout}' is no checkout of editcore; 'git worktree add FOLDER COMMIT' makes one.")
    columns = [counts(checkout) for checkout in checkouts]
    for name in columns[0]:
        print(f"{name:38s}" + "".join(f"{column[name]!s:45s}" for column in columns).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
