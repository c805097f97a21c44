"""What the evaluators say of real facts, against one prompt at a time through transformers alone.

``EDITCORE_ORACLE_FACTS`` says how many of CounterFact's development half are asked; a few, left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import FactRecord, LanguageModel, Plugins
from editcore.datasets import Selection, load_records
from editcore.evaluation import (
    COUNTERFACT,
    GENERATION,
    MULTIHOP,
    TEACHER_FORCED,
    CounterFactEvaluator,
    GenerationEvaluator,
    GenerationHParams,
    MultihopEvaluator,
    MultihopHParams,
    TeacherForcedEvaluator,
)
from editcore.evaluation.generation import answer_of, is_said
from editcore.evaluation.measuring import measure
from editcore.models import local_path

DATA = Path(__file__).parents[2] / "shared" / "data" / "counterfact_dev.jsonl.gz"
FACTS = int(os.environ.get("EDITCORE_ORACLE_FACTS", "2"))
CATALOGUE = ("smollm2-135m", "gemma3-270m")

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="../shared/data/counterfact_dev.jsonl.gz is not here")


@pytest.fixture(scope="module")
def records() -> list[FactRecord]:
    return load_records(DATA, plugins=Plugins.load())[:FACTS]


@pytest.fixture(scope="module", params=CATALOGUE)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    if local_path(request.param) is None:
        pytest.skip(f"{request.param} is not on this machine: editctl models pull {request.param}")
    return LanguageModel.load(request.param)


@torch.no_grad()
def nll(model: LanguageModel, prompt: str, target: str) -> float:
    """Mean −log p per token of " target" behind the prompt, alone in a forward pass."""
    start = len(model.tokenizer(prompt)["input_ids"])
    ids = model.tokenizer(f"{prompt} {target}")["input_ids"]
    logs = model.hf(input_ids=torch.tensor([ids])).logits[0, start - 1 :].double().log_softmax(-1)
    return -sum(float(logs[place - start, ids[place]]) for place in range(start, len(ids))) / (len(ids) - start)


def by_hand(model: LanguageModel, records: Sequence[FactRecord]) -> dict[str, float]:
    """CounterFact's metrics in percent: successes and magnitudes, means over facts of means over prompts."""
    columns: dict[str, list[float]] = {name: [] for name in ("ES", "PS", "NS", "EM", "PM", "NM")}
    for record in records:
        request = record.request
        prompts = {
            "E": [request.text],
            "P": [probe.prompt for probe in record.probes if probe.kind == "paraphrase"],
            "N": [probe.prompt for probe in record.probes if probe.kind == "neighborhood"],
        }
        for letter, asked in prompts.items():
            objects = (request.target_new, str(request.target_true))
            pairs = [(nll(model, prompt, objects[0]), nll(model, prompt, objects[1])) for prompt in asked]
            wins = [(true, new) if letter == "N" else (new, true) for new, true in pairs]
            columns[f"{letter}S"].append(sum(wanted < unwanted for wanted, unwanted in wins) / len(wins))
            margins = [math.exp(-wanted) - math.exp(-unwanted) for wanted, unwanted in wins]
            columns[f"{letter}M"].append(sum(margins) / len(margins))
    means = {name: 100 * sum(values) / len(values) for name, values in columns.items()}
    return {**means, "score": 3 / sum(1 / means[name] if means[name] else math.inf for name in ("ES", "PS", "NS"))}


def test_counterfact_is_what_one_prompt_at_a_time_gives(model: LanguageModel, records: list[FactRecord]) -> None:
    found = measure([(COUNTERFACT, CounterFactEvaluator())], model, records).summary
    expected = by_hand(model, records)
    assert {name: found.value(name) for name in expected} == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def written(model: LanguageModel, prompt: str, tokens: int) -> str:
    """What transformers itself generates, alone and greedily."""
    ids = model.tokenizer(prompt, return_tensors="pt")
    plain: Mapping[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
    whole = model.hf.generate(
        **ids, do_sample=False, max_new_tokens=tokens, pad_token_id=model.pad_id, eos_token_id=sorted(model.end_ids),
        **plain,
    )[0]  # fmt: skip
    before, after = (model.tokenizer.decode(row, skip_special_tokens=True) for row in (ids["input_ids"][0], whole))
    return after[len(before) :]


@torch.no_grad()
def is_a_tie(model: LanguageModel, prompt: str, mine: str, theirs: str) -> bool:
    """Whether the first token in which two continuations differ was a toss: its top logits are within 1e-4."""
    my_ids, their_ids = (model.tokenizer(prompt + text)["input_ids"] for text in (mine, theirs))
    place = next(index for index, (a, b) in enumerate(zip(my_ids, their_ids, strict=False)) if a != b)
    top = model.hf(input_ids=torch.tensor([my_ids[:place]])).logits[0, -1].topk(2).values
    return float(top[0] - top[1]) < 1e-4


def test_generation_is_what_transformers_generates(model: LanguageModel, records: list[FactRecord]) -> None:
    hparams = GenerationHParams(sample=None, further=None, paraphrases=2, elsewhere=2, continuations=2)
    found = measure([(GENERATION, GenerationEvaluator(hparams))], model, records).observations["generation"]
    requests = {record.request.id: record.request for record in records}
    seen = set()
    for observation in found:
        target, true = requests[observation.request_id].target_new, requests[observation.request_id].target_true
        if observation.metric == "distinct_bigrams":
            expected = written(model, observation.prompt, hparams.continuation_tokens)
        else:
            text = written(model, observation.prompt, hparams.answer_tokens)
            expected = answer_of(text, hparams.stop, [str(true) if observation.kind == "neighborhood" else target])
        assert observation.text == expected or is_a_tie(model, observation.prompt, str(observation.text), expected)
        if observation.metric in ("facts_said", "paraphrases_said"):
            assert observation.value == is_said([target], str(observation.text))
            seen.add(observation.metric)
    assert seen == {"facts_said", "paraphrases_said"}


# Data sets with other questions

QUESTIONS = ("zsre_mend", "knowedit_wiki_counterfact", "mquake")


@torch.no_grad()
def tokens_right(model: LanguageModel, prompt: str, answer: str) -> float:
    """The share of the tokens of " answer" that are the likeliest, each in a forward pass of its own."""
    ids = list(model.tokenizer(prompt)["input_ids"])
    wanted = model.tokenizer(f"{prompt} {answer}")["input_ids"][len(ids) :]
    hits = 0
    for token in wanted:
        hits += int(model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    return hits / len(wanted)


@pytest.mark.parametrize("name", QUESTIONS)
def test_teacher_forcing_and_chains_are_what_one_prompt_at_a_time_gives(model: LanguageModel, name: str) -> None:
    if model.name != CATALOGUE[0]:
        pytest.skip("one model is enough for what its tokens are compared with")
    facts = load_records(DATA.with_name(f"{name}_dev.jsonl.gz"), plugins=Plugins.load(), selection=Selection(first=4))
    asked = facts[-1:]  # of MQuAKE the last edit of the first chain, which has its questions
    evaluators = [
        (TEACHER_FORCED, TeacherForcedEvaluator()),
        (MULTIHOP, MultihopEvaluator(MultihopHParams(answer_tokens=6))),
    ]
    found = measure(evaluators, model, asked).observations
    scored = [observation for observation in found["teacher-forced"] if observation.metric.endswith("_tokens")]
    answers = {probe.prompt: probe.answers[0] for probe in asked[0].probes if probe.answers}
    answers[asked[0].request.text] = asked[0].request.target_new
    assert {observation.prompt for observation in scored} >= {asked[0].request.text, *answers} - {
        probe.prompt for probe in asked[0].of_kind("multihop.single")
    }
    for observation in scored:
        assert observation.value == pytest.approx(
            tokens_right(model, observation.prompt, answers[observation.prompt])
        ), observation
    chains = [observation for observation in found["multihop"] if observation.metric == "chains_answered"]
    assert len(chains) == (name == "mquake")
    for chain in chains:
        questions = [probe for probe in asked[0].probes if probe.kind == "multihop"]
        texts = [answer_of(written(model, f"Q: {probe.prompt}\nA:", 6), (".", "\n")) for probe in questions]
        assert chain.text == " | ".join(texts)
        assert chain.value == any(is_said(questions[0].answers, text) for text in texts)
