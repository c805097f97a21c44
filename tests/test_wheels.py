"""The wheels: what is in them, that each plugin's works beside editcore's and nothing else of ours, and that each can
be taken away from the others. At the end, a stranger's hour: from these wheels to a comparison with an own editor.
"""

from __future__ import annotations

import email
import json
import os
import re
import shlex
import subprocess
import sysconfig
import zipfile
from collections.abc import Callable, Sequence
from email.message import Message
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from editcore.plugins.scaffold import KINDS
from editcore.testing import tiny_model

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
PLUGINS = [package.name for package in PACKAGES if package.name != "editcore"]
SOLVING = {"emmet", "memit", "rome"}
"""As in ``use_plugins.py``."""
EDITORS = {name: {name} for name in ("alphaedit", "emmet", "ft", "memory", "retrieval", "rome", "ultra")}
EDITORS["memit"] = {"memit", "memit-seq"}
"""Editors by plugin."""
USE = ROOT / "tests" / "use_plugins.py"
GUIDE = ROOT / "docs" / "plugins" / "write-a-plugin.md"


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    """What a command prints, run outside the repository and blind to what else is set up here; ``more`` is added to its
    environment."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "EDITCORE_DISABLE_PLUGINS"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    environment = {**kept, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=900
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(
    tmp_path_factory: pytest.TempPathFactory, build_wheels: Callable[[Path, Sequence[Path]], dict[str, Path]]
) -> dict[str, Path]:
    """A wheel of every package, by the package's name."""
    return build_wheels(tmp_path_factory.mktemp("wheels"), PACKAGES)


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


@pytest.fixture(scope="module")
def install(
    tmp_path_factory: pytest.TempPathFactory,
    others: Path,
    wheels: dict[str, Path],
    make_environment: Callable[..., Path],
) -> Callable[..., Path]:
    """Makes a new environment that has what is installed here, and of ours only the packages named; gives its
    ``bin``."""

    def make(*packages: str) -> Path:
        chosen = [wheels[package] for package in packages]
        return make_environment(tmp_path_factory.mktemp("environment") / "venv", chosen, beside=others).parent

    return make


@pytest.fixture(scope="module")
def alone(install: Callable[..., Path]) -> Path:
    """``bin`` of an environment that has editcore, and nothing else of ours."""
    return install("editcore")


def test_editcore_and_emmet_alone_list_emmet_and_not_replay(install: Callable[..., Path]) -> None:
    fresh = install("editcore", "edit-emmet")
    listed = run(fresh / "editctl", "editors", cwd=fresh)
    assert [line.split()[0] for line in listed.splitlines()[1:]] == ["emmet"]
    assert "replay" not in run(fresh / "editctl", "plugins", cwd=fresh)


def test_all_wheels_are_installed_together(install: Callable[..., Path], wheels: dict[str, Path]) -> None:
    fresh = install(*wheels)
    rows = {row["name"]: row for row in json.loads(run(fresh / "editctl", "plugins", "--json", cwd=fresh))}
    check_rows(rows, wheels, {"editcore", *PLUGINS})
    [site] = fresh.parent.glob("lib/python*/site-packages")
    code = "import importlib.util, sys; print(*[importlib.util.find_spec(name).origin for name in sys.argv[1:]])"
    found = run(fresh / "python", "-c", code, *(name.replace("-", "_") for name in wheels), cwd=fresh).split()
    assert found == [str(site / name.replace("-", "_") / "__init__.py") for name in wheels]


def check_rows(rows: dict[str, dict[str, Any]], wheels: dict[str, Path], packages: set[str]) -> None:
    """Each package is announced by its wheel, and takes part."""
    assert {row["distribution"] for row in rows.values()} == packages
    assert set(rows) == {"builtin", *(package.removeprefix("edit-") for package in packages - {"editcore"})}
    for name, row in rows.items():
        assert row["distribution"] == ("editcore" if name == "builtin" else f"edit-{name}")
        assert (row["status"], row["reason"]) == ("active", "")
        assert row["version"] == metadata(wheels[row["distribution"]])["Version"]
        assert row["offers"]


@pytest.fixture(scope="module")
def sites(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the content of its wheel for each plugin, by the plugin's name."""
    folders = {package.removeprefix("edit-"): tmp_path_factory.mktemp(package) for package in PLUGINS}
    for name, site in folders.items():
        with zipfile.ZipFile(wheels[f"edit-{name}"]) as wheel:
            wheel.extractall(site)
    return folders


@pytest.fixture(scope="module")
def used(
    alone: Path, sites: dict[str, Path], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    """What ``use_plugins.py`` says beside the editcore of its wheel, by plugin and by what is done to it."""
    folders = [f"{name}={site}" for name, site in sites.items()]
    cache = tmp_path_factory.mktemp("cache")
    printed = run(alone / "python", USE, tiny_corpus, *folders, cwd=alone, EDITCORE_CACHE=str(cache))
    return {(line["plugin"], line["how"]): line for line in map(json.loads, printed.splitlines())}


@pytest.mark.parametrize("package", PLUGINS)
def test_a_plugin_works_beside_editcore_alone(
    used: dict[tuple[str, str], dict[str, Any]], wheels: dict[str, Path], sites: dict[str, Path], package: str
) -> None:
    name = package.removeprefix("edit-")
    found = used[name, "alone"]
    check_rows(found["rows"], wheels, {"editcore", package})
    assert found["imported"] == {package.replace("-", "_"): str(sites[name])}
    assert found["edited"] == {editor: works({name}) for editor in EDITORS.get(name, ())}


def works(plugins: set[str]) -> dict[str, object]:
    """What ``use_plugins.py`` says of an editor beside these plugins, if all of them take part."""
    return {
        "backend": "lora" if "lora" in plugins else "raw",
        "replayed": int("replay" in plugins),
        "verdicts": sorted({"trust"} & plugins),
        "likelier": True,
        "restored": True,
        "active": 1,
    }


@pytest.mark.parametrize("how", ["absent", "disabled"])
def test_without_any_one_plugin_the_others_work(
    used: dict[tuple[str, str], dict[str, Any]], sites: dict[str, Path], how: str
) -> None:
    """Absent: its wheel is not there. Disabled: it is, and EDITCORE_DISABLE_PLUGINS names it."""
    for name in sites:
        found, rest = used[name, how], set(sites) - {name}
        blocked = {name: "blocked"} if how == "disabled" else {}
        states = {plugin: row["status"] for plugin, row in found["rows"].items()}
        assert states == {**dict.fromkeys(("builtin", *rest), "active"), **blocked}
        assert found["edited"] == {editor: works(rest) for editor in SOLVING & rest}
        assert found["imported"] == {f"edit_{plugin}": str(sites[plugin]) for plugin in rest}


START_EACH = """
import sys
from editcore.cli import main
for kind in sys.argv[1:]:
    sys.argv = ["editctl", "new", f"my-{kind}", "--kind", kind]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
"""


def test_editcores_wheel_alone_starts_a_plugin_of_every_kind(alone: Path, tmp_path: Path) -> None:
    printed = run(alone / "python", "-c", START_EACH, *KINDS, cwd=tmp_path)
    for kind in KINDS:
        assert f"Wrote edit-my-{kind}" in printed
        source = tmp_path / f"edit-my-{kind}" / "src" / f"edit_my_{kind}"
        assert {"__init__.py", "plugin.py", "py.typed"} <= {path.name for path in source.iterdir()}
        assert (tmp_path / f"edit-my-{kind}" / "tests" / "test_contract.py").is_file()


def test_importing_editcore_from_its_wheel_imports_nothing_heavy(alone: Path) -> None:
    code = "import sys, editcore; print(editcore.__file__, *{'torch', 'transformers', 'pandas'} & set(sys.modules))"
    printed = run(alone / "python", "-c", code, cwd=alone).split()
    assert len(printed) == 1
    assert printed[0].startswith(str(alone.parent))


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
        assert {"editcore/datasets/worldfacts.jsonl", "editcore/datasets/profiles.jsonl"} <= found


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


# A stranger's hour


def the_guides_commands() -> list[str]:
    """Those of the guide's last section, as they stand there."""
    section = GUIDE.read_text(encoding="utf-8").partition("\n## From nothing to a comparison\n")[2]
    [block] = re.findall(r"^```console\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for line in block.splitlines()]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that has the default model already: a tiny one with as many blocks as the presets speak of."""
    folder = tmp_path / "cache" / "models" / "smollm2-135m"
    tiny_model(num_layers=6).save(folder)
    (folder / "editcore.json").write_text("{}", encoding="utf-8")
    return tmp_path / "cache"


def test_the_guide_leads_from_nothing_to_a_comparison(
    install: Callable[..., Path], wheels: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Its commands as they stand there, in an empty folder and an environment without anything of ours. In place of the
    default model stands a tiny one, and in place of the index a folder of wheels."""
    commands, fresh, folder = the_guides_commands(), install(), tmp_path / "empty"
    assert len(commands) < 10
    folder.mkdir()
    environment = {
        "EDITCORE_CACHE": str(cache),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels["editcore"].parent),
        "PIP_NO_BUILD_ISOLATION": "0",  # as if --no-build-isolation were given: pip reads it the other way round
    }
    printed = {}
    for command in commands:
        program, *arguments = shlex.split(command)
        own = [fresh / program] if program == "editctl" else [fresh / "python", "-m", program]
        printed[program, arguments[0]] = run(*own, *arguments, cwd=folder, **environment)
    assert " passed" in printed["pytest", "./edit-my-method"]
    rows = printed["editctl", "plugins"].splitlines()
    assert [line.split()[:4] for line in rows if line.startswith("my-method")] == [
        ["my-method", "edit-my-method", "0.1.0", "active"]
    ]
    assert "ridge" in printed["editctl", "describe"]
    [summary] = folder.glob("runs/my-method-*/summary.json")
    assert json.loads(summary.read_text(encoding="utf-8"))["edits"] == 10
    table = pd.read_csv(folder / "runs" / "compare" / "comparison" / "comparison_mean.csv")
    assert table["arm"].tolist() == ["unedited", "emmet", "memit", "memit-seq", "my-method", "rome"]
    assert table["score"].notna().all()
    page = (folder / "runs" / "compare" / "report" / "index.html").read_text(encoding="utf-8")
    assert "my-method" in page
