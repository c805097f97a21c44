"""What a report of measurements is made from, be they of a run or of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from editcore.evaluation import Measure

if TYPE_CHECKING:
    import pandas as pd

    from editcore.runs.results import Tally

__all__ = ["Measured", "MeasuredSummary"]


class MeasuredSummary(Protocol):
    """The means of a measurement: ``summary.json`` or ``evaluation.json``."""

    @property
    def metrics(self) -> Sequence[Measure]:
        """What was measured, in the order in which it is shown."""
        ...

    @property
    def before(self) -> Mapping[str, float | None]:
        """Of the unedited model, by the key of the metric."""
        ...

    @property
    def after(self) -> Mapping[str, float | None]:
        """The same of the edited model."""
        ...

    @property
    def tallies(self) -> Sequence[Tally]:
        """How many of the facts hold."""
        ...


class Measured(Protocol):
    """Observations with their means."""

    @property
    def summary(self) -> MeasuredSummary:
        """The means."""
        ...

    def phase(self, name: str) -> pd.DataFrame:
        """The observations ``before`` or ``after`` the edits."""
        ...
