"""The metrics of free generation: those of the bare prompt, those of other contexts, and a judge's.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from editcore.evaluation.contexts import Way
from editcore.interfaces.metrics import MetricSpec

__all__ = ["BARE", "JUDGED", "further_metrics"]

BARE: tuple[MetricSpec, ...] = (
    MetricSpec(
        name="facts_said",
        label="Facts said",
        meaning="The share of edited prompts to which the model's own answer contains the new object.",
        retention=True,
        objective=True,
        tally="are said",
        checklist="generated success",
    ),
    MetricSpec(
        name="paraphrases_said",
        label="Paraphrases said",
        meaning="The share of paraphrases to which the model's own answer contains the new object.",
        needs="paraphrases",
        checklist="rephrase",
    ),
    MetricSpec(
        name="consequences_said",
        label="Consequences said",
        meaning="The share of questions that follow from the edited facts (portability, multi-hop) to which the "
        "answer contains a right one.",
        needs="questions that follow from the facts (portability, multi-hop)",
    ),
    MetricSpec(
        name="unchanged",
        label="Unchanged elsewhere",
        meaning="The share of questions about other things to which the answer is exactly that of the unedited model.",
        keep=True,
        needs="questions about other things",
        checklist="locality, unchanged",
    ),
    MetricSpec(
        name="elsewhere_correct",
        label="Right elsewhere",
        meaning="The share of questions about other things to which the answer contains the data set's answer. An "
        "unedited model does not reach 100 %.",
        keep=True,
        show="report",
        needs="questions about other things, with an answer",
        checklist="locality, correct",
    ),
    MetricSpec(
        name="distinct_bigrams",
        label="Distinct word pairs",
        meaning="The share of different pairs among the pairs of neighbouring words in a free continuation: low if "
        "the text repeats itself. Compare it with the value before the edits.",
        keep=True,
        needs="a continuation of two words or more",
    ),
    MetricSpec(
        name="elsewhere_answered",
        label="Answered elsewhere",
        meaning="The share of questions about other things to which there is an answer at all.",
        show="data",
        needs="questions about other things",
    ),
    MetricSpec(
        name="facts_said_first",
        label="Facts said at once",
        meaning="The share of edited prompts to which the answer begins with the new object.",
        show="report",
    ),
    MetricSpec(
        name="paraphrases_said_first",
        label="Paraphrases said at once",
        meaning="The share of paraphrases to which the answer begins with the new object.",
        show="report",
        needs="paraphrases",
    ),
)
"""The metrics of the bare prompt, which are always announced."""

_ONLY_BARE = ("distinct_bigrams",)
_BY_NAME = {metric.name: metric for metric in BARE}

_SHOWN = ("facts_said", "unchanged", "elsewhere_correct")
"""Those of another way to ask that tables show, so that they stay narrow."""
_ELSEWHERE = "questions about other things"
_CAUTION = (
    "unchanged_... compares with what the unedited model says, right or wrong; elsewhere_correct_... compares with the "
    "answers of the data set, of which the unedited model gives a part (see the row before). Papers call both locality."
)


def _of_way(way: Way, *, stands_in: bool) -> Iterator[MetricSpec]:
    """The metrics of a way to ask that is not the bare prompt.

    Args:
        stands_in: whether they take the place of those of the bare prompt, which is not asked.
    """
    for metric in BARE:
        if metric.name in _ONLY_BARE:
            continue
        yield replace(
            metric,
            name=metric.name + way.suffix,
            label=f"{metric.label} ({way.label})",
            meaning=f"{metric.meaning.rstrip('.')}; {way.how}.",
            show="always" if metric.name in _SHOWN else "data" if metric.show == "data" else "report",
            retention=False,
            objective=False,
            tally=metric.tally if stands_in else "",
            instead_of=(metric.name,) if stands_in else (),
            needs=" and ".join(filter(None, (way.needs, _ELSEWHERE if metric.keep else metric.needs))),
            caution=_CAUTION if metric.name == "unchanged" else "",
        )


def _of_judge(way: Way, judge: str) -> Iterator[MetricSpec]:
    """What a judge finds right, of the answers to one way of asking."""
    for name, of in JUDGED.items():
        metric = _BY_NAME[of]
        asked = f"; {way.how}" if way.how else ""
        yield MetricSpec(
            name=name + way.suffix,
            label=f"{_JUDGED_LABELS[name]} ({', '.join(filter(None, (way.label, 'judged')))})",
            meaning=f"The share of {_JUDGED_OF[name]} that the judge {judge} finds to be a right answer{asked}.",
            keep=metric.keep,
            show="always" if name in ("facts_judged", "elsewhere_judged") else "report",
            needs="the judge's verdicts",
        )


JUDGED = {
    "facts_judged": "facts_said",
    "paraphrases_judged": "paraphrases_said",
    "consequences_judged": "consequences_said",
    "elsewhere_judged": "elsewhere_correct",
}
"""By metric of the judge, the metric that looks for the right answer in the same answers."""
_JUDGED_LABELS = {
    "facts_judged": "Facts right",
    "paraphrases_judged": "Paraphrases right",
    "consequences_judged": "Consequences right",
    "elsewhere_judged": "Right elsewhere",
}
_JUDGED_OF = {
    "facts_judged": "answers to edited prompts",
    "paraphrases_judged": "answers to paraphrases",
    "consequences_judged": "answers to questions that follow from the edited facts",
    "elsewhere_judged": "answers to questions about other things",
}


def further_metrics(ways: Sequence[Way], judge: str | None) -> list[MetricSpec]:
    """The metrics that settings add to :data:`BARE`."""
    bare = Way() in ways
    found = [
        metric
        for number, way in enumerate(ways)
        if way != Way()
        for metric in _of_way(way, stands_in=number == 0 and not bare)
    ]
    return found if judge is None else [*found, *(metric for way in ways for metric in _of_judge(way, judge))]
