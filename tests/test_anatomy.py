"""Every package is built alike, and the few bans that no linter knows hold everywhere."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
PLUGINS = [package for package in PACKAGES if package.name != "editcore"]
SOURCES = sorted(path for package in PACKAGES for path in package.glob("src/**/*.py"))
CORE_THAT_IS_LIGHT = ["editcore", "editcore.interfaces", "editcore.settings", "editcore.locate_then_edit.hparams"]
HEAVY = ("torch", "transformers", "peft", "pandas", "matplotlib", "ray")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def project(package: Path) -> dict[str, Any]:
    return tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))


def module_of(package: Path) -> str:
    return package.name.replace("-", "_")


def every(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("package", paths, ids=lambda path: path.name)


@every(PACKAGES)
def test_a_package_has_the_files_that_all_have(package: Path) -> None:
    source = package / "src" / module_of(package)
    assert [path.name for path in (package / "src").iterdir() if path.suffix != ".egg-info"] == [source.name]
    assert (source / "__init__.py").is_file()
    assert (source / "py.typed").is_file()
    assert (package / "README.md").read_text(encoding="utf-8").startswith(f"# {package.name}\n")
    assert list((package / "tests").glob("test_*.py"))


@every(PACKAGES)
def test_a_package_is_described_like_all(package: Path) -> None:
    found = project(package)
    assert found["build-system"] == {"requires": ["hatchling"], "build-backend": "hatchling.build"}
    described = found["project"]
    assert described["name"] == package.name
    assert described["readme"] == "README.md"
    assert described["requires-python"] == ">=3.11"
    assert described["license"] == "Apache-2.0"
    assert described["description"].endswith(".")
    assert found["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [f"src/{module_of(package)}"]


@every(PLUGINS)
def test_a_plugin_announces_itself_under_its_folders_name(package: Path) -> None:
    described = project(package)["project"]
    name = package.name.removeprefix("edit-")
    assert f"edit-{name}" == package.name
    assert described["entry-points"]["editcore"] == {name: f"{module_of(package)}.plugin"}
    assert any(re.match(r"editcore\b", requirement) for requirement in described["dependencies"])


@every(PLUGINS)
def test_a_plugin_has_the_anatomy_of_plugins(package: Path) -> None:
    source = package / "src" / module_of(package)
    lines = (source / "plugin.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) < 30
    assert (source / "hparams.py").is_file()
    assert any((source / f"{kind}.py").is_file() for kind in ("editor", "extension", "backend", "executor"))


@every(PACKAGES)
def test_announcing_imports_nothing_heavy(package: Path) -> None:
    module = module_of(package)
    light = [f"{module}.plugin", f"{module}.hparams"] if package in PLUGINS else CORE_THAT_IS_LIGHT
    code = f"import sys, {', '.join(light)}; print(*{{*{HEAVY}}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@every(PACKAGES)
def test_the_tools_know_a_package(package: Path) -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert name_of(package / "src") in tools["mypy"]["mypy_path"]
    assert module_of(package) in tools["importlinter"]["root_packages"]
    if package in PLUGINS:
        [core, plugins, _] = tools["importlinter"]["contracts"]
        assert module_of(package) in core["forbidden_modules"]
        assert module_of(package) in plugins["modules"]


def test_every_direct_dependency_is_pinned() -> None:
    pins = requirements(ROOT / "constraints.txt")
    assert all("==" in pin for pin in pins.values())
    needed = requirements(ROOT / "requirements.txt")
    for package in PACKAGES:
        needed |= {word(line): line for line in project(package)["project"]["dependencies"]}
    assert set(needed) - {package.name for package in PACKAGES} <= set(pins)


def requirements(path: Path) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {word(line): line for line in lines if line and not line.startswith("-")}


def word(requirement: str) -> str:
    """The package that a requirement is about."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return found[0].lower().replace("_", "-")


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert re.fullmatch(r"make (--\S+ )*test", lines[-1])


def test_make_alone_lists_what_it_makes() -> None:
    listed = subprocess.run(["make"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert listed.returncode == 0
    targets = {line.split()[1] for line in listed.stdout.splitlines()}
    assert {"demo", "test", "lint", "wheels", "clean"} <= targets


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_file_keeps_the_bans(path: Path) -> None:
    """No pickle, and no device by name outside the command line (docstrings may speak of both)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    complaints = [*pickles(tree), *([] if "cli" in path.parts else devices(tree))]
    assert not complaints, "\n".join(f"{name_of(path)}:{complaint}" for complaint in complaints)


PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def pickles(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                imported = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module)):
                imported = [module]
            case _:
                imported = []
        for name in imported:
            if name.partition(".")[0] in PICKLERS:
                yield f"{node.lineno}: imports {name}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            yield from pickling_calls(node)


def pickling_calls(call: ast.Call) -> Iterator[str]:
    called = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if called == "torch.save" or called.endswith((".to_pickle", ".read_pickle")):
        yield f"{call.lineno}: calls {called}"
    if called == "torch.load" and given.get("weights_only") != "True":
        yield f"{call.lineno}: calls torch.load without weights_only=True"
    if given.get("allow_pickle", "False") != "False":
        yield f"{call.lineno}: calls {called} with allow_pickle"


def devices(tree: ast.Module) -> Iterator[str]:
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose and re.fullmatch(r"cuda(:\d+)?", text):
                yield f"{node.lineno}: names the device {text!r}"


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import pickle", "imports pickle"),
        ("from joblib import load", "imports joblib"),
        ("torch.load(path)", "without weights_only=True"),
        ("torch.save(x, path)", "calls torch.save"),
        ("np.load(path, allow_pickle=True)", "with allow_pickle"),
        ("frame.to_pickle(path)", "calls frame.to_pickle"),
        ("device = 'cuda'", "names the device 'cuda'"),
        ("def f(device='cuda:0'): ...", "names the device 'cuda:0'"),
    ],
)
def test_the_bans_are_noticed(code: str, complaint: str) -> None:
    tree = ast.parse(code)
    [found] = [*pickles(tree), *devices(tree)]
    assert complaint in found


@pytest.mark.parametrize("code", ["torch.load(path, weights_only=True)", "'''On cuda.'''", "x = 'no cuda here'"])
def test_what_is_allowed_is_not_noticed(code: str) -> None:
    tree = ast.parse(code)
    assert not [*pickles(tree), *devices(tree)]


# What plugins are made with


def next_major(version: str) -> str:
    """The first version that may break plugins (docs/explanation/compatibility.md)."""
    major, minor, *_ = version.split(".")
    return f"0.{int(minor) + 1}" if major == "0" else str(int(major) + 1)


@pytest.mark.parametrize(("version", "bound"), [("0.1.0", "0.2"), ("0.9.3", "0.10"), ("1.4.2", "2")])
def test_the_next_major_version_is_the_minor_one_before_1(version: str, bound: str) -> None:
    assert next_major(version) == bound


BOUNDED = [*PLUGINS, *sorted(path.parent for path in ROOT.glob("tests/third_party/*/pyproject.toml"))]


@every(BOUNDED)
def test_a_plugin_says_which_editcore_it_was_made_for(package: Path) -> None:
    version = project(ROOT / "packages" / "editcore")["project"]["version"]
    [requirement] = [line for line in project(package)["project"]["dependencies"] if word(line) == "editcore"]
    assert re.fullmatch(rf"editcore>=[\d.]+,<{re.escape(next_major(version))}", requirement)


def code_of_pages() -> list[tuple[str, str]]:
    pages = sorted((ROOT / "docs" / "plugins").glob("*.md"))
    blocks = [
        (page, re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL))
        for page in pages
    ]
    return [(f"{page.stem} {number}", block) for page, found in blocks for number, block in enumerate(found)]


def code_of_plugins() -> list[tuple[str, str]]:
    paths = [path for path in SOURCES if path.relative_to(ROOT).parts[1] != "editcore"]
    return [(name_of(path), path.read_text(encoding="utf-8")) for path in paths]


def not_public(code: str) -> Iterator[str]:
    """Imports of editcore that are no names which it, or a room of it, lists."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.startswith("editcore."))
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] == "editcore":
                listed = importlib.import_module(module).__all__ if module.count(".") <= 1 else ()
                yield from (f"{module}.{name.name}" for name in names if name.name not in listed)


@pytest.mark.parametrize(
    ("where", "code"), [pytest.param(where, code, id=where) for where, code in [*code_of_plugins(), *code_of_pages()]]
)
def test_a_plugin_imports_public_names_only(where: str, code: str) -> None:
    assert list(not_public(code)) == []


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("from editcore.models.layout import ModelLayout", "editcore.models.layout.ModelLayout"),
        ("def f():\n    from editcore.models import detect", "editcore.models.detect"),
        ("if TYPE_CHECKING:\n    from editcore._util.files import write_text", "editcore._util.files.write_text"),
        ("import editcore.models", "editcore.models"),
    ],
)
def test_what_is_not_public_is_noticed(code: str, complaint: str) -> None:
    assert list(not_public(code)) == [complaint]
