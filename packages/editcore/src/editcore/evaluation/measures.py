"""The metrics of a run: those that its evaluators announce, with their keys in files and tables."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import PluginError
from editcore.interfaces.metrics import MetricSpec
from editcore.interfaces.specs import EvaluatorSpec
from editcore.plugins.calls import boundary, resolve

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
"""The evaluators of a run that names none."""


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
        """The label with the unit of the shown value. A percent sign is left out after a short name in brackets, as in
        ``Efficacy (ES)``."""
        plain = not self.unit or (self.percent and self.label.endswith(")"))
        return self.label if plain else f"{self.label} ({self.unit})"


def measures_of(evaluators: Iterable[EvaluatorSpec]) -> tuple[Measure, ...]:
    """Every metric of some evaluators, in their order."""
    pairs = [(spec.name, metric) for spec in evaluators for metric in spec.metrics]
    names = [metric.name for _, metric in pairs]
    return tuple(
        Measure(
            **{field.name: getattr(metric, field.name) for field in fields(MetricSpec)},
            evaluator=evaluator,
            key=metric.name if names.count(metric.name) == 1 else f"{evaluator}.{metric.name}",
        )
        for evaluator, metric in pairs
    )


def shown(measures: Sequence[Measure], known: Collection[str] | None = None) -> tuple[Measure, ...]:
    """The metrics that every table and picture shows.

    Args:
        known: keys of the metrics that have a value on the facts at hand. A metric without a value is replaced by the
            metric that stands in for it (:attr:`editcore.MetricSpec.instead_of`), if that has one. Left out, nothing is
            replaced, because nothing is measured yet.
    """
    always = [measure for measure in measures if measure.show == "always"]
    found: list[Measure] = []
    for evaluator in dict.fromkeys(measure.evaluator for measure in always):
        usual = [measure for measure in always if measure.evaluator == evaluator]
        available = usual if known is None else _known(usual, measures, known)
        found += available if any(measure.show != "always" for measure in available) else usual
    return tuple(found)


def retention_of(measures: Sequence[Measure], observed: Collection[str]) -> Measure | None:
    """The metric that tells whether a fact is in the model; ``None`` if there is none.

    It is the first such metric that has observations. Without one, it is a metric with observations that stands in for
    such a metric, and otherwise the first such metric.

    Args:
        observed: keys of the metrics with observations.
    """
    candidates = [measure for measure in measures if measure.retention]
    return next(iter([*_decisive(candidates, measures, observed), *candidates]), None)


def objectives_of(measures: Sequence[Measure], known: Collection[str] | None = None) -> tuple[Measure, ...]:
    """The metrics that trials are compared by, the most important first. All are of the first evaluator that has any.

    Args:
        known: keys of the metrics that have a value. Other objectives are left out. If none has a value, the metrics
            that stand in for them are used; if there are none of these either, ``known`` is ignored.
    """
    objectives = [measure for measure in measures if measure.objective]
    objectives = (objectives if known is None else _decisive(objectives, measures, known)) or objectives
    return tuple(measure for measure in objectives if measure.evaluator == objectives[0].evaluator)


def _decisive(wanted: Sequence[Measure], measures: Sequence[Measure], known: Collection[str]) -> list[Measure]:
    """The metrics of ``wanted`` that are known; if none is, those that stand in for them."""
    return [measure for measure in wanted if measure.key in known] or _known(wanted, measures, known)


def _known(wanted: Sequence[Measure], measures: Sequence[Measure], known: Collection[str]) -> list[Measure]:
    """The metrics of ``wanted``, in which those that are not known are replaced by metrics that stand in for them. No
    metric comes twice.

    A composite of which no part is known is replaced by the metrics that stand in for its parts.
    """
    found: dict[str, Measure] = {}
    for measure in wanted:
        others = [other for other in measures if other.evaluator == measure.evaluator and other.key in known]
        parts = [] if any(other.name in measure.of for other in others) else measure.of
        stand_ins = [other for other in others if not {measure.name, *parts}.isdisjoint(other.instead_of)]
        for available in [measure] if measure.key in known else stand_ins:
            found.setdefault(available.key, available)
    return list(found.values())


def legend(measures: Iterable[Measure]) -> str:
    """The line above a table of metrics: their units, and which way is better."""
    measures = list(measures)
    units = [
        f"{measure.key} in {measure.unit}" if measure.unit else f"{measure.key} a number"
        for measure in measures
        if not measure.percent
    ]
    lower = [measure.key for measure in measures if measure.better == "lower"]
    percent = "percent" + (f" ({', '.join(units)})" if units else "")
    better = "higher is better" + (f" (lower for {', '.join(lower)})" if lower else "")
    return f"{percent}, {better}"


def combined(measures: Sequence[Measure], means: Mapping[str, float]) -> dict[str, float]:
    """The values, by key, of the composites of which all parts are known.

    A composite whose package is no longer installed is left out.

    Args:
        means: means by key, as they are shown.

    Raises:
        PluginError: a composite's function failed.
    """
    keys = {(measure.evaluator, measure.name): measure.key for measure in measures}
    found: dict[str, float] = {}
    for measure in measures:
        parts = [means.get(keys[measure.evaluator, name]) for name in measure.of]
        if measure.of and None not in parts:
            try:
                combine = resolve(measure.combine)
            except PluginError:  # it was there when the metric was measured
                continue
            with boundary(f"The metric '{measure.key}' of the evaluator '{measure.evaluator}' failed: "):
                value = float(combine(*parts))
            if math.isfinite(value):
                found[measure.key] = value
    return found
