"""The rooms of editcore: what may import what, and the page that describes them."""

from __future__ import annotations

import ast
import inspect
import json
import os
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from editcore.testing import tiny_model, tiny_requests

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "packages" / "editcore" / "src" / "editcore"
PAGE = ROOT / "docs" / "explanation" / "architecture.md"
ROOMS = sorted(path.parent.name for path in HOUSE.glob("*/__init__.py"))
MODULES = {
    ".".join(path.relative_to(HOUSE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in HOUSE.rglob("*.py")
}


def layers() -> list[str]:
    """The rooms as the contract has them, the highest first."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    [found] = [contract for contract in tools["contracts"] if contract["type"] == "layers"]
    assert found["containers"] == ["editcore"]
    assert "ignore_imports" not in found
    return list(found["layers"])


def imports(module: str, *, annotations: bool) -> Iterator[str]:
    """The modules of editcore that one imports anywhere in it: under ``TYPE_CHECKING`` too, or only there."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if annotations and id(node) not in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield from (name for name in (f"{node.module}.{alias.name}", node.module) if name in MODULES)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def home(name: str, of: str) -> str:
    """The module that a name is re-exported from: ``from editcore.models import LanguageModel``."""
    stub = MODULES[name].with_suffix(".pyi")
    if stub.is_file():
        for node in ast.parse(stub.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and of in {alias.name for alias in node.names}:
                return f"{name}.{node.module}"
    return name


def graph() -> dict[str, set[str]]:
    """Every module with those that it imports, through the rooms' lists of names and in annotations too."""
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                for alias in node.names:
                    target = f"{node.module}.{alias.name}"
                    found[module].add(target if target in MODULES else home(node.module, alias.name))
        found[module] -= {module}
    return found


def test_the_root_holds_rooms_and_at_most_three_loose_modules() -> None:
    loose = [path.name for path in HOUSE.glob("*.py") if path.stem not in ("__init__", "__main__")]
    assert len(loose) <= 3, loose


def test_the_contract_knows_every_room() -> None:
    assert sorted(layers()) == ROOMS


def test_only_the_annotations_of_interfaces_look_up() -> None:
    order = layers()
    complaints = []
    for module in MODULES:
        room, *_ = module.removeprefix("editcore.").split(".")
        if room not in order or room == "interfaces":
            continue
        for target in imports(module, annotations=True):
            other, *_ = target.removeprefix("editcore.").split(".")
            if other in order and order.index(other) < order.index(room):
                complaints.append(f"{module} names {target}")
    assert not complaints


def test_no_module_is_part_of_a_circle() -> None:
    edges = graph()
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == 2:
            return
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        for target in sorted(edges.get(module, ())):
            visit(target, (*path, module))
        state[module] = 2

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = (HOUSE / room / "__init__.py").read_text(encoding="utf-8")
    assert (ast.get_docstring(ast.parse(text)) or "").strip()
    private = [path.name for path in (HOUSE / room).glob("_*.py") if path.name != "__init__.py"]
    assert not private, "a module inside a room is private to it only with a reason"


def test_what_a_room_lists_is_there() -> None:
    rooms = [room for room in ROOMS if (HOUSE / room / "__init__.pyi").is_file()]
    code = (
        "import importlib, json\n"
        f"rooms = {{name: importlib.import_module('editcore.' + name) for name in {rooms}}}\n"
        "[getattr(room, name) for room in rooms.values() for name in room.__all__]\n"
        "print(json.dumps({name: room.__all__ for name, room in rooms.items()}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for room, names in json.loads(done.stdout).items():
        assert names
        # A function that is called like its module would be hidden by it, depending on what was imported first.
        assert not set(names) & {path.stem for path in (HOUSE / room).glob("*.py")}


def test_the_page_draws_the_rooms_in_their_order() -> None:
    picture = PAGE.read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    assert [line.split()[0] for line in picture.splitlines()] == layers()


# The walk of one request


def test_the_page_walks_as_a_run_does(tmp_path: Path) -> None:
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    described = [module for _, module in rows]
    entered = walked(tmp_path)
    assert [module for module in entered if module in described] == described
    left_out = re.compile(r"editcore\.(interfaces|_util)\..*|edit_\w+\.plugin")
    assert [module for module in entered if module not in described and not left_out.fullmatch(module)] == []


def walked(folder: Path) -> list[str]:
    """The modules of editcore and its plugins in the order in which a run first calls a function of theirs."""
    tiny_model().save(folder / "tiny")
    requests = tiny_requests(6)
    fields = {"subject", "prompt", "target_new", "target_true"}
    lines = [
        {**request.model_dump(mode="json", include=fields), "neighborhood_prompts": [requests[index - 1].text]}
        for index, request in enumerate(requests)
    ]
    (folder / "facts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    words = " ".join(request.text for request in requests).split()
    (folder / "corpus.txt").write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    options = (
        "--editor emmet --plugin replay --model tiny --dataset facts.jsonl --corpus corpus.txt --corpus-tokens 1000 "
        "--batch-size 3 --set layers=[1] --set v_num_grad_steps=3 --set context_count=2 --out out"
    )
    environment = {**os.environ, "EDITCORE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    code = f"import inspect, sys\n{inspect.getsource(trace)}\ntrace({options.split()!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def trace(options: list[str]) -> None:
    """Run ``editctl run`` and print the modules that were entered. (Runs in a process of its own.)"""
    entered: dict[str, None] = {}

    def note(frame: object, event: str, _argument: object) -> None:
        code = frame.f_code  # type: ignore[attr-defined]
        # Named functions of a file: no class bodies, no modules, no expressions, nothing that dataclasses generate.
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and "<" not in code.co_name + code.co_filename:
            module = frame.f_globals.get("__name__", "")  # type: ignore[attr-defined]
            if module.partition(".")[0] == "editcore" or module.startswith("edit_"):
                entered.setdefault(module)

    from editcore.cli import main

    sys.argv = ["editctl", "run", *options]
    sys.setprofile(note)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
    sys.stdout.write(" ".join(entered))
