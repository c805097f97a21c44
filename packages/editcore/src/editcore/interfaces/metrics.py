"""The metrics that evaluators announce, and the observations that they make. This module imports no torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from editcore.interfaces.documented import documented
from editcore.interfaces.progress import Progress, silent

__all__ = ["HOLDS", "REWRITE", "ChecklistItem", "EvaluationContext", "MetricSpec", "Observation", "check_metrics"]

REWRITE = "rewrite"
"""The kind of an observation about the edited prompt itself, which is no probe."""

HOLDS = 0.5
"""An observation of at least this value means yes (:attr:`MetricSpec.retention`, :attr:`MetricSpec.tally`)."""

ChecklistItem = Literal[
    "teacher-forced success", "generated success", "rephrase", "locality, unchanged", "locality, correct", "capability"
]
"""What a report's checklist asks of metrics. A success is about the edited prompt: *teacher-forced* if the model is
given the answer, or its beginning; *generated* if it answers by itself. *Rephrase* is about other wordings of it. What
an edit is not about should be *unchanged*, or is compared with the *correct* answer. *Capability* is what the model can
do beside its facts."""
_log = logging.getLogger(__name__)


def _log_warning(sentence: str) -> None:
    _log.warning("%s", sentence)


_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One quantity that an evaluator measures, and how it is shown.

    Tables, figures, reports, sweeps and checkpoints know nothing else about a metric.

    Raises:
        ValueError: the fields do not fit together.
    """

    name: str
    """Its key in tables and files, such as ``said``: a letter, then letters, digits and underscores. Unique within its
    evaluator."""
    label: str
    """What readers call it, such as ``Facts said``."""
    meaning: str = ""
    """What its value means, in a sentence for the report."""
    unit: str = "%"
    """``%``: its values are parts of 1, and are shown times 100. Any other unit (``nats``) is written after the number;
    empty for a plain number."""
    better: Literal["higher", "lower"] = "higher"
    """Which way is better."""
    signed: bool = False
    """True for a percentage that may be negative, such as a difference. Any other percentage lies between 0 and 100, as
    does its axis, and its interval is Wilson's."""
    about: Literal["facts", "model"] = "facts"
    """``model`` if its observations are about the model as a whole. Their facts mean nothing then: such a metric is in
    no table by fact or by relation, and its ``average`` is ``prompts``."""
    checklist: ChecklistItem | Literal[""] = ""
    """The item of a report's checklist that it answers; empty for none."""
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
    """Metrics of the same evaluator that it replaces, in tables and pictures, for retention and as objective, if they
    have no value on the facts at hand."""
    keep: bool = False
    """True for what an edit should not change. Pictures show its value before any edit as a line."""
    retention: bool = False
    """True if its observations, one per fact, say whether the fact is in the model: 0.5 or more is yes. Forgetting is
    measured by it. At most one metric of an evaluator has it."""
    objective: bool = False
    """True if trials are compared by it. The first such metric decides; among equals, the next."""
    tally: str = ""
    """The predicate of a sentence at the end of a run: ``are said`` gives "38 of 40 facts are said; not: ...". Its
    observations, one per fact, mean yes or no as for ``retention``. The tally of a metric whose ``show`` is not
    ``always`` is printed only if no metric with ``show="always"`` has one."""

    needs: str = ""
    """What a record must have to be measured by it, in words: ``paraphrases``, ``a true object``. A run in which the
    metric has no value says that it needs this. Empty if every record can be measured."""
    caution: str = ""
    """A sentence on a convention without which its value is misread. A run in which the metric has a value prints
    it."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"the metric's name {self.name!r} is not made of letters, digits and underscores")
        if not self.label.strip():
            raise ValueError(f"the metric {self.name} has no label")
        if bool(self.of) != bool(self.combine):
            raise ValueError(f"the metric {self.name} needs both 'of' and 'combine', or neither")
        if self.about == "model" and self.average != "prompts":
            raise ValueError(f"the metric {self.name} is about the model, so its average must be over prompts")
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
        ValueError: a name comes twice, a composite or a replacement names a metric that is not there, or two metrics
            stand for retention.
    """
    plain = {metric.name for metric in metrics if not metric.of}
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the metric {name} is announced twice")
    for metric in metrics:
        if missing := [name for name in metric.of if name not in plain]:
            raise ValueError(
                f"the composite {metric.name} is made of {missing[0]}, which is not a metric with observations"
            )
        if missing := [name for name in metric.instead_of if name not in names or name == metric.name]:
            raise ValueError(f"the metric {metric.name} stands in for {missing[0]}, which is not another metric")
    if sum(metric.retention for metric in metrics) > 1:
        raise ValueError("more than one metric stands for retention")


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The value of one metric on one question of one record. Where a metric has no value, there is no observation."""

    request_id: str
    """The id of the record's request."""
    metric: str
    """Name of the metric, as it is announced."""
    value: float
    """In the metric's unit; for a percentage, the fraction (0.5 for 50 %). Always finite."""
    kind: str = REWRITE
    """The kind of the probe; ``rewrite`` for the edited prompt itself."""
    prompt: str = ""
    """The question, in full."""
    text: str | None = None
    """What the model generated; ``None`` for a metric that generates nothing."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationContext:
    """What an evaluator may use besides the model and the records."""

    unedited: Sequence[Observation] | None = None
    """The same evaluator's observations of the unedited model on these records, to find what has changed. ``None``
    while the unedited model itself is measured. They are kept when a run is killed and resumed."""
    seed: int = 0
    """Seed of everything random in the measurement: the same before and after the edits."""
    progress: Progress = field(default=silent)
    """Shows how far a long measurement is."""
    folder: Path | None = None
    """Where it may keep what is costly to ask again, such as replies of a service: the run's folder. ``None`` where
    nothing is kept."""
    tell: Callable[[str], None] = field(default=_log_warning)
    """Called with a sentence for the user, on what could not be measured and why. Sentences are among the notes of the
    run."""
