"""The metrics of a run: those that its evaluators announce, under the keys that its files and tables have for them."""

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


def shown(measures: Sequence[Measure], known: Collection[str] | None = None) -> tuple[Measure, ...]:
    """Those that every table and picture has.

    Args:
        known: keys of what can be told of the facts at hand: the others of an evaluator give their place to those that
            stand in for them (:attr:`editcore.MetricSpec.instead_of`), if any of those can be told. Left out, nobody
            has looked yet, and all keep theirs.
    """
    always = [one for one in measures if one.show == "always"]
    found: list[Measure] = []
    for evaluator in dict.fromkeys(one.evaluator for one in always):
        mine = [one for one in always if one.evaluator == evaluator]
        told = mine if known is None else _known(mine, measures, known)
        found += told if any(one.show != "always" for one in told) else mine
    return tuple(found)


def retention_of(measures: Sequence[Measure], observed: Collection[str]) -> Measure | None:
    """What tells whether a fact is in the model: the first such metric that observed something, else one that stands
    in for it and did, or else the first; ``None`` if none tells.

    Args:
        observed: keys of the metrics with observations.
    """
    telling = [one for one in measures if one.retention]
    return next(iter([*_decisive(telling, measures, observed), *telling]), None)


def objectives_of(measures: Sequence[Measure], known: Collection[str] | None = None) -> tuple[Measure, ...]:
    """What trials are compared by, the first before the next; of the first evaluator that has such metrics.

    Args:
        known: keys of what can be told: only such metrics count, and what stands in for them where none can. If there
            is nothing of either, it is as if left out.
    """
    having = [one for one in measures if one.objective]
    having = (having if known is None else _decisive(having, measures, known)) or having
    return tuple(one for one in having if one.evaluator == having[0].evaluator)


def _decisive(wanted: Sequence[Measure], measures: Sequence[Measure], known: Collection[str]) -> list[Measure]:
    """Those of ``wanted`` that can be told; what stands in for them only where none can."""
    return [one for one in wanted if one.key in known] or _known(wanted, measures, known)


def _known(wanted: Sequence[Measure], measures: Sequence[Measure], known: Collection[str]) -> list[Measure]:
    """Those of ``wanted`` that can be told, in the place of each other one what stands in for it; each once.

    What stands in for a composite of which nothing is known is what does for its parts.
    """
    found: dict[str, Measure] = {}
    for one in wanted:
        mine = [other for other in measures if other.evaluator == one.evaluator and other.key in known]
        parts = [] if any(other.name in one.of for other in mine) else one.of
        others = [other for other in mine if not {one.name, *parts}.isdisjoint(other.instead_of)]
        found |= {told.key: told for told in ([one] if one.key in known else others) if told.key not in found}
    return list(found.values())


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
