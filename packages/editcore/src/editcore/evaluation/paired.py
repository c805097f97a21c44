"""Paired differences of two measurements of the same questions, with bootstrap intervals. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from editcore.evaluation.measures import Measure, combined
from editcore.interfaces.documented import documented

__all__ = ["RESAMPLES", "PairedDifference", "paired_differences"]

RESAMPLES = 2000
"""Bootstrap samples of an interval."""

Unit = tuple[str, ...]
"""What is drawn: a fact, or a question of a metric that is averaged over questions."""
Values = Mapping[Unit, Mapping[Unit, float]]
"""By unit, the values of its questions."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """How one metric differs between two measurements, on what both of them asked."""

    measure: Measure
    """The metric."""
    first: float
    """Its mean in the first measurement, as it is shown."""
    second: float
    """The same in the second."""
    interval: tuple[float, float] | None
    """The 95 % interval of :attr:`difference`: the percentiles of :data:`RESAMPLES` bootstrap samples of the units.
    ``None`` for fewer than two units, and where none differs: a bootstrap of zeros tells nothing."""
    units: int
    """Facts that both measured; for a metric that is averaged over questions, questions."""
    differing: int
    """Those whose values differ."""

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    @property
    def better(self) -> str:
        """``first`` or ``second``, if the interval leaves 0 out; empty if the two cannot be told apart."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return ""
        return "second" if (self.difference > 0) == (self.measure.better == "higher") else "first"


def paired_differences(
    measures: Sequence[Measure],
    first: Mapping[str, Values],
    second: Mapping[str, Values],
    *,
    seed: int = 0,
) -> tuple[PairedDifference, ...]:
    """The differences of all metrics that have a value in both measurements, in the order of ``measures``.

    Only questions that both asked count. A fact's value is the mean over its questions. A composite is computed anew
    from the means of its parts in every bootstrap sample; the samples draw facts, with all their values.

    Args:
        first: by the key of the metric.
        second: the same.
    """
    pairs = {
        measure.key: _paired(measure, first[measure.key], second[measure.key])
        for measure in measures
        if measure.key in first and measure.key in second
    }
    pairs = {key: found for key, found in pairs.items() if found.units}
    by_name = {(measure.evaluator, measure.name): measure.key for measure in measures}
    results = []
    for measure in measures:
        if measure.of:
            parts = {by_name[measure.evaluator, name] for name in measure.of}
            found = _of_composite(measure, {key: pairs[key] for key in parts if key in pairs}, measures, seed=seed)
        else:
            found = _of_mean(measure, pairs[measure.key], seed=seed) if measure.key in pairs else None
        if found is not None:
            results.append(found)
    return tuple(results)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The values of one metric as they are shown, unit by unit."""

    units: tuple[Unit, ...]
    values: npt.NDArray[np.float64]
    """``[2, units]``: of the first measurement and of the second."""


def _paired(measure: Measure, first: Values, second: Values) -> _Pairs:
    scale = 100 if measure.percent else 1
    units, values = [], []
    for unit in first:
        shared = sorted(first[unit].keys() & second.get(unit, {}).keys())
        if shared:
            units.append(unit)
            values.append(
                [scale * math.fsum(found[unit][key] for key in shared) / len(shared) for found in (first, second)]
            )
    return _Pairs(tuple(units), np.array(values, dtype=np.float64).reshape(-1, 2).T)


def _of_mean(measure: Measure, pairs: _Pairs, *, seed: int) -> PairedDifference:
    differences = pairs.values[1] - pairs.values[0]  # [units]
    differing = int((differences != 0).sum())
    means = pairs.values.mean(axis=1)
    return PairedDifference(
        measure=measure,
        first=float(means[0]),
        second=float(means[1]),
        interval=_interval(differences, seed=seed) if differing and len(differences) > 1 else None,
        units=len(differences),
        differing=differing,
    )


def _interval(differences: npt.NDArray[np.float64], *, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    found = bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=100, rng=np.random.default_rng(seed)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _of_composite(
    measure: Measure, parts: Mapping[str, _Pairs], measures: Sequence[Measure], *, seed: int
) -> PairedDifference | None:
    """The difference of a composite; ``None`` if a part has no value."""
    from scipy.stats import bootstrap

    units = list(dict.fromkeys(unit for found in parts.values() for unit in found.units))
    place = {unit: index for index, unit in enumerate(units)}
    table = np.full((len(parts), 2, len(units)), np.nan)
    for row, found in zip(table, parts.values(), strict=True):
        row[:, [place[unit] for unit in found.units]] = found.values

    def of_units(chosen: npt.NDArray[np.int64]) -> tuple[float, float]:
        sample = table[:, :, chosen]
        known = np.isfinite(sample)
        counts = known.sum(axis=2)
        if not counts.all():  # no unit of a part was drawn
            return math.nan, math.nan
        means = np.where(known, sample, 0.0).sum(axis=2) / counts
        values = [combined(measures, dict(zip(parts, column.tolist(), strict=True))) for column in means.T]
        return values[0].get(measure.key, math.nan), values[1].get(measure.key, math.nan)

    if not units:
        return None
    before, after = of_units(np.arange(len(units)))
    if math.isnan(before) or math.isnan(after):
        return None
    differing = int((np.nan_to_num(table[:, 0] - table[:, 1]) != 0).any(axis=0).sum())
    interval = None
    if differing and len(units) > 1:

        def difference(chosen: npt.NDArray[np.float64]) -> float:
            low, high = of_units(chosen.astype(np.int64))
            return high - low

        found = bootstrap(
            (np.arange(len(units)),), difference, n_resamples=RESAMPLES, method="percentile", vectorized=False,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
        drawn = found.bootstrap_distribution
        ends = np.nanpercentile(drawn, [2.5, 97.5])
        interval = (float(ends[0]), float(ends[1]))
    return PairedDifference(
        measure=measure, first=before, second=after, interval=interval, units=len(units), differing=differing
    )
