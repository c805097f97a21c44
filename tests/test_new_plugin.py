"""``tools/new_plugin.py``: what it creates passes the linters and its own tests, and can be announced as it is."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from editcore import Plugins

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "new_plugin.py"
LONG = "a-method-with-a-name-of-30-let"
KINDS = ("editor", "extension")


def new_plugin(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def created(folder: Path, name: str, kind: str) -> Path:
    done = new_plugin(name, "--kind", kind, "--packages", folder)
    assert done.returncode == 0, done.stderr
    assert f"edit-{name}" in done.stdout
    assert f"edit_{name.replace('-', '_')}" in done.stdout
    return folder / f"edit-{name}"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package of each kind, under a short and a long name."""
    folder = tmp_path_factory.mktemp("packages")
    for kind in KINDS:
        created(folder, f"my-{kind}", kind)
    created(folder, LONG, "editor")
    created(folder, "x", "extension")
    return folder


@pytest.fixture
def importable(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The packages' sources on the path, and gone from it afterwards."""
    before = set(sys.modules)
    for package in packages.iterdir():
        monkeypatch.syspath_prepend(str(package / "src"))
    yield
    for name in set(sys.modules) - before:
        if name.startswith("edit_my_"):
            del sys.modules[name]


def test_nothing_of_the_template_is_left(packages: Path) -> None:
    for path in packages.rglob("*"):
        assert "template" not in path.relative_to(packages).as_posix()
        if path.is_file():
            assert not re.search(r"template.name|template summary", path.read_text(encoding="utf-8"), re.IGNORECASE)


def test_ruff_finds_nothing_to_say(packages: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*ruff, str(packages)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


def test_mypy_finds_nothing_to_say(packages: Path) -> None:
    sources = [packages / f"edit-my-{kind}" / "src" for kind in KINDS]
    ours = sorted((ROOT / "packages").glob("*/src"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), *map(str, sources)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, [*sources, *ours]))},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("importable")
def test_it_is_announced_without_being_installed(kind: str) -> None:
    entry = EntryPoint(f"my-{kind}", f"edit_my_{kind}.plugin", "editcore")
    plugins = Plugins.load(entry_points=[entry])
    [row] = plugins.listing()
    assert (row.status, row.reason) == ("active", "")
    assert row.offers == {f"editcore_{kind}s": (f"my-{kind}",)}
    spec = plugins.editor("my-editor") if kind == "editor" else plugins.extension("my-extension")
    assert spec.summary.endswith(".")
    for target in (spec.target, spec.hparams):
        assert target is not None
        module, _, attribute = target.partition(":")
        assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_described_like_every_package(packages: Path, kind: str) -> None:
    package = packages / f"edit-my-{kind}"
    described = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert described["name"] == package.name
    assert described["entry-points"]["editcore"] == {f"my-{kind}": f"edit_my_{kind}.plugin"}
    assert (package / "README.md").read_text(encoding="utf-8").startswith(f"# edit-my-{kind}\n")
    assert (package / "src" / f"edit_my_{kind}" / "py.typed").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_tests_pass(packages: Path, tmp_path: Path, kind: str) -> None:
    package = packages / f"edit-my-{kind}"
    tests = sorted((package / "tests").glob("test_*.py"))
    # As an installer would leave it: sources and entry point on the path.
    info = tmp_path / f"edit_my_{kind}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: edit-my-{kind}\nVersion: 0.1.0\n", encoding="utf-8")
    entry = f"[editcore]\nmy-{kind} = edit_my_{kind}.plugin\n"
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *map(str, tests)],
        capture_output=True,
        text=True,
        cwd=package,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package / "src"), str(tmp_path)])},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("edit-mine", "--kind", "editor"), "Give the name without 'edit-': mine"),
        (("Mine", "--kind", "editor"), "'Mine' does not do as a name"),
        (("my_method", "--kind", "editor"), "'my_method' does not do as a name"),
        (("x" * 31, "--kind", "editor"), "at most 30 in all"),
        (("my-editor", "--kind", "editor"), "exists already"),
        (("mine", "--kind", "editor", "--summary", "no stop"), "one sentence with a full stop"),
        (("mine", "--kind", "editor", "--summary", 'A "quote".'), "without quotes"),
    ],
)
def test_what_cannot_be_created_is_one_sentence(packages: Path, arguments: tuple[str, ...], sentence: str) -> None:
    before = sorted(packages.rglob("*"))
    done = new_plugin(*arguments, "--packages", packages)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert sentence in done.stderr
    assert sorted(packages.rglob("*")) == before
