"""Free generation: greedy answers of the edited model, without the length of the target.

Teacher forcing gives the model the beginning of the object and its length; a user does not. As in "The Mirage of Model
Editing" (arXiv 2502.11177), an answer ends at a full stop, a line break or an end token, and is compared after
normalisation (lower case, no punctuation, no articles, single spaces). There are two departures from that paper. The
object may stand anywhere in the answer (``facts_said``); only ``facts_said_first`` requires it at the beginning. And
answers are cut after ``answer_tokens`` tokens, because a small model does not stop by itself.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from editcore.interfaces.joining import separates_words
from editcore.interfaces.metrics import REWRITE, EvaluationContext, MetricSpec, Observation
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord, Probe
from editcore.settings.hparams import HParams

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = [
    "GENERATION",
    "GenerationEvaluator",
    "GenerationHParams",
    "answer_of",
    "distinct_bigrams",
    "is_said",
    "normalized",
]

GENERATION = EvaluatorSpec(
    "generation",
    target="editcore.evaluation.generation:GenerationEvaluator",
    hparams="editcore.evaluation.generation:GenerationHParams",
    summary="Free generation: does the model say the new object, and elsewhere what it said before?",
    compares=True,
    metrics=(
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
            checklist="rephrase",
            meaning="The share of paraphrases to which the model's own answer contains the new object.",
            needs="paraphrases",
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
            checklist="locality, unchanged",
            meaning="The share of questions about other things to which the answer is exactly that of the unedited "
            "model.",
            keep=True,
            needs="questions about other things",
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
    ),
)


class GenerationHParams(HParams):
    """Which questions the model is asked, and how long its answers may be."""

    sample: Annotated[int, Field(ge=1)] | None = 40
    """Facts whose edited prompt is asked, the same ones before and after the edits; none for all."""
    further: Annotated[int, Field(ge=0)] | None = 8
    """Facts of the sample whose other questions are asked too; none for all."""
    paraphrases: Annotated[int, Field(ge=0)] = 1
    """Paraphrases per such fact, chosen evenly from its list."""
    consequences: Annotated[int, Field(ge=0)] = 2
    """Questions per such fact that follow from it (portability, multi-hop)."""
    elsewhere: Annotated[int, Field(ge=0)] = 1
    """Questions per such fact about other things (neighbourhood, locality)."""
    answer_tokens: Annotated[int, Field(ge=1)] = 8
    """Longest answer, in tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = (".", "\n")
    """Texts at which an answer ends. They are ignored inside the wanted object and before the first word."""
    continuations: Annotated[int, Field(ge=0)] = 1
    """Facts of the sample with a long continuation, in which distinct word pairs are counted."""
    continuation_tokens: Annotated[int, Field(ge=2)] = 60
    """Length of a long continuation, in tokens."""


@dataclass(frozen=True, slots=True)
class _Question:
    record: FactRecord
    kind: str
    prompt: str
    answers: tuple[str, ...]
    metric: str
    """The metric to which a right answer counts; ``unchanged`` if the answer should be as before the edits."""
    metric_at_once: str = ""
    """The metric to which an answer counts if it begins with a right one; empty for none."""


class GenerationEvaluator:
    """Lets the model answer the edited prompts, their paraphrases, questions that follow from them, and unrelated
    questions."""

    def __init__(self, hparams: GenerationHParams | None = None) -> None:
        self.hparams = hparams or GenerationHParams()

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        """For each fact of the sample, the edited prompt comes first. The long continuations come last."""
        settings = self.hparams
        seed = context.seed
        asked = _sample(records, settings.sample, _observed_of(context, "facts_said"), seed=seed)
        further = {
            record.request.id for record in _sample(asked, settings.further, _observed_of(context, _SEEN), seed=seed)
        }
        questions = [
            question for record in asked for question in self._questions(record, further=record.request.id in further)
        ]
        before = {
            (observation.request_id, observation.prompt): observation.text
            for observation in context.unedited or ()
            if observation.metric in _ANSWERS
        }
        continued = _sample(asked, settings.continuations, _observed_of(context, _DISTINCT), seed=seed)
        openings = [(record, _opening(record)) for record in continued]
        said, long = self._generated(model, questions, [text for _, text in openings], context)
        found: list[Observation] = []
        for question in questions:
            answer = answer_of(said[question.prompt], settings.stop, question.answers)
            earlier = before.get((question.record.request.id, question.prompt))
            found += _judged(question, answer, earlier)
        for record, prompt in openings:
            value = distinct_bigrams(long[prompt])
            if value is not None:
                found.append(_observed(record, _DISTINCT, value, "generation", prompt, long[prompt]))
        return found

    def _generated(
        self, model: LanguageModel, questions: Sequence[_Question], openings: Sequence[str], context: EvaluationContext
    ) -> tuple[dict[str, str], dict[str, str]]:
        """The answers to the questions and the long continuations, both by prompt. Each prompt is run once."""
        settings = self.hparams
        wanted: dict[str, set[str]] = {}
        for question in questions:
            wanted.setdefault(question.prompt, set()).update(question.answers)
        prompts = [*wanted, *dict.fromkeys(openings)]
        limits = [settings.answer_tokens] * len(wanted)
        limits += [settings.continuation_tokens] * (len(prompts) - len(wanted))
        stops = set("".join(settings.stop).casefold())
        plain = [stops.isdisjoint("".join(answers).casefold()) for answers in wanted.values()]
        texts: list[str] = []
        with context.progress.task("Answering", len(prompts)) as advance:
            for first in range(0, len(prompts), _CHUNK):
                part = slice(first, first + _CHUNK)

                def enough(index: int, text: str, first: int = first) -> bool:
                    # If a right answer may contain a stop, the whole text is needed to find the end.
                    number = first + index
                    return number < len(plain) and plain[number] and answer_of(text, settings.stop) != text

                texts += model.generate(prompts[part], max_new_tokens=limits[part], enough=enough)
                advance(len(prompts[part]))
        asked = len(wanted)
        return dict(zip(prompts[:asked], texts[:asked], strict=True)), dict(
            zip(prompts[asked:], texts[asked:], strict=True)
        )

    def _questions(self, record: FactRecord, *, further: bool) -> Iterator[_Question]:
        request, settings = record.request, self.hparams
        wanted = (request.target_new,)
        yield _Question(record, REWRITE, request.text, wanted, "facts_said", "facts_said_first")
        if not further:
            return
        for probe in _spread(record.of_kind("paraphrase"), settings.paraphrases):
            answers = probe.answers or wanted
            yield _Question(record, probe.kind, probe.prompt, answers, "paraphrases_said", "paraphrases_said_first")
        following = [*record.of_kind("portability"), *record.of_kind("multihop")]
        for probe in _spread([probe for probe in following if probe.answers], settings.consequences):
            yield _Question(record, probe.kind, probe.prompt, probe.answers, "consequences_said")
        for probe in _spread([*record.of_kind("neighborhood"), *record.of_kind("locality")], settings.elsewhere):
            yield _Question(record, probe.kind, probe.prompt, probe.answers, _UNCHANGED)


_UNCHANGED = "unchanged"
_SEEN = "elsewhere_answered"
_DISTINCT = "distinct_bigrams"
_ANSWERS = {"facts_said", "paraphrases_said", "consequences_said", _SEEN}
"""Metrics whose observations have the text of an answer."""


def _judged(question: _Question, answer: str, earlier: str | None) -> Iterator[Observation]:
    asked = (question.kind, question.prompt, answer)
    if question.metric == _UNCHANGED:
        yield _observed(question.record, _SEEN, float(bool(answer.strip())), *asked)
        if earlier is not None:
            yield _observed(question.record, _UNCHANGED, float(answer.strip() == earlier.strip()), *asked)
        return
    yield _observed(question.record, question.metric, float(is_said(question.answers, answer)), *asked)
    if question.metric_at_once:
        at_once = float(is_said(question.answers, answer, first=True))
        yield _observed(question.record, question.metric_at_once, at_once, *asked)


def _observed(record: FactRecord, metric: str, value: float, kind: str, prompt: str, text: str) -> Observation:
    return Observation(request_id=record.request.id, metric=metric, value=value, kind=kind, prompt=prompt, text=text)


_CHUNK = 64
"""Prompts between two reports of progress."""


def _observed_of(context: EvaluationContext, metric: str) -> set[str]:
    """The facts for which the unedited model has an observation of a metric."""
    return {observation.request_id for observation in context.unedited or () if observation.metric == metric}


def _sample(records: Sequence[FactRecord], count: int | None, known: Collection[str], *, seed: int) -> list[FactRecord]:
    """``count`` records in their order, chosen by a hash of their ids; those that can be compared first."""
    if count is None or count >= len(records):
        return list(records)

    def place(record: FactRecord) -> tuple[bool, str]:
        name = record.request.id
        return name not in known, hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()

    chosen = {record.request.id for record in sorted(records, key=place)[:count]}
    return [record for record in records if record.request.id in chosen]


def _spread(probes: Sequence[Probe], count: int) -> list[Probe]:
    """``count`` of the probes, spread evenly over their list."""
    if count >= len(probes):
        return list(probes)
    return [probes[(2 * number + 1) * len(probes) // (2 * count)] for number in range(count)]


def _opening(record: FactRecord) -> str:
    """The prompt of the long continuation: the data set's own opening, or else the edited prompt."""
    return next((probe.prompt for probe in record.of_kind("generation")), record.request.text)


# Texts


def answer_of(text: str, stop: Sequence[str], answers: Sequence[str] = ()) -> str:
    """``text`` up to the first stop that is not inside one of ``answers``.

    >>> answer_of(" born in St. Louis. He", [".", "\\n"], ["St. Louis"])
    ' born in St. Louis'
    """
    inside = [
        (match.start(), match.end())
        for answer in answers
        for match in re.finditer(re.escape(answer), text, re.IGNORECASE)
        if answer
    ]
    ends = [
        match.start()
        for mark in stop
        for match in re.finditer(re.escape(mark), text)
        if re.search(r"\w", text[: match.start()])
        and not any(first < match.end() and match.start() < last for first, last in inside)
    ]
    return text[: min(ends, default=len(text))]


def normalized(text: str) -> str:
    """A text in the form in which answers are compared: lower case, no punctuation, no articles, single spaces.

    >>> normalized("The  U.S.A.")
    'usa'
    """
    letters = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(letter for letter in letters if letter not in _PUNCTUATION)
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


_PUNCTUATION = frozenset(string.punctuation + "‘’“”«»–—…¡¿")


def is_said(answers: Iterable[str], text: str, *, first: bool = False) -> bool:
    """Whether ``text`` contains one of ``answers`` as whole words; with ``first``, whether it begins with one. Both are
    normalised.

    In scripts without spaces a word need not end where the answer does.

    >>> is_said(["France"], " the south of France"), is_said(["France"], " the south of France", first=True)
    (True, False)
    >>> is_said(["法国"], "法国的南部"), is_said(["France"], "Frances")
    (True, False)
    """
    said = normalized(text)
    for answer in filter(None, map(normalized, answers)):
        starts = [0] if first else [match.start() for match in re.finditer(f"(?={re.escape(answer)})", said)]
        if any(said.startswith(answer, start) and _is_whole(said, start, start + len(answer)) for start in starts):
            return True
    return False


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether words may begin at ``start`` and end at ``end``."""

    def between_words(place: int) -> bool:
        around = text[place - 1 : place + 1]
        return place in (0, len(text)) or " " in around or not all(map(separates_words, around))

    return between_words(start) and between_words(end)


def distinct_bigrams(text: str) -> float | None:
    """Number of different pairs of neighbouring words over the number of all pairs; ``None`` for fewer than two words.

    >>> distinct_bigrams("so it is and so it is")
    0.6666666666666666
    """
    words = text.lower().split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else None
