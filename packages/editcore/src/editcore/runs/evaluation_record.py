"""``evaluation.json``: what ``editctl evaluate`` measured. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from editcore._util.records import FloatOrNull, Record
from editcore.evaluation.measures import Measure
from editcore.evaluation.summaries import Average
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.runs.held_out import TextInfo
from editcore.runs.record import DatasetRecord, ModelRecord
from editcore.runs.results import Phases, Tally

__all__ = ["EVALUATION_NAME", "EvaluationRecord", "HarnessScore", "MethodRecord", "Perplexity", "QuestionCounts"]

EVALUATION_NAME = "evaluation.json"


@documented
class MethodRecord(Record):
    """How the edits of a model were made, as far as it is known."""

    name: str
    """The editor and its extensions."""
    settings_hash: str
    """The first twelve digits of the SHA-256 of all hyperparameters."""
    batch_size: int | None = None
    """Facts that were solved together; ``None`` where that is not known."""
    edits: int
    """Facts that are active."""
    seconds_per_edit: FloatOrNull = math.nan
    """Wall time of the batches over their new facts, without loading and measuring; NaN where it is not known."""


@documented
class HarnessScore(Record):
    """A score that lm-eval computed."""

    task: str
    """Name of the task."""
    metric: str
    """Name of the metric with its filter, as lm-eval writes it: ``acc,none``."""
    value: float
    """As lm-eval has it: accuracies are parts of 1."""
    stderr: FloatOrNull
    """Its standard error; NaN where lm-eval has none."""
    questions: int
    """How many were asked."""
    better: Literal["higher", "lower"] = "higher"
    """Which way is better."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval from the standard error, as of any other mean (Wilson's for a part of 1, which has a width
        even at 0 and 1); ``None`` where there is no standard error."""
        if math.isnan(self.stderr) or self.questions < 2:
            return None
        share = 0 <= self.value <= 1
        scale = 100 if share else 1
        low, high = Average(
            mean=scale * self.value,
            std=scale * self.stderr * math.sqrt(self.questions),
            facts=self.questions,
            prompts=self.questions,
            share=share,
        ).interval
        return (low / scale, high / scale)


@documented
class Perplexity(Record):
    """The perplexity of a text."""

    text: TextInfo
    """The text, with its perplexity by the unedited model, or by the only model."""
    after: FloatOrNull
    """By the edited model, or by the only model."""

    @property
    def ratio(self) -> float:
        """The edited model's over that of the unedited one."""
        return self.after / self.text.perplexity


@documented
class QuestionCounts(Record):
    """How much the model was asked."""

    asked: int
    """Questions that were asked now."""
    known: int
    """Questions whose answers were kept from an earlier evaluation of the same state."""


@documented
class EvaluationRecord(Record):
    """``evaluation.json``: what was measured of a model on facts, and everything that decides it."""

    target: str
    """What was measured, as it was given."""
    kind: Literal["run", "pack", "adapter", "model"]
    """What the target is."""
    base: str | None
    """The unedited model; ``None`` for a model without one."""
    model: ModelRecord
    """The unedited model, or the only one."""
    state: str
    """A hash of the edited model: its weights with their edits, what is kept beside them, and the libraries."""
    dtype: str
    """Type of its weights."""
    device: str
    """Where it ran."""
    method: MethodRecord | None
    """How its edits were made; ``None`` where that is not known."""
    dataset: DatasetRecord
    """The facts."""
    own_facts: bool
    """Whether they are what the target's edits write, in the order in which they were written."""
    evaluators: tuple[str, ...]
    """What measured."""
    settings: Mapping[str, Mapping[str, Any]]
    """Their hyperparameters, by name."""
    seed: int
    """Seed of everything random in the measurements."""
    metrics: tuple[Measure, ...]
    """What was measured, in the order in which it is shown."""
    before: Mapping[str, float | None]
    """Of the unedited model, by the key of the metric; all ``None`` for a model without a base."""
    after: Mapping[str, float | None]
    """Of the model with its edits, or of the only one."""
    averages: Phases
    """The means behind them."""
    tallies: tuple[Tally, ...]
    """How many of the facts hold, by every metric that says so."""
    perplexity: Perplexity | None
    """Of a text; ``None`` if none was asked for."""
    harness_before: tuple[HarnessScore, ...]
    """Scores of lm-eval of the unedited model."""
    harness: tuple[HarnessScore, ...]
    """Scores of lm-eval of the model with its edits, or of the only one."""
    questions: QuestionCounts
    """How much was asked."""
    seconds: FloatOrNull
    """Wall time of all of it."""
    peak_memory_bytes: int
    """Of the process; on an accelerator, of its allocations."""
    notes: tuple[str, ...]
    """Sentences for the user."""
    versions: Mapping[str, str]
    """Versions of the packages that the result depends on."""
    python: str
    """Version of Python."""
    platform: str
    """The machine, as Python names it."""
    command: str | None
    """The command line; ``None`` for an evaluation made from Python."""
    started: str
    """When it began, in UTC."""

    @classmethod
    def read(cls, directory: Path | str) -> Self:
        """The record in a folder.

        Raises:
            RunError: there is none, or it is damaged.
        """
        path = Path(directory) / EVALUATION_NAME
        if not path.exists():
            raise RunError(f"{directory} has no evaluation: {EVALUATION_NAME} is not there.")
        return cls.read_file(path)
