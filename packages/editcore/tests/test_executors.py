"""The executor ``local``, and that the contract suite notices what it is for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from editcore import HParamsError, Plugins
from editcore.execution.executors import make_executor
from editcore.testing import ExecutorContract
from editcore.testing.probe import WorkItem, make_runner


class TestLocalContract(ExecutorContract):
    @pytest.fixture
    def executor_name(self) -> str:
        return "local"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"workers": 2, "retries": 1}


@pytest.mark.parametrize(
    ("given", "hparams", "expected"),
    [("", {"workers": 1, "threads": 3}, "3"), ("1", {"workers": 1}, "1"), ("5", {"workers": 1, "threads": 2}, "2")],
)
def test_workers_compute_with_the_threads_that_they_are_given(
    monkeypatch: pytest.MonkeyPatch, given: str, hparams: dict[str, object], expected: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    executor = make_executor(Plugins.load(), "local", hparams)
    [outcome] = executor.map(make_runner, [WorkItem(number=1)], started=lambda _index: None)
    assert outcome.value is not None
    assert outcome.value.threads == expected
    assert os.environ["OMP_NUM_THREADS"] == given


def test_the_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(12)), raising=False)
    plugins = Plugins.load()
    environments = make_executor(plugins, "local", {})._environments  # type: ignore[attr-defined]
    assert [environment["OMP_NUM_THREADS"] for environment in environments(100, False)] == ["3"] * 4
    assert [environment["OMP_NUM_THREADS"] for environment in environments(2, False)] == ["6"] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments(100, True)] == ["3", "5"]
    assert "CUDA_VISIBLE_DEVICES" not in environments(100, False)[0]
    for workers, dealt in ((1, ["3,5"]), (2, ["3", "5"]), (3, ["3", "5", "3"])):
        shared = make_executor(plugins, "local", {"workers": workers})._environments  # type: ignore[attr-defined]
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in shared(100, True)] == dealt


@pytest.mark.parametrize(("settings", "message"), [({"workers": 0}, "workers"), ({"address": "x"}, "address")])
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(HParamsError, match=f"local: .*{message}"):
        make_executor(Plugins.load(), "local", settings)


BROKEN = '''
"""Executors that each break a clause on purpose."""
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context

from editcore import ExecutorSpec, Outcome, hookimpl
from editcore.execution.executors import LocalExecutor, LocalHParams, attempt, lost


def call(make, index, item):
    return attempt(make(), index, item)


class Fragile:
    """One dead process takes all items with it."""
    shares_files = True

    def map(self, make, items, *, started, accelerator=False):
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            asked = {}
            for index, item in enumerate(items):
                started(index)
                asked[pool.submit(call, make, index, item)] = index
            for future in as_completed(asked):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    yield lost(asked[future], 1, "broken pool")

    def close(self): ...


class Stubborn(LocalExecutor):
    """Tries again what was refused."""
    def __init__(self):
        super().__init__(LocalHParams(workers=2))

    def map(self, make, items, *, started, accelerator=False):
        for outcome in super().map(make, items, started=started):
            yield replace(outcome, attempts=outcome.attempts + outcome.failed)


@hookimpl
def editcore_executors():
    names = ("fragile", "stubborn")
    return [ExecutorSpec(name, "broken_executors:" + name.capitalize(), summary="Broken.") for name in names]
'''

SUITES = """
import pytest
from editcore.testing import ExecutorContract


class TestFragile(ExecutorContract):
    @pytest.fixture
    def executor_name(self): return "fragile"


class TestStubborn(ExecutorContract):
    @pytest.fixture
    def executor_name(self): return "stubborn"
"""


def test_the_suite_notices_executors_that_break_it(tmp_path: Path) -> None:
    (tmp_path / "broken_executors.py").write_text(BROKEN, encoding="utf-8")
    (tmp_path / "test_suites.py").write_text(SUITES, encoding="utf-8")
    info = tmp_path / "edit_broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edit-broken\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[editcore]\nbroken = broken_executors\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "one_outcome", "test_suites.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=300,
    )
    for name in ("TestFragile", "TestStubborn"):
        failed = f"FAILED test_suites.py::{name}::test_every_item_has_one_outcome_whatever_happens_to_others"
        assert failed in done.stdout, done.stdout
