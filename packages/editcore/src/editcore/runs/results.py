"""What a finished run has to show: scores, samples, times, and the files that keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._util.files import json_text, replacing, write_text
from editcore.interfaces.values import RejectedRequest
from editcore.runs.log import Before, rejection_line

if TYPE_CHECKING:
    from editcore.evaluation import PromptScore, Summary
    from editcore.runs.checkpoints import Watched

__all__ = ["FIGURES_NAME", "RESULTS_NAME", "SUMMARY_NAME", "RunResult", "Sample", "write_scores", "write_summary"]

SUMMARY_NAME = "summary.json"
RESULTS_NAME = "results.parquet"
FIGURES_NAME = "figures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the model says on one edited fact."""

    prompt: str
    target_new: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    directory: Path
    title: str
    """What stands over its results."""
    before: Summary
    after: Summary
    samples: tuple[Sample, ...]
    edits: int
    """Facts that are active at the end."""
    rejected: int
    """Facts that an extension kept out."""
    rejections: tuple[tuple[int, RejectedRequest], ...]
    """Each of them with the number of its batch, the reason and the figures."""
    seconds: Mapping[str, float]
    """Wall time by stage: ``model``, ``before``, ``targets``, ``keys``, ``solve``, ``other``, ``after``; with
    checkpoints, ``checkpoints``."""
    seconds_per_edit: float
    """Wall time of all batches over all new facts; loading and evaluation are not in it."""
    peak_memory_bytes: int
    notes: tuple[str, ...]
    extensions: Mapping[str, Mapping[str, Any]]
    """What extensions and the backend count about themselves, by their names."""
    watched: Watched | None = None
    """What was seen at checkpoints, in a run that has them."""


def write_scores(directory: Path, before: Sequence[PromptScore], after: Sequence[PromptScore]) -> None:
    """Write ``results.parquet``: a row per prompt and phase."""
    import pandas as pd

    from editcore.evaluation.scores import to_frame

    frame = pd.concat([to_frame(before, phase="before"), to_frame(after, phase="after")], ignore_index=True)
    with replacing(directory / RESULTS_NAME) as path:
        frame.to_parquet(path, index=False)


def write_summary(result: RunResult) -> None:
    """Write ``summary.json``: with it the run is finished."""
    watched = result.watched
    summary = {
        "before": result.before.as_json(),
        "after": result.after.as_json(),
        "edits": result.edits,
        "rejected": result.rejected,
        "rejections": [{"batch": batch, **rejection_line(one)} for batch, one in result.rejections],
        "seconds_per_edit": result.seconds_per_edit,
        "seconds": dict(result.seconds),
        "peak_memory_bytes": result.peak_memory_bytes,
        "samples": [asdict(sample) for sample in result.samples],
        "notes": list(result.notes),
        "extensions": dict(result.extensions),
        **({} if watched is None else watched.model_dump(mode="json", include={"checkpoints", "forgetting"})),
    }
    Before.remove(result.directory)  # before the summary, which says that the run is finished
    write_text(result.directory / SUMMARY_NAME, json_text(summary, indent=2) + "\n")
