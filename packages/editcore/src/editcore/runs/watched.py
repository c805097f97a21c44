"""``forgetting.json``: what was measured at the checkpoints of a run, and what it says of forgetting."""

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

__all__ = ["FORGETTING_NAME", "Checkpoint", "Watched", "read_watched"]

FORGETTING_NAME = "forgetting.json"


@documented
class Checkpoint(BaseModel):
    """What was measured after a batch, by metric, as it is shown; ``None`` where one cannot be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch: int
    """Index of the batch before it."""
    num_edits: int
    """Facts that were active."""
    facts: int
    """Facts that were measured: all of them, or a sample."""
    values: Mapping[str, float | None]
    """With the edits made so far."""
    before: Mapping[str, float | None]
    """The same of the unedited model on the same facts."""
    interval: Mapping[str, tuple[float, float]]
    """95 % intervals over facts, of the means that were measured."""
    perplexity: FloatOrNull
    """Of the text, with the edits made so far."""
    perplexity_ratio: FloatOrNull
    """To the unedited model."""
    relative_change: Mapping[str, FloatOrNull]
    """‖ΔW‖/‖W‖ (Frobenius) by address: all active changes together over the unedited weight."""
    seconds: float
    """Wall time of this checkpoint's measurements."""


@documented
class Watched(BaseModel):
    """``forgetting.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    eval_every: int
    """Facts between two checkpoints."""
    eval_sample: int | None
    """Facts measured at each; ``None`` for all."""
    text: TextInfo
    """What the perplexity is of."""
    metrics: tuple[Measure, ...]
    """What is measured, in the order in which it is shown."""
    retention: str | None
    """Key of the metric by which a fact is retained; ``None`` if none says so, and then nothing is told of
    forgetting."""
    checkpoints: tuple[Checkpoint, ...]
    """In the order in which they came."""
    forgetting: Forgetting
    """What the checkpoints say of it together."""

    @property
    def known(self) -> frozenset[str]:
        """Keys of the metrics that could be told at some checkpoint."""
        return frozenset(
            key for checkpoint in self.checkpoints for key, value in checkpoint.values.items() if value is not None
        )


def read_watched(directory: Path | str) -> Watched:
    """What a run, finished or not, has seen at its checkpoints.

    Raises:
        RunError: there was none yet, or the file is damaged.
    """
    directory = Path(directory)
    path = directory / FORGETTING_NAME
    if not path.exists():
        raise RunError(
            f"{directory} has no checkpoints ({FORGETTING_NAME} is not there). Runs have them with "
            "'editctl run --eval-every N'."
        )
    return read_record(path, Watched)
