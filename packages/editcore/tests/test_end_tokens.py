"""What a tokenizer appends is not read where text goes on, and a token without an embedding has a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from editcore import EditRequest, ModelError, RequestError
from editcore.evaluation import next_token_log_probabilities, perplexity, score_targets
from editcore.locate_then_edit import fact_rows, optimise_targets
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.templates import sample_context_templates
from editcore.models import LanguageModel, join_continuation, target_losses, target_tokens
from editcore.models.tokens import continuation_row, lookup_row
from editcore.second_moments import open_corpus
from editcore.testing import tiny_hf_model, tiny_requests, tiny_tokenizer
from tokenizers import processors

TEMPLATE = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}\n{% endfor %}[assistant]\n"
PROMPTS = ["Marie Curie was born in", "My name is", "The capital of France </s>", "works as a "]


def model(*, bos: bool, eos: bool, chat: bool = False, family: str = "llama") -> LanguageModel:
    tokenizer = tiny_tokenizer(bos=bos)
    if eos:
        start, end = (("<s>", 2) if bos else None), ("</s>", 1)
        tokenizer.backend_tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single=f"{'<s> ' if bos else ''}$A </s>", special_tokens=[token for token in (start, end) if token]
                ),
            ]
        )
        assert tokenizer("Bob")["input_ids"][-1] == tokenizer.eos_token_id
    tokenizer.chat_template = TEMPLATE
    made = LanguageModel.wrap(tiny_hf_model(family), tokenizer, name="tiny")
    if chat:
        made.use_chat_template()
    return made


@pytest.fixture(params=[(True, False), (False, False), (True, True)], ids=["bos", "no bos", "chat"])
def pair(request: pytest.FixtureRequest) -> tuple[LanguageModel, LanguageModel]:
    """A model whose tokenizer appends an end token, and the same with one that does not."""
    bos, chat = request.param
    return model(bos=bos, eos=True, chat=chat), model(bos=bos, eos=False, chat=chat)


Pair = tuple[LanguageModel, LanguageModel]


def test_a_prompt_ends_where_its_text_does(pair: Pair) -> None:
    ends, plain = pair
    for text in [*PROMPTS, ""]:
        assert ends.read_prompt(text)[0] == plain.read_prompt(text)[0]
        assert ends.read_text(text, opening=True) == plain.read_text(text, opening=True)
    assert torch.equal(ends.encode(PROMPTS).input_ids, plain.encode(PROMPTS).input_ids)
    assert ends.opening_ids == plain.opening_ids


def test_generation_goes_on_from_the_text(pair: Pair) -> None:
    ends, plain = pair
    for raw in (False, True):
        assert ends.generate(PROMPTS, max_new_tokens=6, raw=raw) == plain.generate(PROMPTS, max_new_tokens=6, raw=raw)
    assert sample_context_templates(ends, seed=0) == sample_context_templates(plain, seed=0)


def test_scores_and_targets_are_of_prompt_and_target_alone(pair: Pair) -> None:
    ends, plain = pair
    assert score_targets(ends, PROMPTS, ["Paris"] * 4) == score_targets(plain, PROMPTS, ["Paris"] * 4)
    for text in PROMPTS[:2]:
        prompt_ids, _ = ends.read_prompt(text)
        target = ends.read_text("Paris" if ends.prompt_form.after else " Paris")
        assert join_continuation(ends, text, prompt_ids, "Paris") == (prompt_ids + target, len(prompt_ids))
    requests = tiny_requests(2)
    assert torch.equal(target_losses(ends, requests), target_losses(plain, requests))
    assert torch.equal(target_losses(ends, requests, ended=True), target_losses(plain, requests, ended=True))
    assert torch.equal(next_token_log_probabilities(ends, PROMPTS), next_token_log_probabilities(plain, PROMPTS))


def test_the_token_that_ends_a_text_is_a_part_of_an_ended_target(pair: Pair) -> None:
    ends, _ = pair
    request = tiny_requests(1)[0]
    plain, ended = (target_tokens(ends, [request], ended=flag) for flag in (False, True))
    assert plain.lengths[0] + 1 == ended.lengths[0]
    assert ended.tokens.tolist() == [*plain.tokens.tolist(), ends.tokenizer.eos_token_id]
    last = torch.cat([plain.input_ids[0], plain.tokens[-1:]])  # the target's last token is read, too
    assert ended.input_ids[0].tolist() == last.tolist()
    logits = ends.hf(ended.input_ids).logits[0].log_softmax(-1)
    expected = -sum(float(logits[at, token]) for at, token in zip(ended.positions, ended.tokens, strict=True))
    [loss] = target_losses(ends, [request], ended=True)
    assert float(loss) == pytest.approx(expected / ended.lengths[0], rel=1e-5)


def test_a_target_that_fills_the_positions_stays_without_its_end() -> None:
    made, request = model(bos=True, eos=False, family="gpt2"), tiny_requests(1)[0]
    longest = target_tokens(made, [request], ended=True).input_ids.shape[1]
    for positions, more in ((longest, 1), (longest - 1, 0)):
        made.positions = positions
        found = [target_tokens(made, [request], ended=flag).lengths[0] for flag in (False, True)]
        assert found[1] - found[0] == more


def test_an_ended_target_needs_a_token_that_ends_a_text() -> None:
    made = model(bos=True, eos=False)
    made.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no token that ends a text"):
        target_tokens(made, tiny_requests(1), ended=True)


def test_values_are_optimised_on_the_same_rows(pair: Pair) -> None:
    ends, plain = pair
    request = tiny_requests(1)[0]
    for template in ("{}", "It is late. {}"):
        for row in (lookup_row, continuation_row):
            assert row(ends, request, template=template) == row(plain, request, template=template)
        last = lookup_row(ends, request, template=template, fact_token="last")
        assert last == lookup_row(plain, request, template=template, fact_token="last")
    hparams = LocateThenEditHParams(layers=(1,), v_num_grad_steps=3)
    found = [
        optimise_targets(
            language_model,
            [[fact] for fact in fact_rows(language_model, [request], ("{}", "So. {}"), hparams)],
            layer=1,
            hparams=hparams,
        )
        for language_model in pair
    ]
    assert torch.equal(found[0].deltas, found[1].deltas)


def test_text_for_second_moments_and_perplexity_has_no_end_tokens(pair: Pair, tmp_path: Path) -> None:
    ends, plain = pair
    file = tmp_path / "text.txt"
    file.write_text("The capital of France is a city. " * 20)
    for name in ("self", str(file)):
        rows = [open_corpus(name, seed=1).sequences(language_model, 64, 16) for language_model in pair]
        assert torch.equal(rows[0], rows[1])
    assert perplexity(ends, file.read_text(), window=16) == perplexity(plain, file.read_text(), window=16)


# Tokens without an embedding


@pytest.fixture
def extended() -> LanguageModel:
    """A tokenizer with a token more than the model embeds, as Gemma 3 has one for images."""
    tokenizer, hf = tiny_tokenizer(), tiny_hf_model()
    rows = hf.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<more{number}>" for number in range(len(tokenizer), rows)] + ["<picture>"])
    assert tokenizer.convert_tokens_to_ids("<picture>") == rows
    return LanguageModel.wrap(hf, tokenizer, name="tiny")


def test_a_token_without_an_embedding_has_a_sentence(extended: LanguageModel) -> None:
    long = "The capital of France is a city. " * 9
    ways: list[Callable[[str], object]] = [
        lambda text: extended.generate([text], max_new_tokens=2),
        lambda text: extended.generate([text], max_new_tokens=2, raw=True),
        lambda text: score_targets(extended, [text], ["Paris"]),
        lambda text: score_targets(extended, ["My name is"], [text]),
        lambda text: lookup_row(extended, EditRequest(subject="Rome", prompt="{} " + text, target_new="x")),
        lambda text: perplexity(extended, text),
        lambda text: extended.encode([text]),
    ]
    for way in ways:
        with pytest.raises(RequestError, match=r"The token '<picture>' \(\d+\) in '.*a <picture> here") as caught:
            way(f"{long} see a <picture> here")
        assert "has no embedding in tiny, which embeds 640 tokens" in str(caught.value)
        assert len(str(caught.value)) < 300, "a long text is not shown whole"


def test_a_padding_token_without_an_embedding_has_a_stand_in_that_has_one() -> None:
    tokenizer = tiny_tokenizer()
    hf = tiny_hf_model()
    tokenizer.add_tokens([f"<more{number}>" for number in range(640 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<late>", "eos_token": "<later>"})
    made = LanguageModel.wrap(hf, tokenizer, name="tiny")
    assert made.tokenizer.pad_token == "<s>"
    assert len(made.generate(["My name is", "Bob"], max_new_tokens=2)) == 2
