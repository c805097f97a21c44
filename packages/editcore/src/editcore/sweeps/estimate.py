"""Estimates the cost of a plan from finished runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from editcore.interfaces.errors import RunError
from editcore.runs.record import RunRecord
from editcore.runs.results import SUMMARY_NAME, RunSummary
from editcore.sweeps.plan import Plan, Trial

__all__ = ["Estimate", "estimate_cost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The cost of the trials that are still to be run."""

    trials: int
    edits: int
    batches: int
    seconds: float
    """Time on one worker that is as fast as the one of the finished runs; NaN if there are no such runs."""
    runs: int
    """Number of finished runs that the estimate is based on."""


def estimate_cost(plan: Plan, due: Iterable[str], folders: Iterable[Path]) -> Estimate:
    """The cost of trials.

    Args:
        due: keys of the trials.
        folders: where run directories may be.
    """
    trials = [plan.trials[key] for key in due]
    known: dict[tuple[str, str, str], list[float]] = {}
    for path in (path for folder in folders for path in folder.glob(f"*/{SUMMARY_NAME}")):
        found = _cost(path.parent)
        if found is not None:
            known.setdefault(found[0], []).append(found[1])
    per_edit = [fmean(known[_alike(trial)]) if _alike(trial) in known else math.nan for trial in trials]
    return Estimate(
        trials=len(trials),
        edits=sum(trial.facts for trial in trials),
        batches=sum(math.ceil(trial.facts / trial.config.batch_size) for trial in trials),
        seconds=sum(cost * trial.facts for cost, trial in zip(per_edit, trials, strict=True)),
        runs=sum(map(len, known.values())),
    )


def _alike(trial: Trial) -> tuple[str, str, str]:
    return trial.config.model, trial.config.editor, trial.config.device


def _cost(run: Path) -> tuple[tuple[str, str, str], float] | None:
    """Model, editor and device of a run, and its seconds per edit; ``None`` for a run that cannot be read."""
    try:
        config, summary = RunRecord.read(run).config, RunSummary.read(run)
    except RunError:
        return None
    seconds = sum(summary.seconds.values()) / max(1, summary.edits + summary.rejected)
    return (config.model, config.editor, config.device), seconds
