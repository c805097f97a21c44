"""What evaluators measure, announced as data, and what they find. This module imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from editcore.interfaces.documented import documented
from editcore.interfaces.progress import Progress, silent

__all__ = ["HOLDS", "REWRITE", "EvaluationContext", "MetricSpec", "Observation", "check_metrics"]

REWRITE = "rewrite"
"""Kind of the question that every record asks without a probe: its edited prompt."""

HOLDS = 0.5
"""The least value of an observation that says yes (:attr:`MetricSpec.retention`, :attr:`MetricSpec.tally`)."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One quantity that an evaluator measures, and how it is shown.

    Tables, figures, reports, sweeps and checkpoints know of a metric what stands here.

    Raises:
        ValueError: what is said does not go together.
    """

    name: str
    """Its key in tables and files, such as ``said``: a letter, then letters, digits and underscores. Unique within its
    evaluator."""
    label: str
    """What readers call it, such as ``Facts said``."""
    meaning: str = ""
    """What it says, in a sentence for the report."""
    unit: str = "%"
    """``%``: its values are parts of 1, and are shown times 100. Any other stands behind the number (``nats``); empty
    for a plain number."""
    better: Literal["higher", "lower"] = "higher"
    """Which way is better."""
    signed: bool = False
    """True for a percentage that may be negative, such as a difference. Otherwise one lies between 0 and 100, its axis
    does, and its interval is Wilson's."""
    average: Literal["facts", "prompts"] = "facts"
    """``facts``: averaged within each fact first, then over facts. ``prompts``: over all observations alike."""
    of: tuple[str, ...] = ()
    """For a composite: the metrics of the same evaluator that it is made of. It has no observations of its own."""
    combine: str = ""
    """``"module:function"`` of a composite: called with the means of ``of``, in their order and as they are shown (a
    percentage between 0 and 100), it returns the composite's value. It is not called unless all of them are known."""
    show: Literal["always", "report", "data"] = "always"
    """``always``: in every table and picture. ``report``: in the report's full table only. ``data``: in files only."""
    instead_of: tuple[str, ...] = ()
    """Metrics of the same evaluator in whose place it stands where they cannot be told of the facts at hand: in tables
    and pictures, as what tells retention, and as objective."""
    keep: bool = False
    """True for what an edit should leave as it was: pictures show its value before any edit as a line."""
    retention: bool = False
    """True if its observations, one per fact, say whether the fact is in the model: 0.5 or more is yes. Forgetting is
    told by it. At most one per evaluator."""
    objective: bool = False
    """True for what trials are compared by. Of several the first decides, and the next among equals."""
    tally: str = ""
    """For the last lines of a run, behind a number of facts: ``are said`` gives "38 of 40 facts are said; not: ...".
    Its observations, one per fact, are read as those of ``retention``. That of a metric with another ``show`` than
    ``always`` is told only where no such metric has one."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"the metric's name {self.name!r} is not made of letters, digits and underscores")
        if not self.label.strip():
            raise ValueError(f"the metric {self.name} has no label")
        if bool(self.of) != bool(self.combine):
            raise ValueError(f"the metric {self.name} needs both 'of' and 'combine', or neither")
        if self.of and (self.retention or self.tally):
            raise ValueError(f"the metric {self.name} is a composite, which says nothing of single facts")

    @property
    def percent(self) -> bool:
        """Whether its values are parts of 1, shown as percentages."""
        return self.unit == "%"

    @property
    def share(self) -> bool:
        """Whether it lies between 0 and 100 %."""
        return self.percent and not self.signed


def check_metrics(metrics: Sequence[MetricSpec]) -> None:
    """Refuse metrics of one evaluator that do not go together.

    Raises:
        ValueError: a name comes twice, a composite is made of what is not there, one stands in for what is not there,
            or two stand for retention.
    """
    plain = {one.name for one in metrics if not one.of}
    names = [one.name for one in metrics]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the metric {name} is announced twice")
    for one in metrics:
        if missing := [name for name in one.of if name not in plain]:
            raise ValueError(f"the composite {one.name} is made of {missing[0]}, which is no metric with observations")
        if missing := [name for name in one.instead_of if name not in names or name == one.name]:
            raise ValueError(f"the metric {one.name} stands in for {missing[0]}, which is no other metric")
    if sum(one.retention for one in metrics) > 1:
        raise ValueError("more than one metric stands for retention")


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one metric is on one question of one record. What cannot be told is left out: there is no observation."""

    request_id: str
    """Of the record's request."""
    metric: str
    """Name of the metric, as it is announced."""
    value: float
    """In the metric's unit; a part of 1 for a percentage. Finite."""
    kind: str = REWRITE
    """Of the probe; ``rewrite`` for the edited prompt itself."""
    prompt: str = ""
    """The question, in full."""
    text: str | None = None
    """What the model said, where it was let speak."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationContext:
    """What an evaluator may use besides the model and the records."""

    unedited: Sequence[Observation] | None = None
    """What the same evaluator observed of the unedited model on these records: to tell what is unchanged. ``None``
    while the unedited model itself is measured. It survives a kill and a resume of the run."""
    seed: int = 0
    """Seed of everything random in the measurement: the same before and after the edits."""
    progress: Progress = field(default=silent)
    """Where long measurements report themselves."""
