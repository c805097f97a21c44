"""Teacher forcing, chains and long answers against values computed by hand; and what a run says about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from editcore import EditRequest, EvaluationContext, FactRecord, MetricSpec, Observation, Plugins, Probe, RequestError
from editcore.evaluation import (
    COUNTERFACT,
    LONG_ANSWERS,
    MULTIHOP,
    TEACHER_FORCED,
    LongAnswersEvaluator,
    LongAnswersHParams,
    Measurement,
    MultihopEvaluator,
    MultihopHParams,
    TeacherForcedEvaluator,
    chains_of,
    measures_of,
    rouge_l_recall,
)
from editcore.models import LanguageModel
from editcore.runs.outcome import notes_of
from editcore.testing import tiny_model, tiny_requests
from hypothesis import given, strategies as st

Values = dict[tuple[str, str], float]
NOTHING = EvaluationContext()


def values(observations: Sequence[Observation]) -> Values:
    return {(observation.metric, observation.prompt): observation.value for observation in observations}


def fact(name: str, *probes: Probe, target: str = "Rome", **extra: Any) -> FactRecord:
    request = EditRequest(subject="Ada", prompt="{} was born in", target_new=target, id=name)
    return FactRecord(request=request, probes=probes, extra=extra)


# Teacher forcing


def by_hand(model: LanguageModel, prompt: str, answer: str) -> tuple[list[bool], float, list[int]]:
    """Which tokens are right, the geometric mean of their probabilities, and the likeliest tokens, one at a time."""
    ids = model.tokenizer(prompt)["input_ids"]
    right, logs, best = [], [], []
    for token in model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            distribution = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        best.append(int(distribution.argmax()))
        right.append(best[-1] == token)
        logs.append(math.log(float(distribution[token])))
        ids = [*ids, token]
    return right, math.exp(sum(logs) / len(logs)), best


PROBES = (
    Probe(kind="paraphrase", prompt="The home of Ada is", answers=("Rome and Berlin",)),
    Probe(kind="paraphrase.personas", prompt="My friend Ada comes from"),
    Probe(kind="portability.reasoning", prompt="The river of Ada is", answers=("Paris or Rome", "Rome")),
    Probe(kind="portability.other", prompt="The land of Ada is", answers=("French",)),
    Probe(kind="multihop", prompt="The king of Ada is", answers=("Bob Dylan",)),
    Probe(kind="multihop.single.edited", prompt="The hop of Ada is", answers=("Rome",)),
    Probe(kind="locality", prompt="Max Planck was born in", answers=("Paris and London", "London")),
    Probe(kind="locality", prompt="Max Planck was born in", answers=("Rome",)),  # again: asked once
    Probe(kind="locality.forgetfulness", prompt="Nobody knows"),  # no answer: not asked
    Probe(kind="neighborhood", prompt="Bob Dylan was born in", answers=("Vienna",)),
    Probe(kind="generation", prompt="Ada is"),
)
ANSWERS = {
    "rewrite": [("Ada was born in", "Rome")],
    "paraphrase": [("The home of Ada is", "Rome and Berlin"), ("My friend Ada comes from", "Rome")],
    "personas": [("My friend Ada comes from", "Rome")],
    "portability": [("The river of Ada is", "Paris or Rome"), ("The land of Ada is", "French")],
    "reasoning": [("The river of Ada is", "Paris or Rome")],
    "multihop": [("The king of Ada is", "Bob Dylan")],
}
"""What each family of metrics asks of a fact with these probes."""


@cache
def models() -> tuple[LanguageModel, LanguageModel]:
    """An unedited model, and one that says other things."""
    return tiny_model("llama", seed=0), tiny_model("llama", seed=1)


def test_teacher_forced_is_what_one_token_at_a_time_gives() -> None:
    model, _ = models()
    found = values(TeacherForcedEvaluator().evaluate(model, [fact("a", *PROBES)], NOTHING))
    expected: Values = {}
    for family, asked in ANSWERS.items():
        for prompt, answer in asked:
            right, probability, _ = by_hand(model, prompt, answer)
            expected[f"{family}_tokens", prompt] = sum(right) / len(right)
            expected[f"{family}_exact", prompt] = float(all(right))
            expected[f"{family}_probability", prompt] = probability
    for prompt, answer in (("Max Planck was born in", "Paris and London"), ("Bob Dylan was born in", "Vienna")):
        right, _, _ = by_hand(model, prompt, answer)
        expected["locality_tokens", prompt] = sum(right) / len(right)
    assert found == pytest.approx(expected, rel=1e-5)


def test_tokens_that_are_right_count_by_the_token() -> None:
    model, _ = models()
    for known in tiny_requests(80):
        best = by_hand(model, known.text, "Rome")[2][0]
        word = model.tokenizer.decode([best]).strip()
        if word and model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] == [best]:
            break
    request = known.model_copy(update={"target_new": f"{word} Paris"})
    right, _, _ = by_hand(model, request.text, request.target_new)
    assert right == [True, False]
    found = values(TeacherForcedEvaluator().evaluate(model, [FactRecord(request=request)], NOTHING))
    assert (found["rewrite_tokens", request.text], found["rewrite_exact", request.text]) == (0.5, 0)


def test_locality_is_compared_with_the_data_set_and_with_the_unedited_model() -> None:
    unedited, edited = models()
    record, evaluator = fact("a", *PROBES), TeacherForcedEvaluator()
    before = evaluator.evaluate(unedited, [record], NOTHING)
    assert "locality_same_tokens" not in {observation.metric for observation in before}
    after = values(evaluator.evaluate(edited, [record], EvaluationContext(unedited=before)))
    for prompt, answer in (("Max Planck was born in", "Paris and London"), ("Bob Dylan was born in", "Vienna")):
        first, second = (by_hand(model, prompt, answer) for model in (unedited, edited))
        same = [
            unedited_token == edited_token for unedited_token, edited_token in zip(first[2], second[2], strict=True)
        ]
        assert after["locality_same_tokens", prompt] == sum(same) / len(same)
        assert after["locality_tokens", prompt] == sum(second[0]) / len(second[0])
    again = values(evaluator.evaluate(unedited, [record], EvaluationContext(unedited=before)))
    assert {value for (metric, _), value in again.items() if metric == "locality_same_tokens"} == {1.0}


# Chains


class Speaker:
    """Says what it was told to, so that values can be counted by hand."""

    def __init__(self, said: Mapping[str, str], *, chat: bool = False) -> None:
        self.said, self.asked = said, list[str]()
        self.prompt_form = SimpleNamespace(space=not chat)

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        self.asked += prompts
        return [next((text for key, text in self.said.items() if key in prompt), " no") for prompt in prompts]


def chain(name: str, kind: str = "multihop") -> tuple[Probe, ...]:
    """Two questions about the same thing, an edited hop and one that is not."""
    return (
        Probe(kind=kind, prompt=f"{name}1?", answers=("Peru", "the Andes")),
        Probe(kind=kind, prompt=f"{name}2?", answers=("Peru", "the Andes")),
        Probe(kind="multihop.single.edited", prompt=f"{name} edited?", answers=("Eve",)),
        Probe(kind="multihop.single.unedited", prompt=f"{name} kept?", answers=("Lima",)),
    )


def ask(said: Mapping[str, str], records: Sequence[FactRecord], unedited: Any = None, **hparams: Any) -> Values:
    evaluator = MultihopEvaluator(MultihopHParams(**hparams))
    model: Any = Speaker(said)
    return values(evaluator.evaluate(model, records, EvaluationContext(unedited=unedited)))


def test_a_chain_is_answered_by_any_of_its_questions() -> None:
    records = [fact("a", *chain("a")), fact("b", *chain("b")), fact("c", *chain("c"))]
    before = MultihopEvaluator().evaluate(
        Speaker({"a kept?": " Lima.", "c kept?": " in Lima"}),  # type: ignore[arg-type]
        records,
        NOTHING,
    )
    said = {
        "a2?": " It is the Andes. Peru",
        "b1?": " Peru\n",
        "a edited?": " Eve",
        "c edited?": " Eve",
        "a kept?": " Lima",
        "b kept?": " Lima",
    }
    found = ask(said, records, before)
    assert found == {
        ("chains_answered", "a1?"): 1, ("chains_answered", "b1?"): 1, ("chains_answered", "c1?"): 0,
        # Only a and c were known to the unedited model, whatever the edited one knows.
        ("chains_answered_known", "a1?"): 1, ("chains_answered_known", "c1?"): 0,
        ("chains_known", "a1?"): 1, ("chains_known", "b1?"): 0, ("chains_known", "c1?"): 1,
        ("edited_hops_answered", "a edited?"): 1, ("edited_hops_answered", "b edited?"): 0,
        ("edited_hops_answered", "c edited?"): 1,
        ("unedited_hops_answered", "a kept?"): 1, ("unedited_hops_answered", "b kept?"): 1,
        ("unedited_hops_answered", "c kept?"): 0,
        ("all_hops_answered", "a1?"): 1, ("all_hops_answered", "b1?"): 0, ("all_hops_answered", "c1?"): 0,
    }  # fmt: skip
    assert {observation.value for observation in before if observation.metric == "chains_known"} == {0.0, 1.0}
    assert set(ask(said, records, before, facts=1)) == {key for key in found if key[1].startswith("a")}


def test_questions_of_different_hops_are_different_chains() -> None:
    record = fact("a", *chain("two", "multihop.2_hops")[:2], *chain("three", "multihop.3_hops")[:1])
    assert [len(found.questions) for found in chains_of(record)] == [2, 1]
    assert ask({"two2?": " Peru"}, [record]) == {("chains_answered", "two1?"): 1, ("chains_answered", "three1?"): 0}


def test_tests_of_a_data_set_may_need_all_answers_and_conditions() -> None:
    questions = [{"prompt": "one?", "answers": ["Peru"]}, {"prompt": "two?", "answers": ["Chile"]}]
    conditions = [{"prompt": "cond?", "answers": ["Lima"]}]
    tests = [
        {"kind": "portability.x", "needs": "all", "questions": questions, "conditions": []},
        {"kind": "locality.forgetfulness", "needs": "any", "questions": questions, "conditions": conditions},
    ]
    record = fact("a", chains=tests)
    assert ask({"one?": " Peru"}, [record]) == {
        ("chains_answered", "one?"): 0, ("unedited_hops_answered", "cond?"): 0, ("chains_known", "one?"): 0,
    }  # fmt: skip
    both = {"one?": " Peru", "two?": " Chile", "cond?": " Lima"}
    assert ask(both, [record]) == {
        ("chains_answered", "one?"): 1, ("kept_answered", "one?"): 1, ("unedited_hops_answered", "cond?"): 1,
        ("chains_known", "one?"): 1,
    }  # fmt: skip
    with pytest.raises(RequestError, match=r"The chains of a are malformed: 0\.questions: "):
        chains_of(fact("a", chains=[{"kind": "x", "questions": []}]))


def test_only_questions_are_put_into_the_template() -> None:
    record = fact("a", *chain("a")[:1], Probe(kind="multihop", prompt="The king of Ada is", answers=("Bob",)))
    evaluator = MultihopEvaluator(MultihopHParams(template="Ask {} Say"))
    for chat, question in ((False, "Ask a1? Say"), (True, "a1?")):
        model: Any = Speaker({}, chat=chat)
        evaluator.evaluate(model, [record], NOTHING)
        assert model.asked == [question, "The king of Ada is"]
    with pytest.raises(ValueError, match=r"it must have \{\} once"):
        MultihopHParams(template="no place")


# Long answers


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, by trying all."""
    for size in range(min(len(first), len(second)), 0, -1):
        if set(combinations(first, size)) & set(combinations(second, size)):
            return size
    return 0


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=7), st.lists(st.sampled_from("abcd"), max_size=7))
def test_rouge_l_recall_is_the_longest_common_subsequence(reference: list[str], text: list[str]) -> None:
    expected = longest_common(reference, text) / len(reference)
    assert rouge_l_recall(" ".join(reference), ", ".join(text).upper()) == pytest.approx(expected)


def test_rouge_l_recall_by_hand() -> None:
    assert rouge_l_recall("Ada wrote the first program.", "The first program: Ada's") == pytest.approx(3 / 5)
    assert rouge_l_recall("Ada", "") == rouge_l_recall("...", "Ada") == 0
    assert rouge_l_recall("Zürich ist schön", "ZÜRICH, schön!") == pytest.approx(2 / 3)


def test_long_answers_are_as_long_as_the_right_one() -> None:
    target = "Paris and Rome and Berlin"
    part = Probe(kind="portability.sub_question", prompt="The river of Ada is", answers=("Rome or Paris", "Rome"))
    records = [
        fact("short", part),
        fact("long", Probe(kind="paraphrase", prompt="The home of Ada is"), part, target=target),
        fact("next", target=target),
    ]
    model, _ = models()
    hparams = LongAnswersHParams(least_words=5, facts=1)
    found = LongAnswersEvaluator(hparams).evaluate(model, records, NOTHING)
    expected = [
        ("long_facts_recall", "rewrite", "Ada was born in", target),
        ("long_paraphrases_recall", "paraphrase", "The home of Ada is", target),
        ("parts_recall", "portability.sub_question", "The river of Ada is", "Rome or Paris"),
    ]
    assert [(observation.metric, observation.kind, observation.prompt) for observation in found] == [
        row[:3] for row in expected
    ]
    for observation, (_, _, prompt, answer) in zip(found, expected, strict=True):
        length = len(model.tokenizer(answer, add_special_tokens=False)["input_ids"])
        [text] = model.generate([prompt], max_new_tokens=length)
        assert observation.text == text
        assert observation.value == rouge_l_recall(answer, text)
    assert {observation.request_id for observation in found} == {"long"}


# What a run says


def told(
    found: Mapping[str, Sequence[Observation]],
    specs: Sequence[Any],
    records: Sequence[FactRecord] = (fact("a"),),
    *,
    batches: int = 0,
) -> tuple[str, ...]:
    ledger = SimpleNamespace(batches=[SimpleNamespace(notes=())] * batches, entries=())
    session: Any = SimpleNamespace(ledger=ledger, requests=(), notes=(), plugins=Plugins.load())
    return notes_of(session, Measurement(measures=measures_of(specs), observations=found), records, first=())


def test_a_run_says_why_a_metric_is_not_computed() -> None:
    seen = Observation(request_id="a", metric="rewrite_acc", value=1.0)
    assert told({"counterfact": [seen]}, [COUNTERFACT]) == (
        "counterfact could not compute ES (needs a true object); PS (needs paraphrases and a true object); NS (needs "
        "neighbourhood prompts and a true object); score (needs ES, PS and NS).",
    )


def test_a_run_says_why_an_evaluator_observed_nothing() -> None:
    assert told({"multihop": []}, [MULTIHOP]) == (
        "The evaluator 'multihop' observed nothing of the 1 fact; it needs multi-hop questions with an answer.",
    )


def test_a_run_tells_conventions_of_what_it_measured() -> None:
    seen = [Observation(request_id="a", metric=name, value=1.0) for name in ("rewrite_tokens", "locality_tokens")]
    notes = told({"teacher-forced": seen}, [TEACHER_FORCED])
    assert notes[-1].startswith("locality_tokens compares with the answers of the data set")
    assert not any("locality_tokens compares" in note for note in told({"teacher-forced": seen[:1]}, [TEACHER_FORCED]))


@pytest.mark.parametrize("spec", [COUNTERFACT, TEACHER_FORCED, MULTIHOP, LONG_ANSWERS])
def test_what_a_metric_needs_is_said_in_words(spec: Any) -> None:
    metrics: Sequence[MetricSpec] = spec.metrics
    assert all(metric.needs or metric.of or metric.name.startswith("rewrite_") for metric in metrics)


def test_a_run_tells_what_is_left_of_the_facts_that_were_written_first() -> None:
    records = [fact(str(number)) for number in range(10)]
    seen = [
        Observation(request_id=str(number), metric="rewrite_exact", value=float(number in (1, 3, 6, 7, 8)))
        for number in range(9)
    ]
    notes = told({"teacher-forced": seen}, [TEACHER_FORCED], records, batches=2)
    assert notes[-1] == (
        "Of the 5 facts that were written first, 2 hold at the end by rewrite_exact; of the 5 that were written last, "
        "3 of 4 that were asked."
    )
    for others, batches in ((records, 1), (records[:9], 2)):
        found = told({"teacher-forced": seen}, [TEACHER_FORCED], others, batches=batches)
        assert not any("written first" in note for note in found)
