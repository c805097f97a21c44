"""CounterFact's measurement: is the new object likelier than the true one after the prompts where it should be?

After MEMIT (arXiv 2210.07229) and its evaluation code. With nll(o|p) the mean negative log-likelihood per token of " o"
after p, both objects of the edit are scored after every prompt of the record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editcore.interfaces.metrics import REWRITE, ChecklistItem, EvaluationContext, MetricSpec, Observation
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord

if TYPE_CHECKING:
    from editcore.evaluation.scoring import TargetScore
    from editcore.models import LanguageModel

__all__ = ["COUNTERFACT", "CounterFactEvaluator", "harmonic_mean"]

_PARAPHRASE, _NEIGHBORHOOD = "paraphrase", "neighborhood"


@dataclass(frozen=True, slots=True)
class _Names:
    """The published names of the metrics of one kind of prompt."""

    success: str
    magnitude: str
    accuracy: str
    nll_new: str
    nll_true: str
    label: str
    needs: str


_NAMES = {
    REWRITE: _Names("ES", "EM", "rewrite_acc", "rewrite_nll_new", "rewrite_nll_true", "Efficacy", ""),
    _PARAPHRASE: _Names(
        "PS", "PM", "paraphrase_acc", "paraphrase_nll_new", "paraphrase_nll_true", "Paraphrase", "paraphrases"
    ),
    _NEIGHBORHOOD: _Names(
        "NS",
        "NM",
        "neighborhood_acc",
        "neighborhood_nll_new",
        "neighborhood_nll_true",
        "Neighbourhood",
        "neighbourhood prompts",
    ),
}
_MEANINGS = {
    REWRITE: "The share of edited prompts after which the new object is likelier than the true one.",
    _PARAPHRASE: "The share of paraphrases after which the new object is likelier than the true one.",
    _NEIGHBORHOOD: "The share of prompts about other subjects after which their true object is still likelier than the "
    "new one.",
}
_CHECKLIST: Mapping[str, ChecklistItem] = {
    REWRITE: "teacher-forced success",
    _PARAPHRASE: "rephrase",
    _NEIGHBORHOOD: "locality, correct",
}


def _metrics() -> Iterator[MetricSpec]:
    for kind, names in _NAMES.items():
        yield MetricSpec(
            name=names.success,
            label=f"{names.label} ({names.success})",
            meaning=_MEANINGS[kind],
            checklist=_CHECKLIST[kind],
            keep=kind == _NEIGHBORHOOD,
            retention=kind == REWRITE,
            needs=_compared(names),
        )
    successes = tuple(names.success for names in _NAMES.values())
    yield MetricSpec(
        name="score",
        label="Score (harmonic mean)",
        meaning=f"The harmonic mean of {', '.join(successes[:-1])} and {successes[-1]}.",
        of=successes,
        combine="editcore.evaluation.counterfact:harmonic_mean",
        objective=True,
    )
    for names in _NAMES.values():
        yield MetricSpec(
            name=names.magnitude,
            label=f"{names.label} magnitude ({names.magnitude})",
            meaning=f"The mean difference of the two objects' probabilities per token that {names.success} compares: "
            "positive if the wanted object is likelier.",
            signed=True,
            show="report",
            needs=_compared(names),
        )
    for kind, names in _NAMES.items():
        yield MetricSpec(
            name=names.accuracy,
            label=f"{names.label} accuracy",
            meaning=f"The share of the prompts of {names.success} after which every token of the wanted object is the "
            "likeliest one.",
            checklist=_CHECKLIST[kind],
            show="report",
            # Without a true object there is nothing to compare with, and only this can be measured.
            instead_of=(names.success,),
            tally="are what the model finds likeliest" if kind == REWRITE else "",
            needs=_compared(names) if kind == _NEIGHBORHOOD else names.needs,
        )
    magnitudes = tuple(names.magnitude for names in _NAMES.values())
    yield MetricSpec(
        name="margin",
        label="Margin (mean magnitude)",
        meaning=f"The mean of {', '.join(magnitudes[:-1])} and {magnitudes[-1]}.",
        of=magnitudes,
        combine="editcore.evaluation.counterfact:mean",
        signed=True,
        objective=True,
        show="report",
    )
    for kind, names in _NAMES.items():
        for name, of in ((names.nll_new, "new"), (names.nll_true, "true")):
            yield MetricSpec(
                name=name,
                label=f"{names.label}, −log p of the {of} object",
                meaning="The mean negative log-likelihood per token.",
                unit="nats",
                better="lower" if (of == "true") == (kind == _NEIGHBORHOOD) else "higher",
                show="data",
                needs=_compared(names) if of == "true" else names.needs,
            )


def _compared(names: _Names) -> str:
    """What a record needs for a comparison of the new object with the true one."""
    return " and ".join(filter(None, (names.needs, "a true object")))


def harmonic_mean(*values: float) -> float:
    """The harmonic mean; 0 if any value is 0."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def mean(*values: float) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


COUNTERFACT = EvaluatorSpec(
    "counterfact",
    target="editcore.evaluation.counterfact:CounterFactEvaluator",
    summary="Efficacy, paraphrase and neighbourhood: does the new object win over the true one?",
    metrics=tuple(_metrics()),
)


@dataclass(frozen=True, slots=True)
class _Question:
    record: FactRecord
    names: _Names
    kind: str
    prompt: str

    @property
    def targets(self) -> tuple[str, ...]:
        """The new object, then the true one if the record has it."""
        request = self.record.request
        return (request.target_new,) if request.target_true is None else (request.target_new, request.target_true)

    @property
    def join(self) -> str | None:
        """The request's own join for its edited prompt; ``None`` for a probe, whose last character decides."""
        return self.record.request.join if self.kind == REWRITE else None


class CounterFactEvaluator:
    """Scores the rewrite, paraphrase and neighbourhood prompts of fact records.

    A record without ``target_true`` has nothing to compare with: its rewrite and paraphrase prompts get an accuracy but
    no success and no magnitude, and its neighbourhood prompts, whose answer is ``target_true``, are left out.
    """

    def evaluate(
        self,
        model: LanguageModel,
        records: Sequence[FactRecord],
        context: EvaluationContext = EvaluationContext(),  # noqa: B008  frozen
    ) -> list[Observation]:
        """Observations in the order of the records. For each record its rewrite prompt comes first, and for each prompt
        its success."""
        from editcore.evaluation.scoring import score_targets  # imports torch

        questions = [question for record in records for question in _questions(record)]
        asked = [(question, target) for question in questions for target in question.targets]
        scored = iter(
            score_targets(
                model, [question.prompt for question, _ in asked], [target for _, target in asked],
                joins=[question.join for question, _ in asked], progress=context.progress, description="Evaluating",
            )
        )  # fmt: skip
        return [
            observation
            for question in questions
            for observation in _judge(question, [next(scored) for _ in question.targets])
        ]


def _questions(record: FactRecord) -> Iterator[_Question]:
    yield _Question(record, _NAMES[REWRITE], REWRITE, record.request.text)
    kinds = (_PARAPHRASE,) if record.request.target_true is None else (_PARAPHRASE, _NEIGHBORHOOD)
    for kind in kinds:
        for probe in record.of_kind(kind):
            yield _Question(record, _NAMES[kind], probe.kind, probe.prompt)


def _judge(question: _Question, scores: Sequence[TargetScore]) -> Iterator[Observation]:
    new, true = scores[0], scores[1] if len(scores) > 1 else None
    names = question.names
    wanted, other = (true, new) if names is _NAMES[_NEIGHBORHOOD] else (new, true)
    assert wanted is not None
    values = {
        # A tie is a failure: strict inequality, as in the reference evaluation.
        names.success: None if other is None else float(wanted.nll < other.nll),
        names.magnitude: None if other is None else math.exp(-wanted.nll) - math.exp(-other.nll),
        names.accuracy: float(wanted.correct),
        names.nll_new: new.nll,
        names.nll_true: None if true is None else true.nll,
    }
    for name, value in values.items():
        if value is not None:
            yield Observation(
                request_id=question.record.request.id, metric=name, value=value, kind=question.kind,
                prompt=question.prompt,
            )  # fmt: skip
