"""Target scores against a slow oracle: one text at a time, full logits, plain loops, float64."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from editcore.evaluation import TargetScore, perplexity, score_targets
from editcore.evaluation.scoring import covering_rows
from editcore.interfaces.errors import RequestError
from editcore.models import LanguageModel, PassBudget
from editcore.testing import tiny_model, tiny_tokenizer
from editcore.testing.contract import counting_passes
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAIRS = [
    ("Marie Curie was born in", "Paris"),
    ("Marie Curie was born in", "Rome and Berlin"),
    ("The mother tongue of Isaac Newton is", "English"),
    ("The mother tongue of Isaac Newton is", "Klingon, surely"),
    ("My name is", "Bob"),
    ("A much longer prompt, so that its row needs padding beside the short ones: Bob Dylan plays the sport of", "golf"),
    ("Marie Curie was born in Rome and", "Berlin"),  # a beginning of an earlier row, where the tokens agree
    ("Marie Curie was born in", "Paris"),  # a repetition
]


def oracle(model: LanguageModel, prompt: str, target: str) -> TargetScore:
    context = model.tokenizer(prompt)["input_ids"]
    continuation = model.tokenizer(" " + target, add_special_tokens=False)["input_ids"]
    ids = context + continuation
    logits = model.hf(input_ids=torch.tensor([ids])).logits[0].double()
    total, predicted = 0.0, []
    for place in range(len(context), len(ids)):
        row = logits[place - 1].tolist()
        largest = max(row)
        log_z = largest + math.log(sum(math.exp(value - largest) for value in row))
        total += log_z - row[ids[place]]
        predicted.append(row.index(largest))
    hits = sum(token == wanted for token, wanted in zip(predicted, continuation, strict=True))
    length = len(continuation)
    return TargetScore(
        nll=total / length, correct=hits == length, num_tokens=length, hits=hits, predicted=tuple(predicted)
    )


def assert_close(found: list[TargetScore], expected: list[TargetScore], *, within: float = 1e-5) -> None:
    assert [score.num_tokens for score in found] == [score.num_tokens for score in expected]
    assert [score.correct for score in found] == [score.correct for score in expected]
    assert [(score.hits, score.predicted) for score in found] == [(score.hits, score.predicted) for score in expected]
    assert [score.nll for score in found] == pytest.approx([score.nll for score in expected], abs=within)


def run(model: LanguageModel, pairs: list[tuple[str, str]]) -> list[TargetScore]:
    return score_targets(model, [prompt for prompt, _ in pairs], [target for _, target in pairs])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "cohere", "granite", "opt", "bloom", "gpt_neox"])
def test_agrees_with_the_oracle(family: str, bos: bool) -> None:
    model = tiny_model(family, tokenizer=tiny_tokenizer(bos=bos))
    assert_close(run(model, PAIRS), [oracle(model, *pair) for pair in PAIRS])


def test_correct_is_true_where_the_model_says_it() -> None:
    model = tiny_model("llama")
    logits = model.hf(input_ids=torch.tensor([model.tokenizer("My name is")["input_ids"]])).logits[0, -1]
    for token in logits.argsort(descending=True).tolist():
        word = model.tokenizer.decode([token])
        if model.tokenizer(word, add_special_tokens=False)["input_ids"] == [token] and word.strip():
            break
    expected = token == int(logits.argmax())
    prompts = ["My name is"] * 2
    found = score_targets(model, prompts, [word.removeprefix(" "), "Zyx"])
    assert found[0].correct == (expected and word.startswith(" "))
    assert not found[1].correct


def test_order_padding_and_batching_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    left = tiny_model("llama", tokenizer=tiny_tokenizer(padding_side="left"))
    right = tiny_model("llama")
    expected, counts = run(right, PAIRS), list[int]()
    assert_close(run(left, PAIRS), expected, within=1e-6)
    usual = PassBudget.forward(right)
    for tokens in (1, 24, 100_000):
        with monkeypatch.context() as patch, counting_passes(right) as passes:
            budget = usual.with_tokens(tokens)
            patch.setattr(PassBudget, "forward", lambda _model, budget=budget: budget)
            assert_close(run(right, PAIRS), expected)
        counts.append(len(passes))
    assert counts[0] > counts[1] > counts[2], "the budget is what cuts the rows"
    shuffled = list(range(len(PAIRS)))
    random.Random(0).shuffle(shuffled)
    assert_close(run(right, [PAIRS[i] for i in shuffled]), [expected[i] for i in shuffled])
    assert_close([run(right, [pair])[0] for pair in PAIRS], expected)


def test_each_text_is_read_once() -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    handle = model.block(0).register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[0]))
    run(model, [PAIRS[0]] * 5 + [PAIRS[4]])
    handle.remove()
    assert sum(seen) == 2


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12))
def test_covering_rows_are_few_and_cover(sequences: list[tuple[int, ...]]) -> None:
    rows, row_of = covering_rows(sequences)
    assert all(rows[row_of[sequence]][: len(sequence)] == sequence for sequence in sequences)
    assert [len(row) for row in rows] == sorted(len(row) for row in rows)
    assert not any(a != b and b[: len(a)] == a for a in rows for b in rows)  # none could be left out
    assert set(rows) <= set(sequences)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Merges across spaces, as SentencePiece models may: "in Paris" can share a token with what stands before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<pad>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["born in Paris", "born in Rome"] * 40, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def test_a_tokenizer_that_merges_across_the_border_uses_the_joint_tokens() -> None:
    model = copy.copy(tiny_model("llama"))
    model.tokenizer = merging_tokenizer()
    prompt, target = "was born in", "Paris"
    joint = model.tokenizer(f"{prompt} {target}", return_offsets_mapping=True)
    ids = joint["input_ids"]
    start = next(i for i, (_, end) in enumerate(joint["offset_mapping"]) if end > len(prompt))
    assert model.tokenizer.convert_ids_to_tokens(ids[start:]) == ["▁born▁in▁Paris"]  # it reaches over the border
    log_p = model.hf(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = -sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start)
    assert score_targets(model, [prompt], [target])[0].nll == pytest.approx(expected, abs=1e-5)
    with pytest.raises(RequestError, match="need a token each"):  # the whole text is one token
        score_targets(model, ["born in"], [target])


def test_appended_end_tokens_are_not_part_of_the_target() -> None:
    model = tiny_model("llama", tokenizer=tiny_tokenizer(bos=False))
    plain = run(model, PAIRS[:3])
    ends = tiny_tokenizer(bos=False)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ends.convert_tokens_to_ids("</s>"))]
    )
    assert ends("Bob")["input_ids"][-1] == ends.eos_token_id
    model = copy.copy(model)
    model.tokenizer = ends
    assert_close(run(model, PAIRS[:3]), plain)


def test_bad_input_has_a_sentence() -> None:
    model = tiny_model("llama", tokenizer=tiny_tokenizer(bos=False))
    with pytest.raises(RequestError, match="need a token each"):
        score_targets(model, [""], ["Paris"])
    with pytest.raises(RequestError, match="reads at most 256"):
        score_targets(tiny_model("gpt2"), ["very " * 400], ["long"])
    assert score_targets(model, [], []) == []


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_is_the_exponential_of_the_mean_loss(bos: bool) -> None:
    model = tiny_model("gpt2", tokenizer=tiny_tokenizer(bos=bos))
    text = " ".join(f"{prompt} {target}." for prompt, target in PAIRS)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    front = [model.tokenizer.bos_token_id] if bos else []
    size = 32 - len(front)
    losses: list[float] = []
    for start in range(0, len(ids), size):
        row = front + ids[start : start + size]
        log_p = model.hf(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        losses += [-float(log_p[i - 1, row[i]]) for i in range(1, len(row))]
    assert perplexity(model, text, window=32) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    short = perplexity(model, text, window=32, max_tokens=20)
    assert short == pytest.approx(perplexity(model, model.tokenizer.decode(ids[:20]), window=32), rel=1e-5)
    assert perplexity(model, ids, window=32) == perplexity(model, text, window=32)
    with pytest.raises(RequestError, match="no token to predict"):
        perplexity(model, "")
    with pytest.raises(RequestError, match="A window of 1 tokens is too short to predict one"):
        perplexity(model, text, window=1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_perplexity_makes_few_logits_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    vocab = model.hf.get_output_embeddings().weight.shape[0]
    text = " ".join(f"{prompt} {target}." for prompt, target in PAIRS)
    whole = perplexity(model, text, window=32)
    made: list[int] = []
    handle = model.hf.get_output_embeddings().register_forward_hook(lambda *call: made.append(call[-1].shape[1]))
    small = replace(PassBudget.forward(model), logits=7 * vocab)
    monkeypatch.setattr(PassBudget, "forward", lambda _model: small)
    assert perplexity(model, text, window=32) == pytest.approx(whole, rel=1e-6)
    handle.remove()
    assert max(made) == 7
