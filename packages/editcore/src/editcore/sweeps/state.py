"""The states of a sweep's trials, read from their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from editcore.interfaces.errors import RunError
from editcore.runs.resume import is_finished
from editcore.sweeps.plan import PLAN_NAME
from editcore.sweeps.records import Failure

__all__ = [
    "FAILURES_NAME",
    "FAILURE_NAME",
    "STATE_NAME",
    "State",
    "failure_of",
    "refuse_other",
    "state_of",
    "trial_directory",
]

FAILURES_NAME = "failures.jsonl"
FAILURE_NAME = "failure.json"
STATE_NAME = "sweep.json"

State = Literal["waiting", "running", "finished", "failed"]


def trial_directory(directory: Path | str, key: str) -> Path:
    """The run directory of a trial."""
    directory = Path(directory)
    return directory / "trials" / key


def state_of(directory: Path | str, key: str) -> State:
    """The state of a trial, from the files of the sweep directory."""
    directory = Path(directory)
    trial = trial_directory(directory, key)
    if is_finished(trial):
        return "finished"
    return "failed" if (trial / FAILURE_NAME).exists() else "waiting"


def failure_of(directory: Path | str, key: str) -> Failure:
    """The reason why a trial failed.

    Raises:
        RunError: the file with the reason is damaged.
    """
    directory = Path(directory)
    path = trial_directory(directory, key) / FAILURE_NAME
    try:
        return Failure.read_file(path)
    except RunError as error:
        raise RunError(f"{error} Remove it to have the trial run again.") from error


def refuse_other(directory: Path) -> None:
    """Refuse a folder with something else in it.

    Raises:
        RunError: it is not empty, and not a sweep.
    """
    if directory.exists() and not directory.is_dir():
        raise RunError(f"The output {directory} is a file; give a directory.")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / PLAN_NAME).exists():
        begun = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
        if begun - {"run.lock", "sweep.toml"}:  # what a sweep writes before its plan
            raise RunError(f"{directory} has something in it that is not a sweep; give another --out.")
