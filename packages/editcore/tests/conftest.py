"""Fixtures of editcore's own tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """A text that the tiny tokenizers know, long enough for a few sequences."""
    path = tmp_path / "corpus.txt"
    path.write_text("The old town lies by the river. Anna Berg was born in Rome and works as a painter.\n" * 200)
    return path


# Contract suites, on plugins that break their clauses


@pytest.fixture(scope="session")
def run_suites() -> Callable[[Path, str], SimpleNamespace]:
    """Runs the test files of a folder, with the plugins that are installed there, in a process of their own: some of
    the tests must fail. (``pytester`` in this process would unload what the suites imported, which torch does not
    survive.)

    Takes the folder and what ``-k`` selects. Gives names of tests (without parameters) by class: ``failed``,
    ``passed``, and ``skipped``, which has expected failures too.
    """

    def run(folder: Path, selected: str) -> SimpleNamespace:
        report = folder / "report.xml"
        path = os.pathsep.join([str(folder), str(Path(__file__).parent / "toys"), os.environ.get("PYTHONPATH", "")])
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", selected]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stdout + done.stderr  # 1: some tests failed, and nothing else went wrong
        found: dict[str, dict[str, set[str]]] = {kind: {} for kind in ("failed", "passed", "skipped")}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
            kind = next((kinds[child.tag] for child in case if child.tag in kinds), "passed")
            owner, test = case.attrib["classname"].rpartition(".")[2], case.attrib["name"].partition("[")[0]
            found[kind].setdefault(owner, set()).add(test)
        return SimpleNamespace(**found)

    return run


# What a user has: a folder with a model, a file of facts, and editctl


@pytest.fixture
def toys(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs the plugin package of ``toys/`` for one test; gives its module ``parts``."""
    info = tmp_path_factory.mktemp("site") / "edit_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edit-toy\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[editcore]\ntoy = edit_toy.plugin\n", encoding="utf-8")
    for folder in (info.parent, Path(__file__).parent / "toys"):
        monkeypatch.syspath_prepend(str(folder))
    from edit_toy import parts

    parts.CALLS.clear()
    return parts


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model's folder, named as one of the toy's presets, and a cache that no other test sees."""
    from editcore.testing import tiny_model

    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "small"
    tiny_model().save(folder)
    return folder


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """Six facts that the tiny tokenizers know, in the schema of CounterFact."""
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
            "paraphrase_prompts": [f"It is known that {request.text}"],
            "neighborhood_prompts": [request.prompt.replace("{}", other.subject) for other in others],
        }
        for number, request in enumerate(tiny_requests(6))
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def editctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Calls ``editctl`` in this process: ``code``, ``out`` and ``err`` of what a user would type."""
    from editcore.cli import main

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["editctl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=printed.out, err=printed.err)

    return call
