"""The files of a sweep directory: ``plan.json``, ``sweep.json``, and the reason why each failed trial failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from editcore._util.records import Record
from editcore.evaluation.measures import Measure
from editcore.interfaces.documented import documented
from editcore.runs.config import RunConfig

__all__ = ["Failure", "PlanRecord", "PointRecord", "SweepRecord", "TrialRecord"]


class PointRecord(Record):
    """One combination of a sweep, which is one row of its table."""

    arm: str
    """Name of the arm."""
    values: Mapping[str, Any]
    """Values by axis."""
    seed: int | None
    """Seed of the run."""
    key: str
    """Key of its trial."""


class TrialRecord(Record):
    """One run of a sweep."""

    config: RunConfig
    """Its configuration."""
    versions: Mapping[str, str]
    """Versions of the packages whose code it runs."""
    contents: Mapping[str, str]
    """Hashes of the files and records that it reads."""


@documented
class PlanRecord(Record):
    """``plan.json``: the rows and the trials of a sweep."""

    metrics: tuple[Measure, ...]
    """What is measured, in the order in which it is shown."""
    title: str
    """Name of the folder of tables and figures."""
    summary: str = ""
    """A sentence for the report."""
    arms: tuple[str, ...]
    """Names of the arms, as in the sweep file."""
    axes: Mapping[str, tuple[Any, ...]]
    """The settings that vary, with their values."""
    seeds: tuple[int, ...]
    """Seeds of its runs."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""
    points: tuple[PointRecord, ...]
    """The rows of the table."""
    trials: Mapping[str, TrialRecord]
    """By key."""


@documented
class SweepRecord(Record):
    """``sweep.json``: the progress of a sweep."""

    state: Literal["finished", "incomplete", "interrupted"]
    """``incomplete``: trials failed."""
    trials: int
    """Number of trials."""
    finished: int
    """Trials with results."""
    failed: int
    """Trials that failed."""
    command: str | None = None
    """The command line; ``None`` for a sweep that was started from Python."""


@documented
class Failure(Record):
    """Why a trial failed."""

    key: str
    """Key of the trial."""
    kind: str
    """Class of the exception, or ``WorkerLost``."""
    error: str
    """What went wrong, in a sentence."""
    traceback: str
    """Empty for an error that the user can fix."""
    attempts: int
    """Number of workers that it was given to."""
