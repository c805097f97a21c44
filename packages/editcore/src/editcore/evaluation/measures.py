"""The metrics of a run: those that its evaluators announce, under the keys that its files and tables have for them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import PluginError
from editcore.interfaces.metrics import MetricSpec
from editcore.interfaces.specs import EvaluatorSpec
from editcore.plugins.registry import boundary, resolve

__all__ = [
    "DEFAULT_EVALUATORS",
    "Measure",
    "combined",
    "legend",
    "measures_of",
    "objectives_of",
    "retention_of",
    "shown",
]

DEFAULT_EVALUATORS = ("counterfact", "generation")
"""What measures a run that names no evaluator."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Measure(MetricSpec):
    """A metric of one of a run's evaluators."""

    evaluator: str
    """Name of the evaluator."""
    key: str
    """Its name; ``EVALUATOR.NAME`` where two of the run's evaluators have a metric of that name."""

    def text(self, value: float | None, digits: int = 1) -> str:
        """The value as tables show it, without its unit; ``-`` for what is not known."""
        if value is None or value != value:
            return "-"
        return f"{round(value, digits) + 0.0:.{digits}f}" if self.percent else f"{value:.4g}"  # no -0.0

    @property
    def heading(self) -> str:
        """The label with the unit in which the value is shown; after a name in brackets, percent need not be said."""
        plain = not self.unit or (self.percent and self.label.endswith(")"))
        return self.label if plain else f"{self.label} ({self.unit})"


def measures_of(evaluators: Iterable[EvaluatorSpec]) -> tuple[Measure, ...]:
    """Every metric of some evaluators, in their order."""
    pairs = [(spec.name, metric) for spec in evaluators for metric in spec.metrics]
    names = [metric.name for _, metric in pairs]
    return tuple(
        Measure(
            **{one.name: getattr(metric, one.name) for one in fields(MetricSpec)},
            evaluator=evaluator,
            key=metric.name if names.count(metric.name) == 1 else f"{evaluator}.{metric.name}",
        )
        for evaluator, metric in pairs
    )


def shown(measures: Sequence[Measure]) -> tuple[Measure, ...]:
    """Those that every table and picture has."""
    return tuple(one for one in measures if one.show == "always")


def retention_of(measures: Sequence[Measure], observed: Collection[str]) -> Measure | None:
    """What tells whether a fact is in the model: the first such metric that observed something, or else the first;
    ``None`` if none tells.

    Args:
        observed: keys of the metrics with observations.
    """
    telling = [one for one in measures if one.retention]
    return next((one for one in telling if one.key in observed), telling[0] if telling else None)


def objectives_of(measures: Sequence[Measure]) -> tuple[Measure, ...]:
    """What trials are compared by, the first before the next; of the first evaluator that has such metrics."""
    having = [one for one in measures if one.objective]
    return tuple(one for one in having if one.evaluator == having[0].evaluator)


def legend(measures: Iterable[Measure]) -> str:
    """What stands over a table of them: their units, and which way is better."""
    measures = list(measures)
    units = [f"{one.key} in {one.unit}" if one.unit else f"{one.key} a number" for one in measures if not one.percent]
    lower = [one.key for one in measures if one.better == "lower"]
    percent = "percent" + (f" ({', '.join(units)})" if units else "")
    better = "higher is better" + (f" (lower for {', '.join(lower)})" if lower else "")
    return f"{percent}, {better}"


def combined(measures: Sequence[Measure], means: Mapping[str, float]) -> dict[str, float]:
    """The composites, by key, of which all parts are known. One whose package is gone since is left out.

    Args:
        means: by key, as they are shown.

    Raises:
        PluginError: what combines them failed.
    """
    keys = {(one.evaluator, one.name): one.key for one in measures}
    found: dict[str, float] = {}
    for one in measures:
        parts = [means.get(keys[one.evaluator, name]) for name in one.of]
        if one.of and None not in parts:
            try:
                combine = resolve(one.combine)
            except PluginError:  # measuring has refused it, unless it was there then
                continue
            with boundary(f"The metric '{one.key}' of the evaluator '{one.evaluator}' failed: "):
                value = float(combine(*parts))
            if math.isfinite(value):
                found[one.key] = value
    return found
