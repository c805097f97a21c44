"""``editctl new``: what it writes installs, announces itself, passes its own tests and is used, as it is.

The packages are written in an empty folder by the command, installed into another one, and used as a stranger would.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import editcore
import pandas as pd
import pytest
from editcore import EditcoreError, Plugins
from editcore.plugins.scaffold import KINDS, create_package
from editcore.testing import tiny_model, tiny_requests
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
LONG = "a-method-with-a-name-of-30-let"
EDITOR = "my-editor"
NUM_FACTS = 4
OFFERS = {
    "editor": ["editcore_editors"],
    "backend": ["editcore_backends"],
    "extension": ["editcore_extensions"],
    "evaluator": ["editcore_evaluators"],
    "dataset": ["editcore_datasets"],
    "attachment": ["editcore_editors", "editcore_attachments"],
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def editctl(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from editcore.cli import main; main()", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=60
    )


class World:
    """A package of each kind, written into an empty folder and installed into another one, and a process that uses
    them."""

    def __init__(self, folder: Path, start_worker: Callable[..., Any]) -> None:
        self.folder = folder / "here"
        self.folder.mkdir()
        self.printed: dict[str, str] = {}
        for kind in KINDS:
            done = editctl("new", f"my-{kind}", "--kind", kind, cwd=self.folder)
            assert (done.returncode, done.stderr) == (0, "")
            self.printed[kind] = done.stdout
        site = folder / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site]
        subprocess.run([*pip, *(self.package(kind) for kind in KINDS)], check=True, timeout=300)
        (folder / "cache").mkdir()
        path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "EDITCORE_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        tiny_model().save(folder / "model")
        words = " ".join(request.text for request in tiny_requests(80))
        (folder / "corpus.txt").write_text(" ".join([words] * 3), encoding="utf-8")
        requests = tiny_requests(NUM_FACTS)
        with (folder / "facts.jsonl").open("w", encoding="utf-8") as file:
            for number, request in enumerate(requests):
                fields = request.model_dump(mode="json", include={"subject", "prompt", "target_new", "target_true"})
                others = {"neighborhood_prompts": [requests[number - 1].text], "id": f"f{number}"}
                file.write(json.dumps({**fields, **others}) + "\n")
        self.small = ["--model", folder / "model", "--batch-size", 2]
        self.facts = ["--dataset", folder / "facts.jsonl", "--edits", NUM_FACTS]
        self.with_editor = [
            "--editor", EDITOR, "--corpus", folder / "corpus.txt", "--corpus-tokens", 1000, "--set", "layers=[1]",
            "--set", "v_num_grad_steps=5", "--set", "context_count=2",
        ]  # fmt: skip
        self._worker = start_worker(sys.executable, self.folder, self.environment)
        self.ask, self.works, self.close = self._worker.ask, self._worker.works, self._worker.close

    def package(self, kind: str) -> Path:
        """Where it was written."""
        return self.folder / f"edit-my-{kind}"

    def run(self, kind: str, *options: object) -> Path:
        """The run that ``editctl new`` says to make, with options behind its own: the last ones win."""
        [line] = re.findall(r"^    editctl (run .*)$", self.printed[kind], re.MULTILINE)
        directory = self.folder.parent / f"run-{kind}"
        self.works(*shlex.split(line), *self.small, *options, "--out", directory)
        return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, start_worker: Callable[..., Any]) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("new"), start_worker)
    yield made
    made.close()


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of each kind under the longest name with the longest summary, and under the shortest ones."""
    folder = tmp_path_factory.mktemp("others")
    for kind in KINDS:
        create_package(LONG, kind=kind, folder=folder / f"long-{kind}", summary=f"{'x' * 89}.")
        create_package("x", kind=kind, folder=folder / f"short-{kind}", summary="X.")
    return folder


def sources(package: Path) -> list[Path]:
    return [path for path in package.rglob("*") if path.is_file()]


def summary_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return found


# What is written


def test_every_template_is_a_kind_and_none_of_its_files_is_a_module() -> None:
    templates = Path(str(files("editcore.plugins"))) / "templates"
    assert {path.name for path in templates.iterdir()} == {*KINDS, "common"}
    assert [path for path in sources(templates) if not path.name.endswith("-tpl") and path.suffix != ".pyc"] == []


@every_kind
def test_nothing_of_the_template_is_left(world: World, kind: str) -> None:
    package = world.package(kind)
    assert {"pyproject.toml", "README.md", "src", "tests"} <= {path.name for path in package.iterdir()}
    for path in sources(package):
        for text in (path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")):
            assert not re.search(r"template.?name|TEMPLATE|-tpl", text, re.IGNORECASE), path


@every_kind
def test_it_is_described_like_every_package(world: World, kind: str) -> None:
    package = world.package(kind)
    described = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert described["name"] == package.name
    assert described["entry-points"]["editcore"] == {f"my-{kind}": f"edit_my_{kind}.plugin"}
    assert described["description"] == KINDS[kind].summary
    assert (package / "README.md").read_text(encoding="utf-8").startswith(f"# edit-my-{kind}\n")
    assert (package / "src" / f"edit_my_{kind}" / "py.typed").is_file()


@pytest.mark.parametrize(
    ("version", "bounds"),
    [("0.1.0", ">=0.1.0,<0.2"), ("0.12.3", ">=0.12.3,<0.13"), ("1.4.2", ">=1.4.2,<2"), ("2.0.0rc1", ">=2.0.0rc1,<3")],
)
def test_it_asks_for_this_editcore_or_a_later_one_of_the_same_major_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, bounds: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"editcore": version}.__getitem__)
    text = (create_package("mine", kind="editor", folder=tmp_path) / "pyproject.toml").read_text(encoding="utf-8")
    [needed] = map(Requirement, tomllib.loads(text)["project"]["dependencies"])
    assert needed.name == "editcore"
    assert needed.specifier == SpecifierSet(bounds)
    assert needed.specifier.contains(version, prereleases=True)


def test_they_import_public_names_only(world: World) -> None:
    """``editcore`` and its rooms, and of these what their ``__init__.pyi`` lists."""
    imported = set()
    for path in world.folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("edit") for name in node.names), path
            elif isinstance(node, ast.ImportFrom) and re.match(r"editcore\b", node.module or ""):
                imported |= {(str(node.module), name.name) for name in node.names}
    assert imported
    assert all(module.count(".") <= 1 for module, _ in imported)
    for module, name in imported:
        assert name in importlib.import_module(module).__all__, f"{module}.{name}"


@every_kind
def test_what_the_readme_names_exists(world: World, kind: str) -> None:
    package = world.package(kind)
    text = (package / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"^\| `((?:src|tests)/\S+)` \|", text, re.MULTILINE):
        assert (package / path).exists(), path
    for name in re.findall(r"`editcore\.(\w+)`", text):
        assert hasattr(editcore, name), name


def test_ruff_finds_nothing_to_say(world: World, others: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", ROOT / "pyproject.toml"]
        done = subprocess.run([*ruff, world.folder, others], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


def test_mypy_finds_nothing_to_say(world: World) -> None:
    own = [world.package(kind) / "src" for kind in KINDS]
    core = sorted((ROOT / "packages").glob("*/src"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", ROOT / "pyproject.toml", *own],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, [*own, *core]))},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout


def test_the_summary_is_where_listings_find_it(tmp_path: Path) -> None:
    said = "Say 'no' to 90 % of all facts, {} included."
    done = editctl("new", "nay", "--kind", "extension", "--summary", said, "--out", tmp_path / "a" / "b", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    package = tmp_path / "a" / "b" / "edit-nay"
    assert f"Wrote {package}\n" in done.stdout
    assert f"pip install -e '{package}[test]'" in done.stdout
    described = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert described["description"] == said
    announced = ast.parse((package / "src" / "edit_nay" / "plugin.py").read_text(encoding="utf-8"))
    assert said in {node.value for node in ast.walk(announced) if isinstance(node, ast.Constant)}


# What is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("edit-mine", "--kind", "editor"), "Give the name without 'edit-', which the package gets by itself"),
        (("Mine", "--kind", "editor"), "found 'Mine'"),
        (("my_method", "--kind", "editor"), "found 'my_method'"),
        (("my--method", "--kind", "editor"), "found 'my--method'"),
        (("9lives", "--kind", "editor"), "a letter first"),
        (("../mine", "--kind", "editor"), "found '../mine'"),
        (("x" * 31, "--kind", "editor"), "30 at most"),
        (("mine", "--kind", "editer"), "Unknown kind of plugin 'editer'"),
        (("mine", "--kind", "common"), "Unknown kind of plugin 'common'"),
        (("raw", "--kind", "backend"), "The name 'raw' is taken by the plugin 'builtin' (editcore "),
        (("builtin", "--kind", "editor"), "The name 'builtin' is taken"),
        (("counterfact", "--kind", "dataset"), "The name 'counterfact' is taken"),
        (("mine", "--kind", "editor", "--summary", "no stop"), "ends with a full stop"),
        (("mine", "--kind", "editor", "--summary", ""), "ends with a full stop"),
        (("mine", "--kind", "editor", "--summary", "."), "ends with a full stop"),
        (("mine", "--kind", "editor", "--summary", 'A "quote".'), "no double quotes"),
        (("mine", "--kind", "editor", "--summary", "A line.\nAnother."), "is one line"),
        (("mine", "--kind", "editor", "--summary", f"{'x' * 90}."), "at most 90 letters"),
        (("mine", "--kind", "editor", "--out", "/dev/null"), "Cannot make /dev/null/edit-mine: "),
        (("there", "--kind", "editor"), "edit-there is already there"),
        (("empty", "--kind", "editor"), "edit-empty is already there"),
        (("file", "--kind", "editor"), "edit-file is already there"),
        (("nowhere", "--kind", "editor"), "edit-nowhere is already there"),
    ],
)
def test_what_cannot_be_written_is_told_in_one_sentence(
    world: World, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "edit-there").mkdir()
    (tmp_path / "edit-there" / "mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "edit-empty").mkdir()
    (tmp_path / "edit-file").touch()
    (tmp_path / "edit-nowhere").symlink_to(tmp_path / "no-such-folder")
    before = sorted(tmp_path.rglob("*"))
    done = world.ask("editctl", arguments=["new", "--out", str(tmp_path), *arguments])
    assert (done["code"], done["out"]) == (2, "")
    assert re.fullmatch(r"Error: .*\n", done["err"])
    assert sentence in done["err"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    written, write_text = [], Path.write_text

    def fail_later(path: Path, text: str, **more: Any) -> int:
        written.append(path)
        if len(written) == 4:
            raise failure
        return write_text(path, text, **more)

    monkeypatch.setattr(Path, "write_text", fail_later)
    with pytest.raises((EditcoreError, KeyboardInterrupt)):
        create_package("mine", kind="editor", folder=tmp_path)
    assert len(written) == 4
    assert list(tmp_path.iterdir()) == []


def test_without_an_editor_it_says_that_one_is_needed(tmp_path: Path) -> None:
    loaded = Plugins.load().listing()
    blocked = ",".join(row.name for row in loaded if "editcore_editors" in row.offers)
    for kind, expected in {"backend": "--editor EDITOR --backend mine", "editor": "--editor mine-too"}.items():
        name = "mine" if kind == "backend" else "mine-too"
        done = editctl("new", name, "--kind", kind, cwd=tmp_path, EDITCORE_DISABLE_PLUGINS=blocked)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert ("with an editor that you install" in done.stdout) == (kind == "backend")


# What it does


@every_kind
def test_it_announces_itself(world: World, kind: str) -> None:
    rows = {row["name"]: row for row in json.loads(world.works("plugins", "--json"))}
    row = rows[f"my-{kind}"]
    assert (row["distribution"], row["version"]) == (f"edit-my-{kind}", "0.1.0")
    assert (row["status"], row["reason"]) == ("active", "")
    assert row["offers"] == {hook: [f"my-{kind}"] for hook in OFFERS[kind]}
    assert KINDS[kind].summary in " ".join(world.works("describe", f"my-{kind}").split())


def test_a_name_that_is_installed_is_not_given_again(world: World, tmp_path: Path) -> None:
    done = world.ask("editctl", arguments=["new", "my-editor", "--kind", "dataset", "--out", str(tmp_path)])
    assert done["code"] == 2
    assert "The name 'my-editor' is taken by the plugin 'my-editor' (edit-my-editor 0.1.0)." in done["err"]
    assert list(tmp_path.iterdir()) == []


def test_their_own_tests_pass(world: World) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist"]
    packages = [world.package(kind) for kind in KINDS]
    done = subprocess.run(
        [*command, "--import-mode=importlib", *packages],
        env=world.environment,
        cwd=world.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in KINDS:
        assert re.search(rf"^PASSED .*::TestMy{kind.capitalize()}\w*Contract::", done.stdout, re.MULTILINE)


def test_the_editor_makes_targets_likelier(world: World) -> None:
    frame = pd.read_parquet(world.run("editor", *world.with_editor, *world.facts) / "results.parquet")
    losses = frame[frame["metric"] == "rewrite_nll_new"].groupby("phase")["value"].mean()
    assert losses["after"] < losses["before"]


def test_the_backend_gives_the_bits_of_the_built_in_one(world: World) -> None:
    directory = world.run("backend", *world.with_editor, *world.facts)
    assert summary_of(directory)["extensions"]["my-backend"]["active_batches"] == NUM_FACTS // 2
    raw = world.folder.parent / "run-raw"
    world.works("run", *world.small, *world.with_editor, *world.facts, "--out", raw)
    prompts = [request.text for request in tiny_requests(NUM_FACTS)]
    found, expected = (world.ask("state", directory=str(run), prompts=prompts) for run in (directory, raw))
    assert found == expected
    assert found["now"] != found["base"]
    for steps in ("undo f0", "undo f3", "redo f0"):
        world.works("ledger", directory, *steps.split())
        world.works("ledger", raw, *steps.split())
    found, expected = (world.ask("state", directory=str(run), prompts=prompts) for run in (directory, raw))
    assert found == expected


def test_the_extension_counts_what_the_run_has(world: World) -> None:
    directory = world.run("extension", *world.with_editor, *world.facts)
    assert summary_of(directory)["extensions"]["my-extension"] == {"batches": NUM_FACTS // 2, "facts": NUM_FACTS}


def test_the_evaluators_metrics_are_in_the_table_and_the_files(world: World) -> None:
    summary = summary_of(world.run("evaluator", *world.with_editor, *world.facts))
    assert summary["before"]["likelier"] is None
    assert summary["after"]["surprise"] < summary["before"]["surprise"]
    assert 50 <= summary["after"]["likelier"] <= 100


def test_the_data_set_is_edited_and_its_questions_are_asked(world: World) -> None:
    directory = world.run("dataset", *world.with_editor)
    lines = (directory / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["request"]["id"] for line in lines] == ["curie", "turing", "hugo"]
    frame = pd.read_parquet(directory / "results.parquet")
    assert {"rewrite", "paraphrase", "neighborhood", "portability.reasoning"} <= set(frame["kind"])


def test_the_attachment_makes_the_model_say_the_targets(world: World) -> None:
    directory = world.run("attachment", *world.facts)
    summary = summary_of(directory)
    assert summary["before"]["rewrite_acc"] < summary["after"]["rewrite_acc"] == 100
    request = tiny_requests(1)[0]
    said = world.works("generate", directory, request.text, "--tokens", 4)
    [edited] = [line for line in said.splitlines() if line.startswith("edited")]
    assert request.target_new in edited
