"""The results of a finished run: scores, samples, times, and the files that keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from editcore._util.files import replacing
from editcore._util.records import FloatOrNull, Record
from editcore._util.tables import check_columns, damaged
from editcore._util.words import cut
from editcore.evaluation.measures import Measure
from editcore.evaluation.summaries import COLUMNS, Average
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.metrics import HOLDS
from editcore.interfaces.values import RejectedRequest
from editcore.runs.before import UneditedMeasurement
from editcore.runs.checkpoint_history import Checkpoint, CheckpointHistory
from editcore.runs.forgetting import Forgetting
from editcore.runs.log import RejectionLine

if TYPE_CHECKING:
    import pandas as pd

    from editcore.evaluation import Measurement, Summary
    from editcore.interfaces.values import FactRecord

__all__ = [
    "FIGURES_NAME",
    "RESULTS_NAME",
    "SUMMARY_NAME",
    "RunResult",
    "RunSummary",
    "Sample",
    "Tally",
    "read_observations",
    "write_observations",
    "write_summary",
]

SUMMARY_NAME = "summary.json"
RESULTS_NAME = "results.parquet"
FIGURES_NAME = "figures"

_LONGEST = 120
"""Most characters of a prompt with its target in a sentence."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the model says on one edited fact."""

    prompt: str
    """The edited prompt, in full."""
    target_new: str
    """The target that was to be written."""
    before: str
    """What the unedited model says."""
    after: str
    """What the edited model says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many facts hold by one metric. The command line shows it at the end of a run."""

    metric: str
    """Its key."""
    words: str
    """The words of its sentence, such as ``are said``."""
    held: int
    asked: int
    """Facts that were observed: all that are active, or a sample."""
    active: int
    missing: tuple[str, ...]
    """Prompt and target of those that do not hold."""

    @classmethod
    def of(cls, measure: Measure, found: Measurement, records: Sequence[FactRecord]) -> Tally | None:
        """The tally of ``records`` by one metric; ``None`` if it observed none of them."""
        values = {observation.request_id: observation.value for observation in found.of(measure)}
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
        """``38 of 40 facts are said; not: ...``, naming at most ``most`` facts."""
        sampled = "" if self.asked == self.active else f" (a sample of {self.active:,})"
        if not self.missing:
            return f"{self.held:,} of {self.asked:,} facts{sampled} {self.words}."
        more = len(self.missing) - most
        named = "; ".join(cut(fact, _LONGEST, keep="end") for fact in self.missing[:most])
        named += f"; and {more:,} more" if more > 0 else ""
        return f"{self.held:,} of {self.asked:,} facts{sampled} {self.words}; not: {named}."


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    directory: Path
    """The run directory."""
    title: str
    """The title of its results."""
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
    """Wall time of all batches divided by all new facts, without loading and evaluation."""
    peak_memory_bytes: int
    """Of the process; on an accelerator, of its allocations."""
    notes: tuple[str, ...]
    """Sentences for the user."""
    extensions: Mapping[str, Mapping[str, Any]]
    """What extensions and the backend count about themselves, by their names."""
    checkpoints: CheckpointHistory | None = None
    """The checkpoints, in a run that has them."""


def _with_numbers(averages: object) -> object:
    """The averages with NaN where the file has ``null``."""
    if not isinstance(averages, dict):
        return averages
    return {key: _nan_for_null(average) for key, average in averages.items()}


def _nan_for_null(average: object) -> object:
    if not isinstance(average, dict):
        return average
    return {name: math.nan if value is None else value for name, value in average.items()}


Averages = Annotated[Mapping[str, Average], BeforeValidator(_with_numbers)]
"""By the key of the metric."""


class Phases(Record):
    """Means of single metrics, with the numbers that their intervals need."""

    before: Averages
    after: Averages


@documented
class RunSummary(Record):
    """``summary.json``: the results of a finished run."""

    metrics: tuple[Measure, ...]
    """What was measured, in the order in which it is shown."""
    before: Mapping[str, float | None]
    """Of the unedited model, by the key of the metric; ``None`` where it cannot be told."""
    after: Mapping[str, float | None]
    """The same of all facts that are active at the end."""
    averages: Phases
    """The means behind them."""
    tallies: tuple[Tally, ...]
    """How many of the facts hold, by every metric that says so."""
    edits: int
    """Facts that are active at the end."""
    rejected: int
    """Facts that an extension kept out."""
    rejections: tuple[RejectionLine, ...]
    """Each of them."""
    seconds_per_edit: FloatOrNull
    """Wall time of all batches divided by all new facts."""
    seconds: Mapping[str, FloatOrNull]
    """Wall time by stage."""
    peak_memory_bytes: int
    """Of the process; on an accelerator, of its allocations."""
    samples: tuple[Sample, ...]
    """A few facts, with what the model says."""
    notes: tuple[str, ...]
    """Sentences for the user."""
    extensions: Mapping[str, Mapping[str, Any]]
    """What extensions and the backend count about themselves, by their names."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """What was measured between the first edit and the last, in a run with checkpoints."""
    forgetting: Forgetting | None = None
    """The forgetting, from all checkpoints together."""

    @classmethod
    def of(cls, result: RunResult) -> RunSummary:
        """The summary of a result."""
        history = result.checkpoints
        seen = {} if history is None else {"checkpoints": history.checkpoints, "forgetting": history.forgetting}
        return cls(
            metrics=result.after.measures,
            before=result.before.as_json(),
            after=result.after.as_json(),
            averages=Phases(before=dict(result.before.averages), after=dict(result.after.averages)),
            tallies=result.tallies,
            edits=result.edits,
            rejected=result.rejected,
            rejections=tuple(RejectionLine.of(rejected, batch=batch) for batch, rejected in result.rejections),
            seconds_per_edit=result.seconds_per_edit,
            seconds=dict(result.seconds),
            peak_memory_bytes=result.peak_memory_bytes,
            samples=result.samples,
            notes=result.notes,
            extensions=dict(result.extensions),
            **seen,
        )

    @classmethod
    def read(cls, directory: Path | str) -> RunSummary:
        """The summary of a finished run.

        Raises:
            RunError: it cannot be read, or is damaged.
        """
        return cls.read_file(Path(directory) / SUMMARY_NAME)


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


def read_observations(path: Path) -> pd.DataFrame:
    """What :func:`write_observations` wrote.

    Raises:
        RunError: it is not there, or is damaged.
    """
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except FileNotFoundError as error:
        raise RunError(f"{path} is not there; without it a run has no results.") from error
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise damaged(path, error) from error
    check_columns(frame, ("phase", *COLUMNS), path)
    return frame


def write_summary(result: RunResult) -> None:
    """Write ``summary.json``. Once it is there, the run counts as finished."""
    summary = RunSummary.of(result)
    UneditedMeasurement.remove(result.directory)  # before the summary, which says that the run is finished
    summary.write_file(result.directory / SUMMARY_NAME)
