"""Drift, fluency and growth of the weights against values computed by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from editcore import EvaluationContext
from editcore.evaluation import (
    DamageEvaluator,
    DamageHParams,
    kl_divergences,
    next_token_log_probabilities,
    ngram_entropy,
)
from editcore.models import LanguageModel
from editcore.testing import tiny_model, tiny_records
from hypothesis import given, strategies as st

QUICK = {"prompts": 4, "continuations": 1, "continuation_tokens": 8}


def measured(model: LanguageModel, unedited: LanguageModel, **settings: int) -> dict[str, dict[str, float]]:
    evaluator, records = DamageEvaluator(DamageHParams(**{**QUICK, **settings})), tiny_records(2)  # type: ignore[arg-type]
    before = evaluator.evaluate(unedited, records, EvaluationContext())
    found: dict[str, dict[str, float]] = {}
    for observation in evaluator.evaluate(model, records, EvaluationContext(unedited=before)):
        found.setdefault(observation.metric, {})[observation.prompt] = observation.value
    return found


def edited(factor: float, layer: int = 0) -> LanguageModel:
    """A model of which one projection is scaled."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.weight(model.layout.weight_name(layer)).mul_(factor)
    return model


def test_drift_is_the_divergence_where_all_tokens_are_told_apart() -> None:
    unedited, model = tiny_model("llama"), edited(3.0)
    found = measured(model, unedited, tokens=1_000_000)["next_token_kl"]
    assert len(found) == 4
    prompts = list(found)
    expected = kl_divergences(
        *(next_token_log_probabilities(language_model, prompts) for language_model in (unedited, model))
    ).tolist()
    assert min(expected) > 1e-6
    assert list(found.values()) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    fewer = measured(model, unedited, tokens=5)["next_token_kl"]
    assert all(0 < fewer[prompt] <= found[prompt] + 1e-12 for prompt in prompts)
    before, after = (
        next_token_log_probabilities(language_model, prompts).exp() for language_model in (unedited, model)
    )
    for row, prompt in enumerate(prompts):
        kept = before[row].topk(5).indices
        p, q = (
            torch.cat([probabilities[row][kept], 1 - probabilities[row][kept].sum(dim=0, keepdim=True)])
            for probabilities in (before, after)
        )
        assert fewer[prompt] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)


def test_an_unedited_model_does_not_drift_or_grow() -> None:
    found = measured(tiny_model("llama"), tiny_model("llama"))
    assert set(found["next_token_kl"].values()) == {0.0} or max(found["next_token_kl"].values()) < 1e-9
    assert set(found["norm_growth"].values()) == {0.0}
    assert found["largest_norm_growth"] == {"all": 0.0}


def test_growth_is_that_of_the_weight() -> None:
    model = edited(1.25, layer=1)
    found = measured(model, tiny_model("llama"))
    name = model.layout.weight_name(1)
    assert found["norm_growth"][name] == pytest.approx(0.25, rel=1e-6)
    assert found["norm_growth"][model.layout.weight_name(0)] == 0
    assert found["largest_norm_growth"]["all"] == found["norm_growth"][name]
    shrunk = measured(edited(0.5), tiny_model("llama"))
    assert shrunk["norm_growth"][model.layout.weight_name(0)] == pytest.approx(-0.5, rel=1e-6)
    assert shrunk["largest_norm_growth"]["all"] == 0


def entropy_by_hand(runs: list[str]) -> float:
    return sum(-count / len(runs) * math.log(count / len(runs)) / math.log(2) for count in Counter(runs).values())


@given(st.lists(st.sampled_from(["so", "it", "is"]), min_size=3, max_size=12))
def test_fluency_is_the_entropy_of_pairs_and_triples(words: list[str]) -> None:
    pairs = [" ".join(words[place : place + 2]) for place in range(len(words) - 1)]
    triples = [" ".join(words[place : place + 3]) for place in range(len(words) - 2)]
    expected = entropy_by_hand(pairs) / 3 + 2 * entropy_by_hand(triples) / 3
    assert ngram_entropy("  ".join(words).upper()) == pytest.approx(expected, abs=1e-12)


def test_a_repetition_has_no_entropy_and_two_words_have_no_value() -> None:
    assert ngram_entropy("so so so so") == 0
    assert ngram_entropy("so it") is None
    assert ngram_entropy("a b c d") == pytest.approx(math.log2(3) / 3 + 2 / 3)
