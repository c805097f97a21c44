"""Chains: does the model answer questions that need several facts, of which some were edited?

After MQuAKE (arXiv 2305.14795) and RippleEdits (arXiv 2307.12976). A *chain* is answered if the model's own answer to
any of its questions contains a right one, as whole words; or to all of them, where the data set says so. Its
*conditions* are the single hops that no edit changes, or RippleEdits' condition queries. A chain counts as *known* if
the unedited model answers all its conditions; otherwise a failure says nothing about the edit.

A record's ``extra["chains"]`` holds its chains: objects with ``kind``, ``needs`` (``any`` or ``all``), ``questions``
and ``conditions``, whose elements have ``prompt`` and ``answers``. Without that field, probes of the kind ``multihop``
that have the same special kind and the same answers are one chain, and its conditions are those of the kind
``multihop.single.unedited``.

Departures: answers are greedy, without demonstrations (``template`` may have some). MQuAKE takes eight of them.
RippleEdits averages over edits that succeeded only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from editcore.evaluation.generation import answer_of, is_said
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RequestError
from editcore.interfaces.metrics import EvaluationContext, MetricSpec, Observation
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord, Probe, first_problem
from editcore.settings.hparams import HParams

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["MULTIHOP", "Chain", "ChainQuestion", "MultihopEvaluator", "MultihopHParams", "chains_of"]

_ANSWERED, _ANSWERED_KNOWN, _KNOWN = "chains_answered", "chains_answered_known", "chains_known"
_EDITED, _UNEDITED, _ALL = "edited_hops_answered", "unedited_hops_answered", "all_hops_answered"
_KEPT = "kept_answered"

_LACK_CHAINS = "multi-hop questions with an answer"
_LACK_UNEDITED = "chains with hops that no edit changes"
_LACK_HOPS = "the single hops of chains"

MULTIHOP = EvaluatorSpec(
    "multihop",
    target="editcore.evaluation.multihop:MultihopEvaluator",
    hparams="editcore.evaluation.multihop:MultihopHParams",
    summary="Chains of facts: does the model answer questions that need edited facts, and the hops on the way?",
    compares=True,
    metrics=(
        MetricSpec(
            name=_ANSWERED,
            label="Chains answered",
            meaning="The share of chains of which a question is answered right, whether or not the model knows the "
            "hops that no edit changes.",
            objective=True,
            needs=_LACK_CHAINS,
        ),
        MetricSpec(
            name=_ANSWERED_KNOWN,
            label="Known chains answered",
            meaning="The same of the chains with hops that no edit changes, all of which the unedited model answers.",
            needs="chains with unedited hops that the unedited model answers",
        ),
        MetricSpec(
            name=_EDITED,
            label="Edited hops answered",
            meaning="The share of the edited single hops, asked alone, that are answered with the new object.",
            needs=_LACK_HOPS,
        ),
        MetricSpec(
            name=_UNEDITED,
            label="Unedited hops answered",
            meaning="The share of the single hops that no edit changes, asked alone, that are answered right.",
            keep=True,
            needs=_LACK_UNEDITED,
        ),
        MetricSpec(
            name=_KEPT,
            label="Kept facts answered",
            meaning="The share of the chains about facts that must stay (RippleEdits' relation specificity and "
            "forgetfulness) that are answered right, of those whose conditions the unedited model answers.",
            keep=True,
            needs="chains about facts that must stay, with conditions that the unedited model answers",
        ),
        MetricSpec(
            name=_ALL,
            label="Chains with all hops answered",
            meaning="The share of chains of which every single hop, edited or not, is answered right when asked alone.",
            show="report",
            needs=_LACK_HOPS,
        ),
        MetricSpec(
            name=_KNOWN,
            label="Chains known",
            meaning="The share of the chains with conditions of which the unedited model answers all of them.",
            show="report",
            needs=_LACK_UNEDITED,
        ),
    ),
)


def _has_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("it must have {} once, where the question goes")
    return template


class MultihopHParams(HParams):
    """How the questions are asked, and how long the answers may be."""

    template: Annotated[str, AfterValidator(_has_place)] = "Q: {}\nA:"
    """The text around a question (one that ends with ``?``), with ``{}`` in its place; for few-shot prompts, too. Other
    prompts are continued as they are, and so are all in a chat."""
    facts: Annotated[int, Field(ge=1)] | None = None
    """Facts whose chains are asked, from the front; none for all."""
    answer_tokens: Annotated[int, Field(ge=1)] = 16
    """Longest answer, in tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = (".", "\n")
    """Texts at which an answer ends. They are ignored inside a right answer and before the first word."""


@documented
class ChainQuestion(BaseModel):
    """A question with its right answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompt: Annotated[str, Field(min_length=1)]
    """The question in full."""
    answers: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """Every right answer."""


@documented
class Chain(BaseModel):
    """Questions that need several facts, and the facts on which they rest."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    """The kind of its questions, as of a probe."""
    needs: Literal["any", "all"] = "any"
    """Whether one right answer is enough."""
    questions: Annotated[tuple[ChainQuestion, ...], Field(min_length=1)]
    """The questions that need several facts."""
    conditions: tuple[ChainQuestion, ...] = ()
    """Facts that no edit changes."""
    edited: tuple[ChainQuestion, ...] = ()
    """The edited facts of the chain, asked alone."""

    @property
    def stays(self) -> bool:
        """Whether it is about facts that an edit must not change."""
        return self.kind.partition(".")[0] == "locality"


_CHAINS = TypeAdapter(tuple[Chain, ...])


def chains_of(record: FactRecord) -> tuple[Chain, ...]:
    """The chains of a record.

    Raises:
        RequestError: ``extra["chains"]`` is not made of chains.
    """
    if "chains" in record.extra:
        try:
            return _CHAINS.validate_python(record.extra["chains"])
        except ValidationError as error:
            raise RequestError(f"The chains of {record.request.id} are malformed: {first_problem(error)}.") from error
    groups: dict[tuple[str, tuple[str, ...]], list[ChainQuestion]] = {}
    hops: dict[str, list[ChainQuestion]] = {"multihop.single.edited": [], "multihop.single.unedited": []}
    for probe in record.of_kind("multihop"):
        if (question := _question(probe)) is None:
            continue
        if probe.kind in hops:
            hops[probe.kind].append(question)
        elif not probe.kind.startswith("multihop.single"):
            groups.setdefault((probe.kind, question.answers), []).append(question)
    edited, conditions = (tuple(found) for found in hops.values())
    return tuple(
        Chain(kind=kind, questions=tuple(questions), conditions=conditions, edited=edited)
        for (kind, _), questions in groups.items()
    )


def _question(probe: Probe) -> ChainQuestion | None:
    answers = tuple(filter(None, map(str.strip, probe.answers)))
    return ChainQuestion(prompt=probe.prompt, answers=answers) if answers else None


class MultihopEvaluator:
    """Lets the model answer the questions of every chain, and its single hops."""

    def __init__(self, hparams: MultihopHParams | None = None) -> None:
        self.hparams = hparams or MultihopHParams()

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        """Observations chain by chain, in the order of the records. An observation of a chain has its first question as
        prompt, and all answers as text, with ``|`` between them."""
        chains = [(record.request.id, chain) for record in records for chain in chains_of(record)]
        with_chains = list(dict.fromkeys(fact for fact, _ in chains))[: self.hparams.facts]
        chains = [(fact, chain) for fact, chain in chains if fact in set(with_chains)]
        said = self._answers(model, [chain for _, chain in chains], context)
        known_before = {
            (observation.request_id, observation.kind, observation.prompt): bool(observation.value)
            for observation in context.unedited or ()
            if observation.metric == _KNOWN
        }
        found: list[Observation] = []
        for fact, chain in chains:
            judged = _Judged(chain, said, self.hparams.stop)
            key = (fact, chain.kind, chain.questions[0].prompt)
            known = known_before.get(key, False) if context.unedited is not None else judged.conditions_hold
            found += (
                Observation(request_id=fact, metric=metric, value=float(value), kind=kind, prompt=prompt, text=text)
                for metric, value, kind, prompt, text in judged.values(known=known)
            )
        return found

    def _answers(self, model: LanguageModel, chains: Sequence[Chain], context: EvaluationContext) -> Mapping[str, str]:
        """What the model says to each question, by its prompt. Each is asked once."""
        prompts = list(dict.fromkeys(question.prompt for chain in chains for question in _all_questions(chain)))
        wrapped = [self._wrapped(model, prompt) for prompt in prompts]
        texts: list[str] = []
        with context.progress.task("Answering chains", len(prompts)) as advance:
            for first in range(0, len(prompts), _CHUNK):
                part = wrapped[first : first + _CHUNK]
                texts += model.generate(part, max_new_tokens=self.hparams.answer_tokens)
                advance(len(part))
        return dict(zip(prompts, texts, strict=True))

    def _wrapped(self, model: LanguageModel, prompt: str) -> str:
        is_question = prompt.rstrip().endswith("?") and model.prompt_form.space  # in a chat, the template is around it
        return self.hparams.template.replace("{}", prompt) if is_question else prompt


_CHUNK = 64
"""Prompts between two reports of progress."""


def _all_questions(chain: Chain) -> Iterator[ChainQuestion]:
    yield from (*chain.questions, *chain.conditions, *chain.edited)


class _Judged:
    """What the model's answers make of one chain."""

    def __init__(self, chain: Chain, said: Mapping[str, str], stop: Sequence[str]) -> None:
        self.chain = chain
        self._answers = {
            question: answer_of(said[question.prompt], stop, question.answers) for question in _all_questions(chain)
        }

    def is_right(self, question: ChainQuestion) -> bool:
        """Whether the answer contains a right one."""
        return is_said(question.answers, self._answers[question])

    @property
    def conditions_hold(self) -> bool:
        """Whether every condition is answered right."""
        return all(map(self.is_right, self.chain.conditions))

    def values(self, *, known: bool) -> Iterator[tuple[str, bool, str, str, str]]:
        """Metric, value, kind, prompt and text of each observation.

        Args:
            known: whether the unedited model answers all conditions.
        """
        chain = self.chain
        right = (any if chain.needs == "any" else all)(map(self.is_right, chain.questions))
        of_chain = (
            chain.kind,
            chain.questions[0].prompt,
            " | ".join(self._answers[question] for question in chain.questions),
        )
        if chain.stays:
            if known:
                yield (_KEPT, right, *of_chain)
        else:
            yield (_ANSWERED, right, *of_chain)
            if known and chain.conditions:
                yield (_ANSWERED_KNOWN, right, *of_chain)
        yield from self._hops(of_chain)
        if chain.conditions:
            yield (_KNOWN, known, *of_chain)

    def _hops(self, of_chain: tuple[str, str, str]) -> Iterator[tuple[str, bool, str, str, str]]:
        for metric, kind, hops in (
            (_EDITED, "multihop.single.edited", self.chain.edited),
            (_UNEDITED, "multihop.single.unedited", self.chain.conditions),
        ):
            for hop in hops:
                yield (metric, self.is_right(hop), kind, hop.prompt, self._answers[hop])
        if self.chain.edited:
            hops = (*self.chain.edited, *self.chain.conditions)
            yield (_ALL, all(map(self.is_right, hops)), *of_chain)
