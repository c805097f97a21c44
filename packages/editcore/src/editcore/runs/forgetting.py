"""How edits are forgotten: retention by age, half-life, and the area under the curve.

The *age* of a fact is the number of facts written after its own batch: right after that batch it is 0. A fact is
*retained* if it still holds by the run's retention metric. A *sighting* is one measurement of one fact: ``(request id,
age, retained)``. This module imports no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict

from editcore.evaluation.summaries import average_of

if TYPE_CHECKING:
    from editcore.interfaces.history import LedgerEntry

__all__ = ["AgeBin", "Curve", "Forgetting", "Sighting", "ages", "forgetting", "monotone", "sample_by_age"]

Sighting = tuple[str, int, bool]
T = TypeVar("T")

_BINS = 10
"""Most bins after age 0; a picture cannot show more."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Retention at every age that was observed, in ascending order of age."""

    ages: tuple[int, ...]
    """In facts written since."""
    retention: tuple[float, ...]
    """Share of the facts seen at that age that are retained, 0 to 1."""
    facts: tuple[int, ...]
    """How many there were."""

    @classmethod
    def of(cls, sightings: Iterable[Sighting]) -> Curve:
        """The curve of some sightings; a fact that was seen twice at one age counts twice."""
        seen: dict[int, list[bool]] = {}
        for _, age, retained in sightings:
            seen.setdefault(age, []).append(retained)
        at = sorted(seen)
        return cls(
            ages=tuple(at),
            retention=tuple(sum(seen[age]) / len(seen[age]) for age in at),
            facts=tuple(len(seen[age]) for age in at),
        )

    @property
    def half_life(self) -> int | None:
        """The smallest observed age at which the monotone curve has fallen to half of its value at age 0 or below.

        The curve is smoothed by :func:`monotone` first, so that one unlucky age does not decide. ``None`` if it never
        falls so far, if no fact was seen at age 0, or if none was retained there.
        """
        smooth = monotone(self.retention, self.facts)
        if not self.ages or self.ages[0] != 0 or smooth[0] == 0:
            return None
        return next((age for age, value in zip(self.ages, smooth, strict=True) if value <= smooth[0] / 2), None)

    @property
    def area(self) -> float | None:
        """Mean retention over ages: the integral of the curve, linear between observed ages, divided by its range of
        ages. ``None`` without sightings; for a single age, the retention at that age."""
        if len(self.ages) < 2:
            return self.retention[0] if self.ages else None
        halves = [(earlier + later) / 2 for earlier, later in pairwise(self.retention)]
        widths = [later - age for age, later in pairwise(self.ages)]
        return sum(half * width for half, width in zip(halves, widths, strict=True)) / sum(widths)


def monotone(values: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
    """The non-increasing sequence nearest to ``values`` in weighted least squares."""
    from scipy.optimize import isotonic_regression  # half a second, and only runs with checkpoints need it

    return tuple(float(mean) for mean in isotonic_regression(values, weights=weights, increasing=False).x)


class AgeBin(BaseModel):
    """Retention of the facts that were seen at some ages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int
    """Smallest age of the bin."""
    last: int
    """Largest age of the bin."""
    age: float
    """Mean of the ages that were observed in the bin."""
    facts: int
    """Different facts seen."""
    retention: float
    """In percent. It is averaged within each fact first, so that a fact that was seen twice counts once."""
    interval: tuple[float, float]
    """Wilson's 95 % interval over facts, in percent."""


class Forgetting(BaseModel):
    """The forgetting of a run, from all its checkpoints together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    half_life: int | None
    """In facts; see :attr:`Curve.half_life`."""
    auc: float | None
    """Mean retention over ages, in percent; see :attr:`Curve.area`."""
    retention_by_age: tuple[AgeBin, ...]
    """Age 0 alone, then bins of equal width; those without a fact are left out."""


def forgetting(sightings: Sequence[Sighting], *, step: int) -> Forgetting:
    """Half-life, area and retention by age.

    Args:
        step: facts between two checkpoints. The width of the bins after age 0 is the smallest multiple of ``step`` that
            gives at most ten bins.
    """
    curve = Curve.of(sightings)
    oldest = curve.ages[-1] if curve.ages else 0
    width = step * max(1, math.ceil(oldest / (step * _BINS)))
    bounds = [(0, 0), *((first + 1, first + width) for first in range(0, oldest, width))]
    bins = []
    for first, last in bounds:
        inside = [sighting for sighting in sightings if first <= sighting[1] <= last]
        metric = average_of([name for name, _, _ in inside], [float(retained) for _, _, retained in inside])
        if metric is not None:
            bins.append(
                AgeBin(
                    first=first,
                    last=last,
                    age=sum(age for _, age, _ in inside) / len(inside),
                    facts=metric.facts,
                    retention=metric.mean,
                    interval=metric.interval,
                )
            )
    area = curve.area
    return Forgetting(half_life=curve.half_life, auc=None if area is None else 100 * area, retention_by_age=tuple(bins))


def ages(history: Sequence[LedgerEntry]) -> Mapping[str, tuple[int, int]]:
    """Batch and age of every request in a history of active batches. For a request that was written twice, the last
    time counts."""
    found: dict[str, tuple[int, int]] = {}
    since = 0
    for entry in reversed(history):
        for request in entry.new_requests:
            found.setdefault(request.id, (entry.batch, since))
        since += len(entry.new_requests)
    return found


def sample_by_age(facts: Sequence[T], count: int | None, *, seed: str) -> list[T]:
    """``count`` of ``facts``, which are in order of age: one drawn from each of ``count`` stretches of equal length.

    All facts if there are no more than ``count``, or if ``count`` is ``None``. The order is kept.
    """
    if count is None or count >= len(facts):
        return list(facts)
    rng = random.Random(seed)
    borders = [number * len(facts) // count for number in range(count + 1)]
    return [facts[rng.randrange(first, last)] for first, last in pairwise(borders)]
