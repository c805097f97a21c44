"""Runs the unfinished trials of a plan, then writes tables and figures of all."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from editcore._util.files import json_text, make_readable, remove_leftovers, write_text
from editcore._util.lock import locked
from editcore._util.paths import check_writable
from editcore.interfaces.documented import documented
from editcore.interfaces.protocols import Executor, Outcome
from editcore.sweeps.pictures import draw
from editcore.sweeps.plan import Plan
from editcore.sweeps.records import Failure, SweepRecord
from editcore.sweeps.state import (
    FAILURE_NAME,
    FAILURES_NAME,
    STATE_NAME,
    State,
    failure_of,
    refuse_other,
    state_of,
    trial_directory,
)
from editcore.sweeps.tables import write_tables
from editcore.sweeps.trial import Task, TrialRunner

__all__ = ["SweepResult", "Watch", "run_sweep"]


class Watch(Protocol):
    """Is told about the trials of a sweep while it runs."""

    def begin(self, plan: Plan, states: Mapping[str, State]) -> None:
        """The trials by key, before the first one is started."""
        ...

    def change(self, key: str, state: State, *, error: str = "") -> None:
        """A trial was started, is finished, or failed."""
        ...


class _Unwatched:
    def begin(self, plan: Plan, states: Mapping[str, State]) -> None: ...

    def change(self, key: str, state: State, *, error: str = "") -> None: ...


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """A sweep that ran to its end."""

    directory: Path
    """The sweep directory."""
    plan: Plan
    """The plan of the sweep."""
    finished: int
    """Trials that have results."""
    failures: tuple[Failure, ...]
    """Trials without results, and why."""
    tables: Path
    """The folder of tables and figures."""
    notes: tuple[str, ...]
    """Sentences for the user."""


def run_sweep(
    plan: Plan,
    directory: Path | str,
    *,
    executor: Executor,
    retry_failed: bool = False,
    watch: Watch | None = None,
    command: Sequence[str] = (),
) -> SweepResult:
    """Run the trials that are not finished, then write tables and figures of all finished ones.

    Finished trials are not run again. A failed trial is kept with its reason, and run again only with ``retry_failed``.
    An interrupted trial continues after its last batch. However the process ended, the same call continues the sweep,
    and ends with the same tables as a sweep that was never interrupted.

    Raises:
        RunError: another process works in the directory, or it is not the directory of a sweep.
        StorageError: the directory cannot be written.
    """
    directory = Path(directory)
    refuse_other(directory)
    check_writable(directory)
    watch = watch or _Unwatched()
    with locked(directory):
        for folder in (directory, directory / "shared", directory / plan.title):
            remove_leftovers(folder)
        for half in (directory / "trials").glob(".*"):  # was being written when an earlier process was killed
            shutil.rmtree(half)
        plan.write(directory)
        states = {key: state_of(directory, key) for key in plan.trials}
        due = [key for key, state in states.items() if state == "waiting" or (state == "failed" and retry_failed)]
        watch.begin(plan, {key: "waiting" if key in due else state for key, state in states.items()})
        try:
            _run_trials(plan, due, directory, executor, watch, command)
        except KeyboardInterrupt:
            _write_state(plan, directory, "interrupted", command)
            raise
        return _conclude(plan, directory, command)


def _run_trials(
    plan: Plan, due: Sequence[str], directory: Path, executor: Executor, watch: Watch, command: Sequence[str]
) -> None:
    tasks = [
        Task(
            key=key,
            config=plan.trials[key].config,
            versions=plan.trials[key].versions,
            records=plan.trials[key].contents["records"],
            home=directory.resolve() if executor.shares_files else None,
            command=tuple(command),
        )
        for key in due
    ]
    if not tasks:
        return
    outcomes = executor.map(
        TrialRunner,
        tasks,
        started=lambda index: watch.change(due[index], "running"),
        accelerator=any(task.config.device != "cpu" for task in tasks),
    )
    try:
        for outcome in outcomes:
            key = due[outcome.index]
            _keep(key, outcome, directory)
            watch.change(key, "failed" if outcome.failed else "finished", error=outcome.error)
    finally:
        executor.close()


def _keep(key: str, outcome: Outcome[Mapping[str, bytes]], directory: Path) -> None:
    """Keep the outcome of a trial: its files, or the reason why it failed."""
    trial = trial_directory(directory, key)
    if outcome.failed:
        failure = Failure(
            key=key,
            kind=outcome.kind,
            error=outcome.error,
            traceback=outcome.traceback,
            attempts=outcome.attempts,
        )
        failure.write_file(trial / FAILURE_NAME)
        return
    if outcome.value:
        _bring_home(outcome.value, trial)
    (trial / FAILURE_NAME).unlink(missing_ok=True)


def _bring_home(files: Mapping[str, bytes], trial: Path) -> None:
    """Write a run directory that was made elsewhere, whole or not at all."""
    trial.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=trial.parent, prefix=f".{trial.name}."))
    try:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        make_readable(temporary)
        shutil.rmtree(trial, ignore_errors=True)  # an unfinished attempt
        temporary.rename(trial)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _conclude(plan: Plan, directory: Path, command: Sequence[str]) -> SweepResult:
    failures = tuple(failure_of(directory, key) for key in plan.trials if state_of(directory, key) == "failed")
    lines = [json_text(failure.model_dump(mode="json", exclude={"traceback"})) for failure in failures]
    write_text(directory / FAILURES_NAME, "".join(f"{line}\n" for line in lines))
    table, retention, lacking = write_tables(plan, directory)
    notes = draw(plan, table, retention, directory / plan.title)
    finished = sum(state_of(directory, key) == "finished" for key in plan.trials)
    _write_state(plan, directory, "finished" if finished == len(plan.trials) else "incomplete", command)
    return SweepResult(
        directory=directory,
        plan=plan,
        finished=finished,
        failures=failures,
        tables=directory / plan.title,
        notes=(*plan.notes, *lacking, *notes),
    )


def _write_state(
    plan: Plan,
    directory: Path,
    state: Literal["finished", "incomplete", "interrupted"],
    command: Sequence[str],
) -> None:
    states = [state_of(directory, key) for key in plan.trials]
    record = SweepRecord(
        state=state,
        trials=len(states),
        finished=states.count("finished"),
        failed=states.count("failed"),
        command=shlex.join(command) if command else None,
    )
    record.write_file(directory / STATE_NAME)
