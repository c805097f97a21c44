"""What a user has: a folder with a model, a file of facts, a text, and editctl."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of three blocks, with its tokenizer, as ``save_pretrained`` writes them."""
    from editcore.testing import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six facts that the tiny tokenizer knows, in the schema of CounterFact."""
    from editcore.testing import tiny_requests

    others = tiny_requests(20)[-2:]
    lines = [
        {
            "case_id": number,
            "requested_rewrite": {
                "subject": request.subject,
                "prompt": request.prompt,
                "relation_id": f"P{number % 2}",
                "target_new": {"str": request.target_new},
                "target_true": {"str": request.target_true},
            },
            "paraphrase_prompts": [f"It is known that {request.text}", f"So {request.text}"],
            "neighborhood_prompts": [request.prompt.replace("{}", other.subject) for other in others],
            "generation_prompts": [f"{request.subject} is"],
        }
        for number, request in enumerate(tiny_requests(6))
    ]
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens for the second moments."""
    from editcore.testing import tiny_requests

    words = " ".join(request.text for request in tiny_requests(80)).split()
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return path


@pytest.fixture
def editctl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Calls ``editctl`` in this process, with a cache of its own and in an empty working directory: ``code``, ``out``
    and ``err`` of what a user would type."""
    from editcore.cli import main

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["editctl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=printed.out, err=printed.err)

    return call


@pytest.fixture(scope="session")
def usual_cache() -> Path:
    """The cache with the default model, from before ``editctl`` got one of its own."""
    from editcore._util.paths import cache_dir

    return cache_dir()


@pytest.fixture
def editctl_with_model(
    usual_cache: Path, editctl: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SimpleNamespace]:
    """``editctl`` with that cache: otherwise it would fetch the model again, and compute its second moments again."""
    monkeypatch.setenv("EDITCORE_CACHE", str(usual_cache))
    return editctl


# What a stranger has: an environment, and wheels


BUILD = """
import importlib, os, sys, tomllib
out, *packages = sys.argv[1:]
for package in packages:
    os.chdir(package)
    with open("pyproject.toml", "rb") as file:
        backend = tomllib.load(file)["build-system"]["build-backend"]
    importlib.import_module(backend).build_wheel(out)
"""
"""What pip does for each package in two processes of its own (PEP 517), without building isolated."""


@pytest.fixture(scope="session")
def build_wheels() -> Callable[[Path, Sequence[Path]], dict[str, Path]]:
    """Builds a wheel of each of some packages, given as their folders, into a folder: the wheels by package."""

    def build(out: Path, packages: Sequence[Path]) -> dict[str, Path]:
        out.mkdir(exist_ok=True)
        _python("-c", BUILD, out, *packages)
        return {package.name: next(out.glob(f"{package.name.replace('-', '_')}-*.whl")) for package in packages}

    return build


@pytest.fixture(scope="session")
def make_environment() -> Callable[..., Path]:
    """Makes a virtual environment in a folder and installs wheels into it; gives its interpreter.

    It sees the packages of the folder ``beside``, too; of none, those that are installed here. (With
    ``--system-site-packages`` it would see those of the interpreter that an environment of ours was made with.)
    """

    def make(home: Path, wheels: Iterable[Path] = (), *, beside: Path | None = None) -> Path:
        venv.create(home, symlinks=True)
        [site] = home.glob("lib/python*/site-packages")
        # addsitedir, unlike the line of a path, reads the .pth files of editable installations.
        seen = [f"import site; site.addsitedir({folder!r})" for folder in running_sites()]
        lines = seen if beside is None else [str(beside)]
        (site / "beside.pth").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        python = home / "bin" / "python"
        if wheels:
            _pip("--python", python, "install", "--no-deps", "--no-index", *wheels)
        return python

    return make


def running_sites() -> list[str]:
    """Where the packages of the running interpreter are."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def _pip(*arguments: str | Path) -> None:
    _python("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def _python(*arguments: str | Path) -> None:
    """Runs it blind to what PYTHONPATH names: what is built and installed is what packages have."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


class Worker:
    """A process that runs what it is asked, where some packages are installed; see ``third_party/worker.py``."""

    def __init__(self, python: Path | str, folder: Path, environment: Mapping[str, str]) -> None:
        (folder / "log").mkdir(exist_ok=True)
        command = [python, Path(__file__).parent / "third_party" / "worker.py", folder / "log"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, cwd=folder, stdin=pipe, stdout=pipe, text=True)

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process ended while it was asked {call}: {arguments}"
        found: dict[str, Any] = json.loads(answer)
        return found

    def works(self, *arguments: object) -> str:
        """What an ``editctl`` command prints; it must succeed."""
        done = self.ask("editctl", arguments=[str(argument) for argument in arguments])
        assert done["code"] == 0, f"{' '.join(map(str, arguments))}\n{done['out']}\n{done['err']}"
        return str(done["out"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="session")
def start_worker() -> type[Worker]:
    """Starts such a process: with an interpreter, in a folder, with an environment."""
    return Worker


# What a run leaves


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, object]]:
    """Every file of a run directory by its path in it, without the times in it."""

    def read(directory: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = path.relative_to(directory).as_posix()
            if path.suffix in (".json", ".jsonl") and name != "ledger.jsonl":
                lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
                found[name] = [timeless(json.loads(line)) for line in lines]
            else:
                found[name] = path.read_bytes()
        return found

    return read


_TIMES = {"seconds", "seconds_per_edit", "peak_memory_bytes", "stages", "started", "command"}


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in _TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value
