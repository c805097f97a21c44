"""Teacher forcing: which tokens of an answer the model finds likeliest, given those before it.

As in the evaluation code of MEND, of ROME's zsRE and of EasyEdit: the answer is appended to its prompt, and at every
position the model's likeliest token is compared with the answer's. The model is given the beginning of the answer and
its length, so these values are higher than what it says by itself.

With o = o₁ … o_T the tokens of an answer after the prompt p:

* tokens: (1/T) Σ [argmax p(· | p, o₁ … o_{t−1}) = o_t];
* exact: whether all T are right;
* probability: exp((1/T) Σ log p(o_t | p, o₁ … o_{t−1})), the geometric mean per token.

Each is averaged over the questions of a fact, then over facts. A question with several right answers is scored with the
first. Departure from EasyEdit: prompts are not padded on the left, and prompt and answer are joined as in an edit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editcore.interfaces.metrics import REWRITE, ChecklistItem, EvaluationContext, MetricSpec, Observation
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord, Probe

if TYPE_CHECKING:
    from editcore.evaluation.scoring import TargetScore
    from editcore.models import LanguageModel

__all__ = ["TEACHER_FORCED", "TeacherForcedEvaluator"]

_SINGLE = "multihop.single"


@dataclass(frozen=True, slots=True)
class _Family:
    """Questions that are scored together."""

    name: str
    label: str
    about: str
    """The questions in words, for meanings, and for what is missing where there are none."""
    kinds: tuple[str, ...]
    """The kinds of its probes, each with its special ones; none for the edited prompt itself."""
    show: Literal["always", "report"] = "report"
    checklist: ChecklistItem | Literal[""] = ""

    def probes(self, record: FactRecord) -> Iterator[Probe]:
        """Its questions of a record that have an answer."""
        for kind in self.kinds:
            for probe in record.of_kind(kind):
                of_chain = probe.kind == _SINGLE or probe.kind.startswith(f"{_SINGLE}.")
                if _answer(record, probe) and (kind == _SINGLE) == of_chain:
                    yield probe


_FAMILIES = (
    _Family("rewrite", "Edited prompt", "edited prompts", (), "always", "teacher-forced success"),
    _Family("paraphrase", "Paraphrase", "paraphrases", ("paraphrase",), "always", "rephrase"),
    _Family("portability", "Portability", "portability questions with an answer", ("portability",), "always"),
    _Family("multihop", "Multi-hop", "multi-hop questions with an answer", ("multihop",)),
    _Family("generalization", "Generalisation", "yes/no or multiple-choice questions", ("generalization",)),
    _Family("personas", "Personas", "paraphrases by personas", ("paraphrase.personas",)),
    _Family("reasoning", "Reasoning", "reasoning questions (KnowEdit)", ("portability.reasoning",)),
    _Family("aliasing", "Subject aliasing", "questions by an alias (KnowEdit)", ("portability.subject_aliasing",)),
    _Family(
        "logical", "Logical generalisation", "logical questions (KnowEdit)", ("portability.logical_generalization",)
    ),
)
_LOCALITY = _Family("locality", "Locality", "questions about other things with an answer", ("neighborhood", "locality"))
_TRUE, _SAME = "locality_tokens", "locality_same_tokens"


def _metrics() -> Iterator[MetricSpec]:
    for family in _FAMILIES:
        edited = not family.kinds
        needs = "" if edited else family.about
        yield MetricSpec(
            name=f"{family.name}_tokens",
            label=f"{family.label}, tokens right",
            meaning="The share of the answer's tokens that are the likeliest ones, given those before; of "
            f"{family.about}.",
            objective=edited,
            checklist=family.checklist,
            show=family.show,
            needs=needs,
        )
        yield MetricSpec(
            name=f"{family.name}_exact",
            label=f"{family.label}, all tokens right",
            meaning=f"The share of {family.about} for which every token of the answer is the likeliest one.",
            retention=edited,
            checklist=family.checklist,
            show="always" if edited else "report",
            tally="are predicted token by token" if edited else "",
            needs=needs,
        )
        yield MetricSpec(
            name=f"{family.name}_probability",
            label=f"{family.label}, probability per token",
            meaning=f"The geometric mean of the probabilities of the answer's tokens; of {family.about}.",
            show="report",
            needs=needs,
        )
    yield MetricSpec(
        name=_TRUE,
        label="Locality, tokens right",
        meaning="The share of the tokens of the data set's answer to questions about other things that are the "
        "likeliest ones. An unedited model does not reach 100 %.",
        checklist="locality, correct",
        keep=True,
        needs=_LOCALITY.about,
        caution=f"{_TRUE} compares with the answers of the data set, of which the unedited model gives a part (see the "
        f"row before); {_SAME} compares with what the unedited model predicts, right or wrong. Papers call both "
        "locality.",
    )
    yield MetricSpec(
        name=_SAME,
        label="Locality, tokens unchanged",
        meaning="The share of the positions of the data set's answer to questions about other things at which the "
        "likeliest token is that of the unedited model.",
        checklist="locality, unchanged",
        keep=True,
        needs=_LOCALITY.about,
    )


TEACHER_FORCED = EvaluatorSpec(
    "teacher-forced",
    target="editcore.evaluation.teacher_forced:TeacherForcedEvaluator",
    summary="Which tokens of right answers are the likeliest, given those before: the accuracies of zsRE and KnowEdit.",
    compares=True,
    metrics=tuple(_metrics()),
)


@dataclass(frozen=True, slots=True)
class _Question:
    record: FactRecord
    family: _Family
    kind: str
    prompt: str
    answer: str
    join: str | None = None


class TeacherForcedEvaluator:
    """Scores the edited prompt of each fact, and every question of it that has an answer."""

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        """Observations in the order of the records; for each record, its edited prompt comes first."""
        from editcore.evaluation.scoring import score_targets  # imports torch

        questions = [question for record in records for question in _questions(record)]
        before = {
            (observation.request_id, observation.kind, observation.prompt): observation.text
            for observation in context.unedited or ()
            if observation.metric == _TRUE
        }
        scores = score_targets(
            model,
            [question.prompt for question in questions],
            [question.answer for question in questions],
            joins=[question.join for question in questions],
            progress=context.progress,
            description="Scoring answers",
        )
        found: list[Observation] = []
        for question, scored in zip(questions, scores, strict=True):
            if question.family is _LOCALITY:
                earlier = before.get((question.record.request.id, question.kind, question.prompt))
                found += _of_locality(
                    question, scored, model.tokenizer.convert_ids_to_tokens(scored.predicted), earlier
                )
            else:
                name = question.family.name
                found.append(_observed(question, f"{name}_tokens", scored.hits / scored.num_tokens))
                found.append(_observed(question, f"{name}_exact", float(scored.correct)))
                found.append(_observed(question, f"{name}_probability", math.exp(-scored.nll)))
        return found


def _questions(record: FactRecord) -> Iterator[_Question]:
    """A question that comes again is asked once, with its first answer."""
    request = record.request
    for family in (*_FAMILIES, _LOCALITY):
        if not family.kinds:
            yield _Question(record, family, REWRITE, request.text, request.target_new, request.join)
        distinct = {(probe.kind, probe.prompt): probe for probe in reversed(list(family.probes(record)))}
        for probe in reversed(distinct.values()):
            yield _Question(record, family, probe.kind, probe.prompt, _answer(record, probe))


def _answer(record: FactRecord, probe: Probe) -> str:
    """The answer that a probe is scored with; empty for none. A paraphrase without one has the edit's."""
    of_edit = record.request.target_new if probe.kind.partition(".")[0] == "paraphrase" else ""
    return next((answer.strip() for answer in probe.answers if answer.strip()), of_edit)


def _of_locality(
    question: _Question, scored: TargetScore, predicted: Sequence[str], earlier: str | None
) -> Iterator[Observation]:
    """Compared with the data set, and with the tokens that the unedited model predicted."""
    yield _observed(question, _TRUE, scored.hits / scored.num_tokens, json.dumps(predicted))
    if earlier is not None:
        same = [token == before for token, before in zip(predicted, json.loads(earlier), strict=True)]
        yield _observed(question, _SAME, sum(same) / len(same))


def _observed(question: _Question, metric: str, value: float, text: str | None = None) -> Observation:
    return Observation(
        request_id=question.record.request.id, metric=metric, value=value, kind=question.kind, prompt=question.prompt,
        text=text,
    )  # fmt: skip
