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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from editcore.evaluation.contexts import (
    Context,
    Way,
    after_thought,
    as_question,
    in_form,
    possible_forms,
    prefix_texts,
)
from editcore.evaluation.generation_metrics import BARE, JUDGED
from editcore.evaluation.generation_settings import GenerationHParams
from editcore.evaluation.judging import Judge, verdict_of, without_verdict
from editcore.interfaces.joining import separates_words
from editcore.interfaces.metrics import REWRITE, EvaluationContext, Observation
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord, Probe

if TYPE_CHECKING:
    from editcore.models import LanguageModel
    from editcore.models.prompt_form import PromptForm

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
    hparams="editcore.evaluation.generation_settings:GenerationHParams",
    summary="Free generation: does the model say the new object, and elsewhere what it said before?",
    compares=True,
    metrics=BARE,
    metrics_of="editcore.evaluation.generation_settings:metrics_of",
)


_BARE = Way()


@dataclass(frozen=True, slots=True)
class _Question:
    """A question of a record, put in one way."""

    record: FactRecord
    kind: str
    prompt: str
    answers: tuple[str, ...]
    metric: str
    """The metric to which a right answer counts; ``unchanged`` if the answer should be as before the edits."""
    metric_at_once: str = ""
    """The metric to which an answer counts if it begins with a right one; empty for none."""
    way: Way = _BARE
    asked: str = ""
    """What the judge is told of the prompt: without prefix and instruction."""

    def put(self, way: Way, instruction: str) -> _Question | None:
        """The same question in that way, without its prefix; ``None`` if it cannot be put so."""
        text: str | None = self.prompt
        if way.context != "prompt":
            text = as_question(self.record, self.prompt)
        if text is None and way.context in ("chat", "thinking"):
            text = self.prompt
        if text is None:
            return None
        whole = instruction.replace("{question}", text) if way.context == "instruction" else text
        return replace(self, way=way, prompt=whole, asked=text)


class GenerationEvaluator:
    """Lets the model answer the edited prompts, their paraphrases, questions that follow from them, and unrelated
    questions."""

    def __init__(self, hparams: GenerationHParams | None = None) -> None:
        self.hparams = hparams or GenerationHParams()
        self._judge = None if self.hparams.judging is None else Judge(self.hparams.judging)

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        """For each way to ask and each fact of the sample, the edited prompt comes first. Then come the long
        continuations, then the judge's verdicts.

        Raises:
            ModelError: the model can be asked in none of the contexts.
        """
        settings, seed = self.hparams, context.seed
        forms = possible_forms(model, settings.contexts)
        ways = [way for way in settings.ways if way.context in forms]
        asked = _sample(records, settings.sample, _observed_of(context, "facts_said", ways), seed=seed)
        further = {
            record.request.id
            for record in _sample(asked, settings.further, _observed_of(context, _SEEN, ways), seed=seed)
        }
        plain = [
            question for record in asked for question in self._questions(record, further=record.request.id in further)
        ]
        questions = [question for way in ways for question in self._put(model, plain, way, context)]
        before = {
            (observation.metric, observation.request_id, observation.prompt): observation.text
            for observation in context.unedited or ()
            if observation.metric.startswith(_SEEN)
        }
        bare = _BARE in ways
        continued = _sample(asked, settings.continuations, _observed_of(context, _DISTINCT), seed=seed) if bare else []
        openings = [(record, _opening(record)) for record in continued]
        said, long = self._generated(model, questions, forms, [text for _, text in openings], context)
        found: list[Observation] = []
        answers: list[tuple[_Question, str]] = []
        for question in questions:
            text = said[forms[question.way.context], question.prompt, settings.limit(question.way)]
            answer = answer_of(_spoken(text, question.way, forms), settings.stop, question.answers)
            answers.append((question, answer))
            seen = _SEEN + question.way.suffix
            found += _compared(question, answer, before.get((seen, question.record.request.id, question.prompt)))
        for record, prompt in openings:
            value = distinct_bigrams(long[prompt])
            if value is not None:
                found.append(_observed(record, _DISTINCT, value, "generation", prompt, long[prompt]))
        return found if self._judge is None else [*found, *_judged(self._judge, answers, context)]

    def _put(
        self, model: LanguageModel, questions: Sequence[_Question], way: Way, context: EvaluationContext
    ) -> list[_Question]:
        """The questions in one way, without those that cannot be put so."""
        put = [found for question in questions if (found := question.put(way, self.hparams.instruction)) is not None]
        if not way.prefix:
            return put
        known = _known_prefixes(put, way, context)
        records = {question.record.request.id: question.record for question in put}
        missing = [record for name, record in records.items() if name not in known]
        prefixes = known | prefix_texts(model, missing, way.prefix, seed=context.seed)
        return [replace(question, prompt=prefixes[question.record.request.id] + question.prompt) for question in put]

    def _generated(
        self,
        model: LanguageModel,
        questions: Sequence[_Question],
        forms: Mapping[Context, PromptForm],
        openings: Sequence[str],
        context: EvaluationContext,
    ) -> tuple[dict[tuple[PromptForm, str, int], str], dict[str, str]]:
        """The answers to the questions, by form, prompt and most tokens, and the long continuations, by prompt. What is
        equal in all three is run once."""
        settings = self.hparams
        stops = set("".join(settings.stop).casefold())
        wanted: dict[PromptForm, dict[tuple[str, int], _Wanted]] = {form: {} for form in forms.values()}
        for question in questions:
            key = (question.prompt, settings.limit(question.way))
            asked = wanted[forms[question.way.context]].setdefault(key, _Wanted(way=question.way))
            asked.plain = asked.plain and stops.isdisjoint("".join(question.answers).casefold())
        continued = list(dict.fromkeys(openings))
        said: dict[tuple[PromptForm, str, int], str] = {}
        long: dict[str, str] = {}
        with context.progress.task("Answering", sum(map(len, wanted.values())) + len(continued)) as advance:
            for form, asked_in_form in wanted.items():
                own = continued if form == model.prompt_form else []
                prompts = [*(prompt for prompt, _ in asked_in_form), *own]
                limits = [*(limit for _, limit in asked_in_form), *[settings.continuation_tokens] * len(own)]
                texts: list[str] = []
                for first in range(0, len(prompts), _CHUNK):
                    part = slice(first, first + _CHUNK)
                    enough = self._ends([*asked_in_form.values()][part], forms)
                    with in_form(model, form):
                        texts += model.generate(prompts[part], max_new_tokens=limits[part], enough=enough)
                    advance(len(prompts[part]))
                count = len(asked_in_form)
                said |= {(form, *key): text for key, text in zip(asked_in_form, texts[:count], strict=True)}
                long |= dict(zip(own, texts[count:], strict=True))
        return said, long

    def _ends(self, asked: Sequence[_Wanted], forms: Mapping[Context, PromptForm]) -> Callable[[int, str], bool]:
        """Whether a text has an answer that has ended. If a right answer may contain a stop, the whole text is needed
        to find its end."""

        def enough(index: int, text: str) -> bool:
            if index >= len(asked) or not asked[index].plain:
                return False
            answer = _spoken(text, asked[index].way, forms)
            return answer_of(answer, self.hparams.stop) != answer

        return enough

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


@dataclass(slots=True)
class _Wanted:
    """What is wanted of the continuation of a prompt."""

    way: Way
    plain: bool = True
    """Whether no right answer to it may contain a stop."""


_UNCHANGED = "unchanged"
_CORRECT = "elsewhere_correct"
_SEEN = "elsewhere_answered"
_DISTINCT = "distinct_bigrams"


def _spoken(text: str, way: Way, forms: Mapping[Context, PromptForm]) -> str:
    """What a text says, without the thought in front."""
    return after_thought(text, forms[way.context]) if way.context == "thinking" else text


def _compared(question: _Question, answer: str, earlier: str | None) -> Iterator[Observation]:
    """An answer, compared with the right ones and with the earlier one."""
    asked = (question.kind, question.prompt, answer)
    suffix = question.way.suffix
    if question.metric == _UNCHANGED:
        yield _observed(question.record, _SEEN + suffix, float(bool(answer.strip())), *asked)
        if earlier is not None:
            yield _observed(question.record, _UNCHANGED + suffix, float(answer.strip() == earlier.strip()), *asked)
        if question.answers:
            yield _observed(question.record, _CORRECT + suffix, float(is_said(question.answers, answer)), *asked)
        return
    yield _observed(question.record, question.metric + suffix, float(is_said(question.answers, answer)), *asked)
    if question.metric_at_once:
        at_once = float(is_said(question.answers, answer, first=True))
        yield _observed(question.record, question.metric_at_once + suffix, at_once, *asked)


def _judged(
    judge: Judge, answers: Sequence[tuple[_Question, str]], context: EvaluationContext
) -> Iterator[Observation]:
    """The verdicts on answers, with the judge's replies as text. An empty answer is wrong without asking."""
    asked = [
        (question, "" if not answer.strip() else judge.prompt(
            question=question.asked, right=question.answers, answer=answer
        ))
        for question, answer in answers
        if question.answers
    ]  # fmt: skip
    verdicts = judge.verdicts(
        [prompt for _, prompt in asked if prompt], folder=context.folder, progress=context.progress
    )
    if sentence := without_verdict(verdicts, judge.settings.name):
        context.tell(sentence)
    if verdicts.failure:
        return
    names = {said: name for name, said in JUDGED.items()}
    for question, prompt in asked:
        reply = verdicts.replies[prompt] if prompt else ""
        verdict = verdict_of(reply) if prompt else False
        if verdict is not None:
            metric = names[_CORRECT if question.metric == _UNCHANGED else question.metric] + question.way.suffix
            yield _observed(question.record, metric, float(verdict), question.kind, question.prompt, reply)


def _known_prefixes(questions: Sequence[_Question], way: Way, context: EvaluationContext) -> dict[str, str]:
    """By request id, the text that stood before the questions to the unedited model."""
    bodies: dict[tuple[str, str], list[str]] = {}
    for question in questions:
        metric = (_SEEN if question.metric == _UNCHANGED else question.metric) + way.suffix
        bodies.setdefault((metric, question.record.request.id), []).append(question.prompt)
    found: dict[str, str] = {}
    for observation in context.unedited or ():
        for body in bodies.get((observation.metric, observation.request_id), ()):
            if observation.prompt.endswith(body):
                # The shortest: a question may be the end of another one.
                found[observation.request_id] = min(
                    observation.prompt.removesuffix(body),
                    found.get(observation.request_id, observation.prompt),
                    key=len,
                )
    return found


def _observed(record: FactRecord, metric: str, value: float, kind: str, prompt: str, text: str) -> Observation:
    return Observation(request_id=record.request.id, metric=metric, value=value, kind=kind, prompt=prompt, text=text)


_CHUNK = 64
"""Prompts between two reports of progress."""


def _observed_of(context: EvaluationContext, metric: str, ways: Iterable[Way] = (_BARE,)) -> set[str]:
    """The facts for which the unedited model has an observation of a metric, in one of the ways."""
    names = {metric + way.suffix for way in ways}
    return {observation.request_id for observation in context.unedited or () if observation.metric in names}


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
