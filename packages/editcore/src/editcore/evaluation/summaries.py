"""Means, intervals and composites of observations. This module imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np

from editcore.evaluation.measures import Measure, combined
from editcore.interfaces.documented import documented
from editcore.interfaces.metrics import Observation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Average", "Measurement", "Summary", "average_of"]

_Z = 1.959964  # 97.5 % quantile of the normal distribution
_TEXTS = ("request_id", "relation", "evaluator", "metric", "kind", "prompt", "text")
COLUMNS = ("request_id", "relation", "evaluator", "metric", "kind", "prompt", "value", "text")
"""Columns of :meth:`Measurement.frame`."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """The mean of one metric, as it is shown: a percentage between 0 and 100, anything else in its unit."""

    mean: float
    """The mean."""
    std: float
    """Standard deviation (population form) of the averaged numbers, which are the facts' means or single
    observations."""
    facts: int
    """Number of facts with an observation."""
    prompts: int
    """Number of observations."""
    share: bool = True
    """Whether the values lie between 0 and 100; a difference may be negative."""
    within: Literal["facts", "prompts"] = "facts"
    """What was averaged: the facts' means, or single observations (:attr:`editcore.MetricSpec.average`)."""

    @property
    def units(self) -> int:
        """How many numbers were averaged."""
        return self.facts if self.within == "facts" else self.prompts

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean, which takes the averaged numbers as independent.

        For a share, this is Wilson's interval, which has a width even at 0 and 100 %. Its number of trials is the one
        at which a binomial has the variance observed between facts, because several prompts of a fact tell more than
        one.
        """
        if not self.share:
            half = _Z * self.std / math.sqrt(self.units)
            return (self.mean - half, self.mean + half)
        p = self.mean / 100
        variance = (self.std / 100) ** 2
        # Means within facts vary at most as much as single prompts, so there are at least as many trials as facts.
        trials = max(1.0, p * (1 - p) / variance if variance > 0 else 1.0) * self.units
        centre = (p + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
        half = _Z * math.sqrt(p * (1 - p) / trials + (_Z / (2 * trials)) ** 2) / (1 + _Z**2 / trials)
        return (100 * max(0.0, centre - half), 100 * min(1.0, centre + half))


def average_of(
    request_ids: Sequence[str],
    values: Sequence[float],
    *,
    within: Literal["facts", "prompts"] = "facts",
    percent: bool = True,
    share: bool = True,
) -> Average | None:
    """The average of some values; ``None`` if there are none.

    Args:
        within: as :attr:`editcore.MetricSpec.average`.
        percent: whether the values are fractions, and the average a percentage.
        share: whether the average lies between 0 and 100.
    """
    facts: dict[str, list[float]] = {}
    for request_id, value in zip(request_ids, values, strict=True):
        facts.setdefault(request_id, []).append(float(value))
    if not facts:
        return None
    scale = 100 if percent else 1
    if within == "facts":
        averaged = np.array([scale * sum(fact_values) / len(fact_values) for fact_values in facts.values()])
    else:
        averaged = np.array([scale * value for fact_values in facts.values() for value in fact_values])
    return Average(
        mean=float(averaged.mean()),
        std=float(averaged.std()),
        facts=len(facts),
        prompts=sum(map(len, facts.values())),
        share=share,
        within=within,
    )


def _of_measure(measure: Measure, request_ids: Sequence[str], values: Sequence[float]) -> Average | None:
    return average_of(request_ids, values, within=measure.average, percent=measure.percent, share=measure.share)


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The means and composites of one measurement of a model."""

    measures: tuple[Measure, ...]
    """The metrics that were asked for, in the order in which they are shown."""
    averages: Mapping[str, Average] = field(default_factory=dict)
    """Means by key, for the metrics that have observations."""
    facts: Mapping[str, int] = field(default_factory=dict)
    """By evaluator, the number of facts with an observation. Evaluators that observed nothing are absent."""

    def values(self) -> dict[str, float]:
        """Every mean and composite by key, as it is shown. Metrics without a value are left out."""
        means = {key: average.mean for key, average in self.averages.items()}
        known = {**means, **combined(self.measures, means)}
        return {measure.key: known[measure.key] for measure in self.measures if measure.key in known}

    def value(self, key: str) -> float:
        """A mean or composite; NaN if it has no value."""
        return self.values().get(key, math.nan)

    def interval(self, key: str) -> tuple[float, float] | None:
        """The 95 % interval of a mean over two facts or more (or observations, as the metric is averaged); ``None`` for
        others, and for composites."""
        found = self.averages.get(key)
        return found.interval if found is not None and found.units > 1 else None

    def as_json(self) -> dict[str, float | None]:
        """:meth:`values`, with ``None`` for metrics without a value."""
        return {**{measure.key: None for measure in self.measures}, **self.values()}


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The observations of a run's evaluators on a model."""

    measures: tuple[Measure, ...]
    """The metrics of all evaluators."""
    observations: Mapping[str, Sequence[Observation]]
    """By evaluator."""
    notes: tuple[str, ...] = ()
    """Sentences of the evaluators for the user, on what they could not measure."""

    @property
    def summary(self) -> Summary:
        """Their means and composites."""
        found: dict[str, Average] = {}
        facts: dict[str, set[str]] = {}
        columns: dict[tuple[str, str], tuple[list[str], list[float]]] = {}
        for evaluator, observations in self.observations.items():
            for observation in observations:
                ids, values = columns.setdefault((evaluator, observation.metric), ([], []))
                ids.append(observation.request_id)
                values.append(observation.value)
                facts.setdefault(evaluator, set()).add(observation.request_id)
        for measure in self.measures:
            if (column := columns.get((measure.evaluator, measure.name))) is not None:
                averaged = _of_measure(measure, *column)
                assert averaged is not None
                found[measure.key] = averaged
        return Summary(
            measures=self.measures,
            averages=MappingProxyType(found),
            facts=MappingProxyType({evaluator: len(ids) for evaluator, ids in facts.items()}),
        )

    def of_facts(self, request_ids: Iterable[str]) -> Measurement:
        """The observations of some facts alone, and all of the model as a whole."""
        wanted = set(request_ids)
        whole = {(measure.evaluator, measure.name) for measure in self.measures if measure.about == "model"}
        kept = {
            evaluator: tuple(
                observation
                for observation in observations
                if observation.request_id in wanted or (evaluator, observation.metric) in whole
            )
            for evaluator, observations in self.observations.items()
        }
        return Measurement(measures=self.measures, observations=kept, notes=self.notes)

    def of(self, measure: Measure) -> list[Observation]:
        """The observations of one metric."""
        observations = self.observations.get(measure.evaluator, ())
        return [observation for observation in observations if observation.metric == measure.name]

    def frame(self, relations: Mapping[str, str | None]) -> pd.DataFrame:
        """A row per observation.

        Columns: ``request_id``, ``relation``, ``evaluator``, ``metric`` (its key), ``kind`` (of the question),
        ``prompt``, ``value`` (parts of 1 for a percentage, otherwise in the metric's unit), ``text``.

        Args:
            relations: the relation of each fact, by request id.
        """
        import pandas as pd

        keys = {(measure.evaluator, measure.name): measure.key for measure in self.measures}
        rows = [
            (
                observation.request_id,
                relations.get(observation.request_id),
                evaluator,
                keys[evaluator, observation.metric],
                observation.kind,
                observation.prompt,
                observation.value,
                observation.text,
            )
            for evaluator, observations in self.observations.items()
            for observation in observations
        ]
        types = {**dict.fromkeys(_TEXTS, "string"), "value": "float64"}
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype(types)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, measures: tuple[Measure, ...]) -> Measurement:
        """The inverse of :meth:`frame`. Rows of metrics that are not among ``measures`` are left out."""
        names = {(measure.evaluator, measure.key): measure.name for measure in measures}
        found: dict[str, list[Observation]] = {measure.evaluator: [] for measure in measures}
        columns = [frame[name].astype(object).where(frame[name].notna(), None) for name in COLUMNS]
        for request_id, _, evaluator, key, kind, prompt, value, text in zip(*columns, strict=True):
            if (evaluator, key) in names:
                found[evaluator].append(
                    Observation(
                        request_id=request_id, metric=names[evaluator, key], value=value, kind=kind, prompt=prompt,
                        text=text,
                    )
                )  # fmt: skip
        return cls(measures=measures, observations=found)
