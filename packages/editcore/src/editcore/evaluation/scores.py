"""Scores of prompts, and what they add up to. This module imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Kind",
    "Metric",
    "PromptScore",
    "Summary",
    "is_share",
    "summarize",
    "summarize_by_relation",
    "summarize_frame",
    "to_frame",
]

Kind = Literal["rewrite", "paraphrase", "neighborhood"]

KINDS: tuple[Kind, ...] = ("rewrite", "paraphrase", "neighborhood")
_SUCCESS: Mapping[Kind, str] = {"rewrite": "ES", "paraphrase": "PS", "neighborhood": "NS"}
_MAGNITUDE: Mapping[Kind, str] = {"rewrite": "EM", "paraphrase": "PM", "neighborhood": "NM"}
_Z = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScore:
    """What the model makes of one prompt of one record."""

    case_id: str
    """The request's id."""
    relation: str | None
    kind: Kind
    prompt: str
    nll_new: float
    """Mean negative log-likelihood per token of the new object, in nats."""
    nll_true: float | None
    """The same of the true object; ``None`` where the record has none."""
    success: bool | None
    """The wanted object is strictly likelier: the new one, for a neighbourhood prompt the true one."""
    magnitude: float | None
    """exp(−nll) of the wanted object minus that of the other one: a difference of per-token probabilities."""
    correct: bool
    """Every token of the wanted object is the most probable one (teacher forcing)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One quantity, in percent, averaged within each case first and then over cases."""

    mean: float
    std: float
    """Standard deviation of the cases' averages (population form)."""
    cases: int
    """Cases that have a prompt that counts."""
    prompts: int
    share: bool = True
    """Whether it lies between 0 and 100; a magnitude may be negative."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean over cases.

        For a share, Wilson's interval, which stays open at 0 and 100 %. Its number of trials is the one at which a
        binomial has the variance seen between cases: several prompts in a case tell more than one.
        """
        if not self.share:
            half = _Z * self.std / math.sqrt(self.cases)
            return (self.mean - half, self.mean + half)
        p = self.mean / 100
        variance = (self.std / 100) ** 2
        # Shares within cases vary at most as single prompts do, so there are at least as many trials as cases.
        trials = max(1.0, p * (1 - p) / variance if variance > 0 else 1.0) * self.cases
        centre = (p + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
        half = _Z * math.sqrt(p * (1 - p) / trials + (_Z / (2 * trials)) ** 2) / (1 + _Z**2 / trials)
        return (100 * max(0.0, centre - half), 100 * min(1.0, centre + half))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The metrics of one evaluation.

    ``ES``, ``PS``, ``NS``: the wanted object wins after the rewrite, paraphrase and neighbourhood prompts. ``EM``,
    ``PM``, ``NM``: by how much. ``rewrite_acc``, ``paraphrase_acc``, ``neighborhood_acc``: it is what the model says.
    """

    metrics: Mapping[str, Metric]
    """By name. A metric is absent if no case counts for it: no such prompts, or no ``target_true``."""
    cases: int
    """Cases that were measured."""

    @property
    def ES(self) -> float:  # noqa: N802  the field's name for it
        """Efficacy in percent; NaN if it cannot be computed."""
        return self._mean("ES")

    @property
    def PS(self) -> float:  # noqa: N802
        """Paraphrase success in percent; NaN if it cannot be computed."""
        return self._mean("PS")

    @property
    def NS(self) -> float:  # noqa: N802
        """Neighbourhood success in percent; NaN if it cannot be computed."""
        return self._mean("NS")

    @property
    def score(self) -> float:
        """Harmonic mean of ES, PS and NS: 0 if any is 0, NaN if any cannot be computed."""
        values = (self.ES, self.PS, self.NS)
        if any(math.isnan(value) for value in values):
            return math.nan
        return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)

    def _mean(self, name: str) -> float:
        return self.metrics[name].mean if name in self.metrics else math.nan

    def percentages(self) -> dict[str, float]:
        """Every metric and the score by name, in percent; what cannot be computed is left out."""
        values = {name: metric.mean for name, metric in self.metrics.items()}
        return values if math.isnan(self.score) else {**values, "score": self.score}

    def as_json(self) -> dict[str, object]:
        """:meth:`percentages` with spreads and counts; ``ES``, ``PS``, ``NS`` and ``score`` are ``None`` if unknown."""
        always = dict.fromkeys(("ES", "PS", "NS", "score"))
        return {
            **always,
            **self.percentages(),
            "std": {name: metric.std for name, metric in self.metrics.items()},
            "cases": {name: metric.cases for name, metric in self.metrics.items()},
        }


def summarize(scores: Iterable[PromptScore]) -> Summary:
    """Average within each case, then over cases; a case without a kind of prompt does not count for that kind."""
    scores = list(scores)
    metrics: dict[str, Metric] = {}
    for kind in KINDS:
        of_kind = [score for score in scores if score.kind == kind]
        values: tuple[tuple[str, list[float | None], bool], ...] = (
            (_SUCCESS[kind], [score.success for score in of_kind], True),
            (_MAGNITUDE[kind], [score.magnitude for score in of_kind], False),
            (f"{kind}_acc", [score.correct for score in of_kind], True),
        )
        for name, column, share in values:
            metric = case_metric([score.case_id for score in of_kind], column, share=share)
            if metric is not None:
                metrics[name] = metric
    return Summary(metrics=MappingProxyType(metrics), cases=len({score.case_id for score in scores}))


def summarize_by_relation(scores: Iterable[PromptScore]) -> dict[str, Summary]:
    """A summary per relation, in alphabetical order; records without a relation are left out."""
    groups: dict[str, list[PromptScore]] = {}
    for score in scores:
        if score.relation is not None:
            groups.setdefault(score.relation, []).append(score)
    return {relation: summarize(groups[relation]) for relation in sorted(groups)}


def summarize_frame(frame: pd.DataFrame) -> Summary:
    """What :func:`summarize` makes of the scores behind rows of :func:`to_frame`, which are all of one phase."""
    metrics: dict[str, Metric] = {}
    for kind in KINDS:
        rows = frame[frame["kind"] == kind]
        for name, column, share in (
            (_SUCCESS[kind], "success", True),
            (_MAGNITUDE[kind], "magnitude", False),
            (f"{kind}_acc", "accuracy", True),
        ):
            known = rows[rows[column].notna()]
            metric = case_metric(list(known["case_id"]), list(known[column]), share=share)
            if metric is not None:
                metrics[name] = replace(metric, prompts=int(known["prompts"].sum()))
    return Summary(metrics=MappingProxyType(metrics), cases=int(frame["case_id"].nunique()))


def is_share(metric: str) -> bool:
    """Whether a metric of that name lies between 0 and 100."""
    return metric not in _MAGNITUDE.values()


def case_metric(case_ids: Sequence[str], values: Sequence[float | None], *, share: bool = True) -> Metric | None:
    """The average within each case first and then over cases, in percent; ``None`` if no value is known."""
    cases: dict[str, list[float]] = {}
    for case_id, value in zip(case_ids, values, strict=True):
        if value is not None:
            cases.setdefault(case_id, []).append(float(value))
    if not cases:
        return None
    means = np.array([100 * sum(case) / len(case) for case in cases.values()])
    return Metric(
        mean=float(means.mean()),
        std=float(means.std()),
        cases=len(cases),
        prompts=sum(len(case) for case in cases.values()),
        share=share,
    )


def to_frame(scores: Iterable[PromptScore], *, phase: str) -> pd.DataFrame:
    """A row per case and prompt kind, averaged over the case's prompts of that kind.

    Columns: ``phase``, ``case_id``, ``relation``, ``kind``, ``prompts`` (how many), ``success``, ``magnitude`` and
    ``accuracy`` (as shares of 1; NaN where there is no true object), ``nll_new`` and ``nll_true`` (nats per token).
    """
    import pandas as pd

    groups: dict[tuple[str, Kind], list[PromptScore]] = {}
    for score in scores:
        groups.setdefault((score.case_id, score.kind), []).append(score)
    rows = [
        {
            "phase": phase,
            "case_id": case_id,
            "relation": group[0].relation,
            "kind": kind,
            "prompts": len(group),
            "success": _average([score.success for score in group]),
            "magnitude": _average([score.magnitude for score in group]),
            "accuracy": _average([score.correct for score in group]),
            "nll_new": _average([score.nll_new for score in group]),
            "nll_true": _average([score.nll_true for score in group]),
        }
        for (case_id, kind), group in groups.items()
    ]
    text = ("phase", "case_id", "relation", "kind")
    numbers = ("success", "magnitude", "accuracy", "nll_new", "nll_true")
    types = {**dict.fromkeys(text, "string"), "prompts": "int64", **dict.fromkeys(numbers, "float64")}
    columns = [*text, "prompts", *numbers]
    return pd.DataFrame(rows, columns=columns).astype(types)


def _average(values: Sequence[float | None]) -> float:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
