"""The wheels: what is in them, and that each plugin's works beside editcore's and nothing else of ours."""

from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from editcore.plugins.scaffold import KINDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
PLUGINS = [package.name for package in PACKAGES if package.name != "editcore"]


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, run outside the repository and blind to what else is set up here."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "EDITCORE_DISABLE_PLUGINS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"COLUMNS": "200"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of every package, by the package's name."""
    built = {}
    for package in PACKAGES:
        out = tmp_path_factory.mktemp(package.name)
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, package, cwd=out)
        [built[package.name]] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed here, without anything that announces itself to editcore: a folder of links."""
    overlay = tmp_path_factory.mktemp("others")
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(site).iterdir():
            if path.suffix != ".pth" and not announces_plugins(path):
                (overlay / path.name).symlink_to(path)
    return overlay


def announces_plugins(path: Path) -> bool:
    entry_points = path / "entry_points.txt"
    if path.name.startswith(("edit_", "editcore")):
        return True
    return path.suffix == ".dist-info" and entry_points.exists() and "[editcore]" in entry_points.read_text("utf-8")


@pytest.fixture
def fresh(tmp_path: Path, others: Path) -> Path:
    """The ``bin`` folder of a new environment that has what is installed here but nothing of ours."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    [site] = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{others}\n", encoding="utf-8")
    return home / "bin"


def install(fresh: Path, *wheels: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", fresh / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", *wheels, cwd=fresh)


def test_editcore_and_emmet_alone_list_emmet_and_not_replay(fresh: Path, wheels: dict[str, Path]) -> None:
    install(fresh, wheels["editcore"], wheels["edit-emmet"])
    listed = run(fresh / "editctl", "editors", cwd=fresh)
    assert [line.split()[0] for line in listed.splitlines()[1:]] == ["emmet"]
    assert "replay" not in run(fresh / "editctl", "plugins", cwd=fresh)


@pytest.mark.parametrize("package", PLUGINS)
def test_a_plugin_works_beside_editcore_alone(fresh: Path, wheels: dict[str, Path], package: str) -> None:
    install(fresh, wheels["editcore"], wheels[package])
    rows = {row["name"]: row for row in json.loads(run(fresh / "editctl", "plugins", "--json", cwd=fresh))}
    name = package.removeprefix("edit-")
    assert set(rows) == {"builtin", name}
    assert (rows["builtin"]["distribution"], rows[name]["distribution"]) == ("editcore", package)
    for row in rows.values():
        assert (row["status"], row["reason"]) == ("active", "")
        assert row["version"] == metadata(wheels[row["distribution"]])["Version"]
        assert row["offers"]
    module = package.replace("-", "_")
    where = run(fresh / "python", "-c", f"import {module}; print({module}.__file__)", cwd=fresh)
    assert where.startswith(str(fresh.parent))


def test_editcores_wheel_alone_starts_a_plugin_of_every_kind(
    fresh: Path, wheels: dict[str, Path], tmp_path: Path
) -> None:
    install(fresh, wheels["editcore"])
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for kind in KINDS:
        assert f"Wrote edit-my-{kind}" in run(fresh / "editctl", "new", f"my-{kind}", "--kind", kind, cwd=folder)
        source = folder / f"edit-my-{kind}" / "src" / f"edit_my_{kind}"
        assert {"__init__.py", "plugin.py", "py.typed"} <= {path.name for path in source.iterdir()}
        assert (folder / f"edit-my-{kind}" / "tests" / "test_contract.py").is_file()


def test_importing_editcore_from_its_wheel_imports_nothing_heavy(fresh: Path, wheels: dict[str, Path]) -> None:
    install(fresh, wheels["editcore"])
    code = "import sys, editcore; print(editcore.__file__, *{'torch', 'transformers', 'pandas'} & set(sys.modules))"
    printed = run(fresh / "python", "-c", code, cwd=fresh).split()
    assert len(printed) == 1
    assert printed[0].startswith(str(fresh.parent))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_wheel_holds_the_whole_source_and_no_more(wheels: dict[str, Path], package: Path) -> None:
    source = package / "src"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    expected = {file for file in files if "__pycache__" not in file and ".dist-info/" not in file}
    with zipfile.ZipFile(wheels[package.name]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected
    module = package.name.replace("-", "_")
    assert f"{module}/py.typed" in found
    if package.name == "editcore":
        assert "editcore/datasets/worldfacts.jsonl" in found


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_wheel_says_what_it_is(wheels: dict[str, Path], package: Path) -> None:
    said = metadata(wheels[package.name])
    assert said["Name"] == package.name
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11"
    assert said["Summary"]
    assert said["Description-Content-Type"] == "text/markdown"
    if package.name != "editcore":
        assert any(requirement.startswith("editcore") for requirement in said.get_all("Requires-Dist", []))


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))
