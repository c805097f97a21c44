"""CounterFact's measurement: does the new object win where it should, and the true one where it must?

After MEMIT (arXiv 2210.07229) and its evaluation code. With nll(o|p) the mean negative log-likelihood per token of " o"
after p, both objects of the edit are scored after every prompt of the record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editcore.evaluation.scores import Kind, PromptScore
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import FactRecord

if TYPE_CHECKING:
    from editcore.evaluation.scoring import TargetScore
    from editcore.models import LanguageModel

__all__ = ["CounterFactEvaluator"]


@dataclass(frozen=True, slots=True)
class _Question:
    record: FactRecord
    kind: Kind
    prompt: str

    @property
    def targets(self) -> tuple[str, ...]:
        """The new object, then the true one where the record has it."""
        request = self.record.request
        return (request.target_new,) if request.target_true is None else (request.target_new, request.target_true)


class CounterFactEvaluator:
    """Scores the rewrite, paraphrase and neighbourhood prompts of fact records.

    A record without ``target_true`` has nothing to compare with: its rewrite and paraphrase prompts get an accuracy but
    no success and no magnitude, and its neighbourhood prompts, whose answer is ``target_true``, are left out.
    """

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], *, progress: Progress = silent
    ) -> list[PromptScore]:
        """One score per record and prompt: records in order, within one the rewrite prompt first."""
        from editcore.evaluation.scoring import score_targets  # imports torch

        questions = [question for record in records for question in _questions(record)]
        asked = [(question.prompt, target) for question in questions for target in question.targets]
        scored = iter(
            score_targets(
                model, [prompt for prompt, _ in asked], [target for _, target in asked], progress=progress,
                description="Evaluating",
            )
        )  # fmt: skip
        return [_judge(question, [next(scored) for _ in question.targets]) for question in questions]


def _questions(record: FactRecord) -> Iterator[_Question]:
    yield _Question(record, "rewrite", record.request.text)
    for probe in record.of_kind("paraphrase"):
        yield _Question(record, "paraphrase", probe.prompt)
    if record.request.target_true is not None:
        for probe in record.of_kind("neighborhood"):
            yield _Question(record, "neighborhood", probe.prompt)


def _judge(question: _Question, scores: Sequence[TargetScore]) -> PromptScore:
    new = scores[0]
    true = scores[1] if len(scores) > 1 else None
    wanted, other = (true, new) if question.kind == "neighborhood" else (new, true)
    assert wanted is not None
    return PromptScore(
        case_id=question.record.request.id,
        relation=question.record.relation,
        kind=question.kind,
        prompt=question.prompt,
        nll_new=new.nll,
        nll_true=None if true is None else true.nll,
        # A tie is a failure: strict inequality, as in the reference evaluation.
        success=None if other is None else wanted.nll < other.nll,
        magnitude=None if other is None else math.exp(-wanted.nll) - math.exp(-other.nll),
        correct=wanted.correct,
    )
