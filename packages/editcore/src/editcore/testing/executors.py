"""The contract suite of executors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from editcore.execution.executors import make_executor
from editcore.interfaces.protocols import Executor, Outcome
from editcore.plugins.calls import resolve
from editcore.plugins.registry import Plugins
from editcore.testing.contract import Contract, imports_nothing_heavy, survives_json
from editcore.testing.probe import WorkItem, WorkResult, make_runner

__all__ = ["ExecutorContract"]


class ExecutorContract(Contract):
    """The contract of every executor. Give ``executor_name``, and ``hparams`` for two workers and at least one retry.

    In these tests the workers must run on this machine, because the tests kill them and look for them.
    """

    @pytest.fixture
    def executor_name(self) -> str:
        """The name under which the executor is announced."""
        raise NotImplementedError("give the fixture executor_name")

    @pytest.fixture
    def executor(self, registry: Plugins, executor_name: str, hparams: dict[str, object]) -> Iterator[Executor]:
        """An executor that is closed after the test."""
        made = make_executor(registry, executor_name, hparams)
        try:
            yield made
        finally:
            made.close()

    def test_is_announced(self, registry: Plugins, executor_name: str) -> None:
        """The name is registered and its class can be imported."""
        spec = registry.executor(executor_name)
        assert spec.name == executor_name
        assert spec.summary
        target = resolve(spec.target)
        assert all(callable(getattr(target, method, None)) for method in ("map", "close"))
        assert isinstance(target.shares_files, bool)

    def test_announcement_imports_no_torch(self, registry: Plugins, executor_name: str) -> None:
        """Listing executors stays fast."""
        spec = registry.executor(executor_name)
        imports_nothing_heavy(registry, "executor", spec.name, spec.hparams)

    def test_hparams_survive_json_and_refuse_unknown_names(
        self, registry: Plugins, executor_name: str, hparams: dict[str, object]
    ) -> None:
        """A misspelt setting is not ignored."""
        spec = registry.executor(executor_name)
        if spec.hparams is not None:
            survives_json(resolve(spec.hparams), hparams, spec.name)

    def test_nothing_comes_of_nothing(self, executor: Executor) -> None:
        """No items, no outcomes."""
        assert _outcomes(executor, []) == ({}, [])

    def test_every_item_has_one_outcome_whatever_happens_to_others(self, executor: Executor, tmp_path: Path) -> None:
        """An exception is an outcome, and is not tried again. If a worker is lost, its item is tried again, and no
        other item is affected."""
        what = ["square", "refuse", "square", "stumble", "die once", "square", "square", "square"]
        items = [WorkItem(number=number, what=fate, folder=tmp_path) for number, fate in enumerate(what)]  # type: ignore[arg-type]
        outcomes, started = _outcomes(executor, items)
        assert sorted(outcomes) == list(range(len(items)))
        returned = {index: outcome.value.square for index, outcome in outcomes.items() if outcome.value is not None}
        assert returned == {index: index**2 for index in (0, 2, 4, 5, 6, 7)}
        assert [outcomes[index].kind for index in (0, 1, 3)] == ["", "HParamsError", "ZeroDivisionError"]
        assert outcomes[1].error == "1 is refused."
        assert outcomes[1].traceback == ""
        assert "3 stumbles" in outcomes[3].error
        assert "3 stumbles" in outcomes[3].traceback
        attempts = {index: outcome.attempts for index, outcome in outcomes.items()}
        assert attempts == {**dict.fromkeys(range(len(items)), 1), 4: 2}
        assert sorted(started) == sorted([*range(len(items)), 4])

    def test_a_worker_keeps_what_it_made(self, executor: Executor) -> None:
        """The function is made once in each worker, and called with one item after the other."""
        outcomes, _ = _outcomes(executor, [WorkItem(number=number) for number in range(9)])
        calls: dict[int, list[int]] = {}
        for outcome in outcomes.values():
            assert outcome.value is not None
            calls.setdefault(outcome.value.process, []).append(outcome.value.call)
        assert os.getpid() not in calls
        assert all(sorted(numbers) == list(range(1, len(numbers) + 1)) for numbers in calls.values())

    def test_an_item_that_kills_every_worker_is_given_up(self, executor: Executor) -> None:
        """It is given up with a reason, and the other items are done."""
        outcomes, started = _outcomes(
            executor, [WorkItem(number=0, what="die"), WorkItem(number=1), WorkItem(number=2)]
        )
        assert (outcomes[0].kind, outcomes[0].value) == ("WorkerLost", None)
        assert "lost" in outcomes[0].error
        assert outcomes[0].attempts == started.count(0) > 1
        assert all(outcomes[index].value is not None for index in (1, 2))

    def test_who_stops_asking_stops_the_workers(self, executor: Executor, tmp_path: Path) -> None:
        """No work continues after a caller stopped iterating."""
        items = [WorkItem(number=0, what="sleep", folder=tmp_path), WorkItem(number=1), WorkItem(number=2)]
        outcomes = executor.map(make_runner, items, started=lambda _index: None)
        assert next(outcomes).index != 0
        word = tmp_path / "0-sleep"
        assert _soon(lambda: word.exists() and bool(word.read_text()))
        outcomes.close()  # type: ignore[attr-defined]
        executor.close()
        assert _soon(lambda: not _runs(int(word.read_text())))


def _outcomes(executor: Executor, items: Sequence[WorkItem]) -> tuple[dict[int, Outcome[WorkResult]], list[int]]:
    started: list[int] = []
    outcomes = list(executor.map(make_runner, items, started=started.append))
    assert len({outcome.index for outcome in outcomes}) == len(outcomes), "an item has two outcomes"
    return {outcome.index: outcome for outcome in outcomes}, started


def _soon(condition: Callable[[], bool]) -> bool:
    """Whether the condition becomes true within two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
