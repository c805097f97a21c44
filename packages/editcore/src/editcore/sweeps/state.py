"""Where the trials of a sweep stand, as their folders say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.runs.resume import is_finished

__all__ = [
    "FAILURES_NAME",
    "FAILURE_NAME",
    "STATE_NAME",
    "Failure",
    "State",
    "failure_of",
    "state_of",
    "trial_directory",
]

FAILURES_NAME = "failures.jsonl"
FAILURE_NAME = "failure.json"
STATE_NAME = "sweep.json"

State = Literal["waiting", "running", "finished", "failed"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a trial failed."""

    key: str
    """Of the trial."""
    kind: str
    """Class of the exception, or ``WorkerLost``."""
    error: str
    """What went wrong, in a sentence."""
    traceback: str
    """Empty for what a user can cure."""
    attempts: int
    """Workers that it was given to."""


def trial_directory(directory: Path | str, key: str) -> Path:
    """The run directory of a trial."""
    directory = Path(directory)
    return directory / "trials" / key


def state_of(directory: Path | str, key: str) -> State:
    """What the files of a sweep directory say of a trial."""
    directory = Path(directory)
    trial = trial_directory(directory, key)
    if is_finished(trial):
        return "finished"
    return "failed" if (trial / FAILURE_NAME).exists() else "waiting"


def failure_of(directory: Path | str, key: str) -> Failure:
    """Why a failed trial failed.

    Raises:
        RunError: the file that says so is damaged.
    """
    directory = Path(directory)
    path = trial_directory(directory, key) / FAILURE_NAME
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}). Remove it to have the trial run again.") from error
