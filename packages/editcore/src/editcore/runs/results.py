"""What a finished run has to show: scores, samples, times, and the files that keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._util.files import json_text, replacing, write_text
from editcore._util.words import cut
from editcore.interfaces.documented import documented
from editcore.interfaces.metrics import HOLDS
from editcore.interfaces.values import RejectedRequest
from editcore.runs.log import Before, rejection_line

if TYPE_CHECKING:
    from editcore.evaluation import Measure, Measurement, Summary
    from editcore.interfaces.values import FactRecord
    from editcore.runs.checkpoints import Watched

__all__ = [
    "FIGURES_NAME",
    "RESULTS_NAME",
    "SUMMARY_NAME",
    "RunResult",
    "Sample",
    "Tally",
    "write_observations",
    "write_summary",
]

SUMMARY_NAME = "summary.json"
RESULTS_NAME = "results.parquet"
FIGURES_NAME = "figures"

_LONGEST = 120
"""Characters of a prompt with its target in a sentence."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the model says on one edited fact."""

    prompt: str
    """The edited prompt, in full."""
    target_new: str
    """What was to be written."""
    before: str
    """What the unedited model says."""
    after: str
    """What the edited model says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many facts hold, by one metric: the last lines of a run."""

    metric: str
    """Its key."""
    words: str
    """What is said of them, such as ``are said``."""
    held: int
    asked: int
    """Facts that were observed: all that are active, or a sample."""
    active: int
    missing: tuple[str, ...]
    """Prompt and target of those that do not hold."""

    @classmethod
    def of(cls, measure: Measure, found: Measurement, records: Sequence[FactRecord]) -> Tally | None:
        """What one metric says of the records; ``None`` if it observed none of them."""
        values = {one.request_id: one.value for one in found.of(measure)}
        if not values:
            return None
        missing = [record.request for record in records if values.get(record.request.id, 1.0) < HOLDS]
        return cls(
            metric=measure.key,
            words=measure.tally,
            held=len(values) - len(missing),
            asked=len(values),
            active=len(records),
            missing=tuple(f"{request.text} → {request.target_new}" for request in missing),
        )

    def sentence(self, most: int = 5) -> str:
        """``38 of 40 facts are said; not: ...``, with at most so many named."""
        sampled = "" if self.asked == self.active else f" (a sample of {self.active:,})"
        if not self.missing:
            return f"{self.held:,} of {self.asked:,} facts{sampled} {self.words}."
        more = len(self.missing) - most
        named = "; ".join(cut(one, _LONGEST, keep="end") for one in self.missing[:most])
        named += f"; and {more:,} more" if more > 0 else ""
        return f"{self.held:,} of {self.asked:,} facts{sampled} {self.words}; not: {named}."


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    directory: Path
    """The run directory."""
    title: str
    """What stands over its results."""
    before: Summary
    """Of the unedited model, on the same facts."""
    after: Summary
    """Of all facts that are active at the end."""
    tallies: tuple[Tally, ...]
    """How many of the facts hold, by every metric that says so."""
    samples: tuple[Sample, ...]
    """A few facts, with what the model says."""
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
    """Of the process; on an accelerator, of its allocations."""
    notes: tuple[str, ...]
    """Sentences for the user."""
    extensions: Mapping[str, Mapping[str, Any]]
    """What extensions and the backend count about themselves, by their names."""
    watched: Watched | None = None
    """What was seen at checkpoints, in a run that has them."""


def write_observations(directory: Path, before: Measurement, after: Measurement, records: Sequence[FactRecord]) -> None:
    """Write ``results.parquet``: a row per observation and phase, as :meth:`Measurement.frame` says."""
    import pandas as pd

    relations = {record.request.id: record.relation for record in records}
    phases = {"before": before, "after": after}
    frames = [found.frame(relations).assign(phase=name) for name, found in phases.items()]
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.astype({"phase": "string"})[["phase", *(name for name in frame if name != "phase")]]
    with replacing(directory / RESULTS_NAME) as path:
        frame.to_parquet(path, index=False)


def write_summary(result: RunResult) -> None:
    """Write ``summary.json``: with it the run is finished."""
    watched = result.watched
    summary = {
        "metrics": [asdict(measure) for measure in result.after.measures],
        "before": result.before.as_json(),
        "after": result.after.as_json(),
        "averages": {
            phase: {key: asdict(one) for key, one in summary.averages.items()}
            for phase, summary in (("before", result.before), ("after", result.after))
        },
        "tallies": [asdict(one) for one in result.tallies],
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
