"""A model with so many positions and no more: what fits is read, what ends there ends, and the rest has a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from editcore import EditRequest, EditSession, FactRecord, RequestError, Sampling, SessionConfig
from editcore.datasets import KnownFact
from editcore.evaluation import next_token_log_probabilities, perplexity, score_targets
from editcore.locate_then_edit import fact_rows, optimise_targets
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.models import LanguageModel, target_losses
from editcore.models.positions import position_limit
from editcore.models.tokens import continuation_row, fitting, lookup_row
from editcore.onboarding import trace
from editcore.second_moments import CorpusOptions, StatisticsStore
from editcore.testing import TINY_FAMILIES, tiny_hf_model, tiny_model, tiny_requests

LIMIT = 40
FIELDS = {"gpt2": "n_positions", "gptj": "n_positions", "mpt": "max_seq_len"}
LIMITED = ("gpt2", "gptj", "gpt_neo", "opt", "mpt")


def of(family: str, positions: int = LIMIT) -> LanguageModel:
    return tiny_model(family, config={FIELDS.get(family, "max_position_embeddings"): positions})


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_limit_is_told_where_there_is_one(family: str) -> None:
    hf = tiny_hf_model(family, config={FIELDS.get(family, "max_position_embeddings"): LIMIT})
    assert position_limit(hf) == (LIMIT if family in LIMITED else None)
    ids = torch.arange(5, 6 + LIMIT)[None]
    with torch.no_grad():
        hf(input_ids=ids[:, :-1], use_cache=False)
        if family in LIMITED:
            with pytest.raises((IndexError, RuntimeError)):
                hf(input_ids=ids, use_cache=False)
        else:
            hf(input_ids=ids, use_cache=False)


# Generation


@pytest.mark.parametrize("family", LIMITED)
@pytest.mark.parametrize("sampling", [None, Sampling(seed=3)])
def test_a_continuation_ends_at_the_last_position(family: str, sampling: Sampling | None) -> None:
    """Alone and beside shorter and longer ones, sampled and not."""
    model = of(family)
    rows = [list(range(5, 5 + length)) for length in (LIMIT, LIMIT - 3, 20, 2)]
    found = model.generate_ids(rows, max_new_tokens=[50, 50, 50, 10], sampling=sampling, stop_at_end=False)
    assert [len(continuation) for continuation in found] == [1, 4, 21, 10]
    if sampling is None:
        for row, continuation in zip(rows, found, strict=True):
            logits = model.hf(input_ids=torch.tensor([[*row, *continuation[:-1]]])).logits[0]
            assert logits[len(row) - 1 :].argmax(-1).tolist() == continuation


def test_the_user_is_told_where_a_continuation_ends(caplog: pytest.LogCaptureFixture) -> None:
    model = of("gpt2")
    model.generate(["My name is"], max_new_tokens=4)
    assert not caplog.messages
    model.generate(["My name is", "My"], max_new_tokens=37)
    assert "tiny-gpt2 reads at most 40 tokens: 1 of 2 continuations end there" in caplog.text


def test_rotary_models_go_on_as_they_can() -> None:
    model = of("llama")
    assert model.positions is None
    [new] = model.generate_ids([list(range(5, 45))], max_new_tokens=6, stop_at_end=False)
    assert len(new) == 6
    assert score_targets(model, ["very " * 60], ["long"])[0].num_tokens > 0


# A prompt that is too long


@pytest.mark.parametrize("family", ["gpt2", "mpt"])
def test_a_prompt_that_is_too_long_has_a_sentence(family: str) -> None:
    model = of(family)
    prompt = "Marie Curie " + "very " * 40
    request = EditRequest(subject="Marie Curie", prompt=prompt.replace("Marie Curie", "{}"), target_new="Rome")
    ways: list[Callable[[], object]] = [
        lambda: model.generate([prompt], max_new_tokens=2),
        lambda: model.generate([prompt], max_new_tokens=2, raw=True),
        lambda: score_targets(model, [prompt], ["Rome"]),
        lambda: next_token_log_probabilities(model, [prompt]),
        lambda: target_losses(model, [request]),
        lambda: lookup_row(model, request),
        lambda: continuation_row(model, request, template="So. {}"),
        lambda: trace(model, [KnownFact("Marie Curie", prompt, "Rome")]),
    ]
    for way in ways:
        with pytest.raises(
            RequestError, match=rf"Marie Curie very .* has \d+ tokens; tiny-{family} reads at most 40\."
        ):
            way()


def test_the_last_token_of_a_target_needs_no_position() -> None:
    model = of("gpt2")
    prompt = "My name is"
    dots = LIMIT - len(model.read_prompt(prompt)[0]) - len(model.read_text(" Rome"))
    [score] = score_targets(model, [prompt], ["Rome" + "." * (dots + 1)])
    assert score.num_tokens == LIMIT + 1 - len(model.read_prompt(prompt)[0])
    with pytest.raises(RequestError, match=r"'My name is' with its target has 42 tokens; tiny-gpt2 reads at most 40"):
        score_targets(model, [prompt], ["Rome" + "." * (dots + 2)])


# Editing


CONTEXT = "The city is in the north and has many people who live there. {}"


def long_request(model: LanguageModel) -> EditRequest:
    """One that fits with two tokens to spare, and no context beside it."""
    words = ""
    for _ in range(LIMIT):
        if model.room(f"{words}Marie Curie was born in", then=" Rome") > 2:
            words += "is "
    return EditRequest(subject="Marie Curie", prompt=words + "{} was born in", target_new="Rome")


def test_a_context_gives_way_to_its_prompt() -> None:
    model = of("gpt2")
    long = long_request(model)
    assert fitting(model, long, "{}") == "{}"
    assert fitting(model, long, CONTEXT) in ("{}", "there. {}")
    [short] = tiny_requests(1)
    shortened = long.model_copy(update={"prompt": long.prompt.removeprefix("is is is is is ")})
    assert fitting(model, short, CONTEXT) == CONTEXT
    kept = fitting(model, shortened, CONTEXT)
    assert CONTEXT.endswith(kept)
    assert kept not in ("{}", CONTEXT)
    row = continuation_row(model, shortened, template=CONTEXT)
    assert LIMIT - 5 <= len(row.ids) <= LIMIT + 1
    assert row.ids[: row.target_start] == lookup_row(model, shortened, template=CONTEXT).ids
    assert model.tokenizer.decode(row.ids[: row.lookup + 1]).endswith("Marie Curie")
    assert fitting(of("llama"), long, CONTEXT) == CONTEXT


@pytest.mark.parametrize("family", LIMITED)
def test_facts_are_optimised_up_to_the_last_position(family: str) -> None:
    """Long and short ones together: what a short one is padded to must not run over the end."""
    model = of(family)
    late = long_request(model)
    early = EditRequest(subject="Marie Curie", prompt="{} was" + " is" * late.prompt.count("is "), target_new="Rome")
    hparams = LocateThenEditHParams(layers=(1,), v_num_grad_steps=2, kl_factor=0.0)

    def deltas(*requests: EditRequest) -> torch.Tensor:
        found = optimise_targets(
            model, [[fact] for fact in fact_rows(model, requests, ("{}", CONTEXT), hparams)], layer=1, hparams=hparams
        )
        assert "reads at most 40 tokens, so contexts of" in found.notes[0]
        return found.deltas

    together = deltas(late, early)
    assert torch.allclose(together, torch.cat([deltas(late), deltas(early)]), atol=1e-4)
    short = tiny_requests(3)
    alone = optimise_targets(
        model, [[fact] for fact in fact_rows(model, short, ("{}", CONTEXT), hparams)], layer=1, hparams=hparams
    )
    assert torch.allclose(deltas(*short, late, early)[:3], alone.deltas, atol=1e-4)


def test_a_session_refuses_a_batch_before_it_writes_the_first(toys: object) -> None:
    model = of("gpt2")
    too_long = long_request(model)
    too_long = too_long.model_copy(update={"prompt": "is is is is is is " + too_long.prompt, "id": "long"})
    session = EditSession.open(model, SessionConfig(editor="toy", settings={"toy": {"layers": [1]}}))
    with pytest.raises(RequestError, match="reads at most 40"):
        session.edit([*tiny_requests(2), too_long], batch_size=1)
    assert not session.ledger.batches
    session.close()


def test_a_run_refuses_it_before_anything_is_measured(
    toys: object, small: Path, editctl: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    shutil.rmtree(small)
    of("gpt2").save(small)
    too_long = EditRequest(subject="Ada", prompt="is " * 50 + "{} is", target_new="x")
    records = [FactRecord(request=request) for request in (*tiny_requests(2), too_long)]
    facts = tmp_path / "long.jsonl"
    facts.write_text("".join(record.model_dump_json() + "\n" for record in records))
    out = tmp_path / "run"
    done = editctl("run", "--model", small, "--dataset", facts, "--editor", "toy", "--out", out)
    assert done.code == 2
    assert "'is is is" in done.err
    assert "reads at most 40" in done.err
    assert not (out / "run.json").exists()
    facts.write_text(json.dumps(tiny_requests(1)[0].model_dump(mode="json")))
    assert editctl("run", "--model", small, "--dataset", facts, "--editor", "toy", "--out", tmp_path / "two").code == 0
    said = editctl("generate", tmp_path / "two", "is " * 50)
    assert (said.code, "reads at most 40" in said.err) == (2, True)
    said = editctl("generate", tmp_path / "two", "My name is", "--tokens", 80)
    assert said.code == 0, said.err


# Text in windows


def test_windows_and_sequences_are_no_longer_than_the_positions(tmp_path: Path) -> None:
    text = "The capital of France is a city. " * 60
    for family in ("gpt2", "mpt"):
        model = of(family)
        assert perplexity(model, text) == perplexity(model, text, window=LIMIT)
        store = StatisticsStore(model, CorpusOptions(tokens=400), directory=tmp_path)
        assert store.key(1).sequence_length == LIMIT
        assert store.moments([1])[1].isfinite().all()
