"""Sweeps: a run and what is varied in it, planned, run on an executor, and put into tables and figures.

>>> from editcore import Plugins
>>> from editcore.executors import make_executor
>>> plugins = Plugins.load()
>>> plan = make_plan(load_sweep(Path("sweep.toml")), plugins)  # doctest: +SKIP
>>> run_sweep(plan, Path("runs/sweep"), executor=make_executor(plugins, "local", {}))  # doctest: +SKIP
"""

from __future__ import annotations

from editcore.sweeps._file import STUDY, Arm, FigureSpec, Sweep, SweepFile, load_study, load_sweep
from editcore.sweeps._plan import PLAN_NAME, SWEEP_NAME, Plan, Point, Trial, make_plan
from editcore.sweeps._run import (
    FAILURES_NAME,
    STATE_NAME,
    Failure,
    State,
    SweepResult,
    Watch,
    failure_of,
    run_sweep,
    state_of,
    trial_directory,
)

__all__ = [
    "FAILURES_NAME",
    "PLAN_NAME",
    "STATE_NAME",
    "STUDY",
    "SWEEP_NAME",
    "Arm",
    "Failure",
    "FigureSpec",
    "Plan",
    "Point",
    "State",
    "Sweep",
    "SweepFile",
    "SweepResult",
    "Trial",
    "Watch",
    "failure_of",
    "load_study",
    "load_sweep",
    "make_plan",
    "run_sweep",
    "state_of",
    "trial_directory",
]
