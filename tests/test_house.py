"""The rooms of editcore: what may import what, and the page that describes them."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from editcore.testing import tiny_model, tiny_requests

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "explanation" / "architecture.md"


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
HOUSE = TOOL.House(ROOT / "packages" / "editcore" / "src" / "editcore")
ROOMS: list[str] = HOUSE.rooms()
ORDER: list[str] = TOOL.layers(ROOT)


def test_the_root_holds_rooms_and_at_most_three_loose_modules() -> None:
    assert len(HOUSE.loose()) <= 3, HOUSE.loose()


def test_the_contract_knows_every_room_and_no_exception() -> None:
    assert sorted(ORDER) == ROOMS
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_no_import_looks_up_and_only_the_annotations_of_interfaces_do() -> None:
    assert HOUSE.upward(ORDER, annotations=False) == []
    assert {HOUSE.room(found.source) for found in HOUSE.upward(ORDER, annotations=True)} == {"interfaces"}


def test_no_module_is_part_of_a_circle() -> None:
    assert HOUSE.circles() == []


@pytest.mark.parametrize("where", ["", "def f():\n    ", "if TYPE_CHECKING:\n    "])
def test_circles_and_imports_upward_are_noticed_wherever_they_stand(tmp_path: Path, where: str) -> None:
    package = tmp_path / "small"
    for room, content in {"low": f"{where}from small.high.a import A", "high": "from small.low import a"}.items():
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
        (package / room / "a.py").write_text(f"{content}\n", encoding="utf-8")
    (package / "__init__.py").touch()
    house = TOOL.House(package)
    assert house.circles() == [["small.high.a", "small.low.a"]]
    [found] = house.upward(["high", "low"], annotations="TYPE" in where)
    assert (found.source, found.target) == ("small.low.a", "small.high.a")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        TOOL.main([str(tmp_path)])
    assert end.value.code == 2
    assert "is no checkout of editcore" in capsys.readouterr().err


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = (HOUSE.package / room / "__init__.py").read_text(encoding="utf-8")
    assert (ast.get_docstring(ast.parse(text)) or "").strip()
    private = [path.name for path in (HOUSE.package / room).glob("_*.py") if path.name != "__init__.py"]
    assert not private, "a module inside a room is private to it only with a reason"


def test_what_a_room_lists_is_there() -> None:
    rooms = [room for room in ROOMS if (HOUSE.package / room / "__init__.pyi").is_file()]
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
        assert not set(names) & {path.stem for path in (HOUSE.package / room).glob("*.py")}


def test_the_page_draws_the_rooms_in_their_order() -> None:
    picture = PAGE.read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    assert [line.split()[0] for line in picture.splitlines()] == ORDER


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
