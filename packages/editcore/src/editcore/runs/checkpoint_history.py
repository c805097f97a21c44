"""``forgetting.json``: the measurements at the checkpoints of a run, and the forgetting that they show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from editcore._util.records import FloatOrNull, read_record
from editcore.evaluation.measures import Measure
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.runs.forgetting import Forgetting
from editcore.runs.held_out import TextInfo

__all__ = ["FORGETTING_NAME", "Checkpoint", "CheckpointHistory", "read_checkpoint_history"]

FORGETTING_NAME = "forgetting.json"


@documented
class Checkpoint(BaseModel):
    """The measurements after a batch. Values are by metric, as they are shown; ``None`` if a metric has no value."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch: int
    """Index of the batch before the checkpoint."""
    num_edits: int
    """Facts that were active."""
    facts: int
    """Facts that were measured: all of them, or a sample."""
    values: Mapping[str, float | None]
    """With the edits made so far."""
    before: Mapping[str, float | None]
    """The values of the unedited model on the same facts."""
    interval: Mapping[str, tuple[float, float]]
    """95 % intervals over facts, for metrics that are means over facts."""
    perplexity: FloatOrNull
    """Perplexity of the text, with the edits made so far."""
    perplexity_ratio: FloatOrNull
    """That perplexity divided by the one of the unedited model."""
    relative_change: Mapping[str, FloatOrNull]
    """‖ΔW‖/‖W‖ (Frobenius) by address: all active changes together over the unedited weight."""
    seconds: float
    """Wall time of this checkpoint's measurements."""


@documented
class CheckpointHistory(BaseModel):
    """The checkpoints of a run so far; the content of ``forgetting.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    eval_every: int
    """Facts between two checkpoints."""
    eval_sample: int | None
    """Facts measured at each checkpoint; ``None`` for all."""
    text: TextInfo
    """The text whose perplexity is measured."""
    metrics: tuple[Measure, ...]
    """What is measured, in the order in which it is shown."""
    retention: str | None
    """Key of the metric that says whether a fact is retained. ``None`` if no metric does; forgetting is then not
    measured."""
    checkpoints: tuple[Checkpoint, ...]
    """In the order in which they came."""
    forgetting: Forgetting
    """The forgetting, from all checkpoints together."""

    @property
    def known(self) -> frozenset[str]:
        """Keys of the metrics that have a value at one checkpoint or more."""
        return frozenset(
            key for checkpoint in self.checkpoints for key, value in checkpoint.values.items() if value is not None
        )


def read_checkpoint_history(directory: Path | str) -> CheckpointHistory:
    """The checkpoints of a run, which may be unfinished.

    Raises:
        RunError: the run has no checkpoint yet, or the file is damaged.
    """
    directory = Path(directory)
    path = directory / FORGETTING_NAME
    if not path.exists():
        raise RunError(
            f"{directory} has no checkpoints ({FORGETTING_NAME} is not there). Runs have them with "
            "'editctl run --eval-every N'."
        )
    return read_record(path, CheckpointHistory)
