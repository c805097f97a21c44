"""Long answers: how much of an answer of many words does the model say?

As for UnKE and AnyEdit (arXiv 2502.05628), by ROUGE-L recall (Lin 2004): the length of the longest common subsequence
of the words of both texts, divided by the number of words of the right answer. Words are compared in lower case and
without punctuation, and are not stemmed.

Departures: the model writes as many tokens as the right answer has, because a small model does not stop by itself. BLEU
and the cosine of sentence embeddings are not computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from editcore.interfaces.metrics import REWRITE, EvaluationContext, MetricSpec, Observation
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord
from editcore.settings.hparams import HParams

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["LONG_ANSWERS", "LongAnswersEvaluator", "LongAnswersHParams", "rouge_l_recall"]

_FACT, _PARAPHRASE, _PART = "long_facts_recall", "long_paraphrases_recall", "parts_recall"

LONG_ANSWERS = EvaluatorSpec(
    "long-answers",
    target="editcore.evaluation.long_answers:LongAnswersEvaluator",
    hparams="editcore.evaluation.long_answers:LongAnswersHParams",
    summary="Answers of many words: how much of the new text does the model say (ROUGE-L recall)?",
    metrics=(
        MetricSpec(
            name=_FACT,
            checklist="generated success",
            label="Long facts, ROUGE-L recall",
            meaning="The share of the words of the new text that the model's own continuation of the edited prompt "
            "has, in their order.",
            objective=True,
            needs="a target of many words (least_words)",
        ),
        MetricSpec(
            name=_PARAPHRASE,
            checklist="rephrase",
            label="Long paraphrases, ROUGE-L recall",
            meaning="The same after a paraphrase of the prompt.",
            needs="paraphrases of an edit with a target of many words",
        ),
        MetricSpec(
            name=_PART,
            label="Parts, ROUGE-L recall",
            meaning="The same for questions about a part of the text, each with its own answer of any length.",
            needs="questions about parts of a long target (UnKE)",
        ),
    ),
)


class LongAnswersHParams(HParams):
    """Which facts are asked."""

    least_words: Annotated[int, Field(ge=2)] = 10
    """Words that a target must have to count as long."""
    facts: Annotated[int, Field(ge=1)] | None = 20
    """Facts with a long target that are asked, from the front; none for all."""


@dataclass(frozen=True, slots=True)
class _Question:
    fact: str
    metric: str
    kind: str
    prompt: str
    answer: str


class LongAnswersEvaluator:
    """Lets the model write as many tokens as each right answer has."""

    def __init__(self, hparams: LongAnswersHParams | None = None) -> None:
        self.hparams = hparams or LongAnswersHParams()

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        """For each fact with a long target, its edited prompt, then its paraphrases, then its parts."""
        least = self.hparams.least_words
        long = [record for record in records if len(_words(record.request.target_new)) >= least]
        questions = [question for record in long[: self.hparams.facts] for question in _questions(record)]
        lengths = [max(1, len(model.read_text(question.answer))) for question in questions]
        found = []
        with context.progress.task("Writing long answers", len(questions)) as advance:
            for first in range(0, len(questions), _CHUNK):
                part = slice(first, first + _CHUNK)
                asked = questions[part]
                texts = model.generate([question.prompt for question in asked], max_new_tokens=lengths[part])
                found += [
                    Observation(
                        request_id=question.fact,
                        metric=question.metric,
                        value=rouge_l_recall(question.answer, text),
                        kind=question.kind,
                        prompt=question.prompt,
                        text=text,
                    )
                    for question, text in zip(asked, texts, strict=True)
                ]
                advance(len(asked))
        return found


_CHUNK = 16
"""Questions between two reports of progress."""


def _questions(record: FactRecord) -> Iterator[_Question]:
    request = record.request
    yield _Question(request.id, _FACT, REWRITE, request.text, request.target_new)
    for probe in record.of_kind("paraphrase"):
        yield _Question(request.id, _PARAPHRASE, probe.kind, probe.prompt, request.target_new)
    for probe in record.of_kind("portability.sub_question"):
        for answer in probe.answers[:1]:
            if _words(answer):
                yield _Question(request.id, _PART, probe.kind, probe.prompt, answer)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def rouge_l_recall(reference: str, text: str) -> float:
    """The length of the longest common subsequence of words, divided by the number of words of ``reference``; 0 if
    ``reference`` has no word.

    >>> rouge_l_recall("the cat sat on the mat", "On the mat, the cat sat.")
    0.5
    """
    wanted, said = _words(reference), _words(text)
    longest = [0] * (len(said) + 1)  # for the words of reference so far, by the number of words of text
    for word in wanted:
        before = 0  # without this word, one word of text earlier
        for place, other in enumerate(said, start=1):
            above = longest[place]
            longest[place] = before + 1 if word == other else max(above, longest[place - 1])
            before = above
    return longest[-1] / len(wanted) if wanted else 0.0
