"""Causal tracing against a plain loop of hooks, and where it ends up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from editcore import HParamsError, RequestError, StatisticsError
from editcore.datasets import KnownFact
from editcore.locate_then_edit.located import (
    KINDS,
    ROLES,
    Tracing,
    store_tracing,
    stored_tracing,
    traced_layer,
    tracing_path,
)
from editcore.models import LanguageModel
from editcore.models.layout import attention_output
from editcore.onboarding import TracingOptions
from editcore.onboarding.causal_tracing import _Fact, _parts, _tokenise, trace
from editcore.testing import TINY_FAMILIES, tiny_model
from torch import Tensor

SUBJECT, PROMPT = "Marie Curie", "The mother tongue of Marie Curie, as many know, is"
FACT = KnownFact(SUBJECT, PROMPT, "Polish")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))


def fact_of(model: LanguageModel, *, draws: int = 2, spread: float = 0.3) -> _Fact:
    generator = torch.Generator().manual_seed(5)
    return _Fact(model, _tokenise(model, FACT), spread=spread, draws=draws, generator=generator)


@torch.no_grad()
def plain_probability(model: LanguageModel, fact: _Fact, draw: int, patch: Mapping[str, Tensor], place: int) -> float:
    """One row, the whole model, and a hook per restored module."""

    def corrupt(_module: Any, _args: Any, output: Tensor) -> Tensor:
        noisy = output.clone()
        noisy[0, list(fact.row.subject)] += fact.noise[draw]
        return noisy

    handles = [model.hf.get_input_embeddings().register_forward_hook(corrupt)] if draw >= 0 else []
    for name, clean in patch.items():

        def put(_module: Any, _args: Any, output: Any, clean: Tensor = clean) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            new = hidden.clone()
            new.reshape(-1, new.shape[-1])[place] = clean[place]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(model.hf.get_submodule(name).register_forward_hook(put))
    logits = model.hf(torch.tensor([fact.row.ids])).logits[0].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    return math.exp(sum(float(logits[at - 1, fact.row.ids[at]]) for at in range(fact.row.end, len(fact.row.ids))))


@torch.no_grad()
def plain_states(model: LanguageModel, fact: _Fact, names: list[str]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            kept[name] = hidden.reshape(-1, hidden.shape[-1]).clone()

        return hook

    handles = [model.hf.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    model.hf(torch.tensor([fact.row.ids]))
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_effect_is_that_of_a_plain_loop(family: str) -> None:
    """All kinds, at the subject's last token and at the end, in every family."""
    model = tiny_model(family)
    parts = _parts(model, window=2)
    assert tuple(parts) == KINDS, "the attention's output projection is found in every family"
    fact = fact_of(model)
    traced = fact.trace(parts)
    corrupted = [plain_probability(model, fact, draw, {}, 0) for draw in range(2)]
    assert traced.clean == pytest.approx(plain_probability(model, fact, -1, {}, 0), rel=1e-3)
    assert traced.corrupted == pytest.approx(np.mean(corrupted), rel=1e-3)
    names = [module for of_kind in parts.values() for part in of_kind for module in part.modules]
    clean = plain_states(model, fact, names)
    size = max(traced.clean, traced.corrupted)
    for kind, of_kind in parts.items():
        for layer, part in enumerate(of_kind):
            for place in (fact.row.subject[-1], fact.row.end - 1):
                patch = {name: clean[name] for name in part.modules}
                restored = [plain_probability(model, fact, draw, patch, place) for draw in range(2)]
                found = traced.effects[kind][place - fact.row.subject[0], layer]
                assert found == pytest.approx(np.mean(restored) - np.mean(corrupted), abs=2e-3 * size)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_restored_run_may_start_half_way_up(family: str) -> None:
    """Otherwise the tracing would still be right, and take twice as long."""
    model = tiny_model(family)
    fact = fact_of(model)
    with torch.inference_mode(), fact._keeping_entering(), fact._corrupted(1):
        fact._probabilities(2)
    with torch.inference_mode():
        assert fact._can_start_at_a_block()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_the_last_state_of_the_last_block_is_all_there_is(family: str) -> None:
    """Restoring what the head reads gives the clean probability; a middle token of the last block gives nothing."""
    model = tiny_model(family)
    row = _tokenise(model, FACT)
    one_token = type(row)(row.ids[: row.end + 1], row.end, row.subject, row.roles)
    fact = _Fact(model, one_token, spread=0.3, draws=3, generator=torch.Generator().manual_seed(0))
    traced = fact.trace(_parts(model, window=1))
    hidden = traced.effects["hidden"][:, -1]
    assert hidden[-1] == pytest.approx(traced.clean - traced.corrupted, rel=1e-4)
    assert np.abs(hidden[:-1]).max() < 1e-7


def test_tokens_have_roles() -> None:
    model = tiny_model()
    row = _tokenise(model, FACT)
    named = [ROLES[role] for role in row.roles]
    words = [model.tokenizer.decode([token]) for token in row.ids[row.subject[0] : row.end]]
    assert named[: len(row.subject)] == [
        "first subject token",
        *["middle subject tokens"] * (len(row.subject) - 2),
        "last subject token",
    ]
    assert words[named.index("first subsequent token")] == ","
    assert (named[-1], named.count("last token")) == ("last token", 1)
    assert set(named[len(row.subject) + 1 : -1]) == {"further tokens"}
    short = _tokenise(model, KnownFact("a", "a is", "city"))
    assert [ROLES[role] for role in short.roles] == ["last subject token", "last token"]
    ends = _tokenise(model, KnownFact("Marie Curie", "Who knows Marie Curie", "is"))
    assert ROLES[ends.roles[-1]] == "last subject token"


def what_it_says(model: LanguageModel, prompts: list[str]) -> list[KnownFact]:
    """True statements, as far as this random model is concerned."""
    rows = [list(model.read_prompt(prompt)[0]) for prompt in prompts]
    said = [model.tokenizer.decode(ids) for ids in model.generate_ids(rows, max_new_tokens=1)]
    return [
        KnownFact("Marie Curie", prompt, text.strip())
        for prompt, text in zip(prompts, said, strict=True)
        if text.startswith(" ") and text.strip().isalpha()
    ]


@pytest.fixture
def known() -> tuple[LanguageModel, list[KnownFact]]:
    for seed in range(20):
        model = tiny_model(seed=seed)
        prompts = [f"{opening} Marie Curie {verb}" for opening in ("So", "Well,", "The", "I", "You", "It is")
                   for verb in ("was born in", "works as a", "plays the sport of")]  # fmt: skip
        facts = what_it_says(model, prompts)
        if len(facts) >= 2:
            return model, facts
    raise AssertionError("no tiny model says two words")


def test_only_known_facts_are_traced_and_the_rest_is_counted(known: tuple[LanguageModel, list[KnownFact]]) -> None:
    model, facts = known
    wrong = KnownFact("Marie Curie", "So Marie Curie was born in", "a city")
    tracing = trace(model, [wrong, *facts], options=TracingOptions(num=2, draws=2, seed=3))
    assert (tracing.used, tracing.asked) == (2, 3)
    assert tracing.clean > 0
    again = trace(model, [wrong, *facts], options=TracingOptions(num=2, draws=2, seed=3))
    assert all(np.array_equal(again.effects[kind], tracing.effects[kind], equal_nan=True) for kind in KINDS)
    reseeded = trace(model, [wrong, *facts], options=TracingOptions(num=2, draws=2, seed=4))
    assert reseeded.corrupted != tracing.corrupted
    rows = list(tracing.rows())
    assert len(rows) == 3 * 6 * 3
    assert rows[0] == {"kind": "hidden", "role": ROLES[0], "layer": 0, "effect": tracing.effects["hidden"][0, 0],
                       "facts": 2}  # fmt: skip


def test_a_model_that_knows_nothing_is_said_to() -> None:
    tracing = trace(tiny_model(), [KnownFact("Marie Curie", "Marie Curie was born in", "Warsaw")])
    assert (tracing.used, tracing.asked, math.isnan(tracing.clean)) == (0, 1, True)
    assert np.isnan(tracing.effects["mlp"]).all()
    store_tracing(tracing)
    with pytest.raises(HParamsError, match="no tracing of tiny-llama yet"):
        traced_layer(tiny_model(), [0, 1], owner="emmet")


def made(model: LanguageModel, mlp: list[float]) -> Tracing:
    effects = np.zeros((len(ROLES), model.layout.num_layers))
    effects[ROLES.index("last subject token")] = mlp
    return Tracing(
        model=model.name, fingerprint=model.base_fingerprint, effects=dict.fromkeys(KINDS, effects), counts=(1,) * 6,
        asked=9, used=4, clean=0.5, corrupted=0.1, noise=3.0, draws=1, window=1, seed=0,
    )  # fmt: skip


def test_a_tracing_is_kept_by_the_models_weights() -> None:
    model = tiny_model()
    assert stored_tracing(model) is None
    tracing = made(model, [0.1, 0.3, 0.2])
    assert store_tracing(tracing) == tracing_path(model.base_fingerprint)
    found = stored_tracing(tiny_model())
    assert found is not None
    assert found.ranked_layers() == [1, 2, 0]
    assert np.array_equal(found.effects["mlp"], tracing.effects["mlp"])
    assert stored_tracing(tiny_model(seed=1)) is None
    assert traced_layer(model, (0, 2), owner="x") == 2
    tracing_path(model.base_fingerprint).write_text("{}")
    with pytest.raises(StatisticsError, match="delete it and trace anew"):
        stored_tracing(model)


def test_a_model_without_a_tracing_is_told_how_to_get_one() -> None:
    with pytest.raises(HParamsError) as caught:
        traced_layer(tiny_model(), [0], owner="emmet")
    assert str(caught.value) == (
        'emmet: layer_selection is "traced", but there is no tracing of tiny-llama yet. Run: editctl trace tiny-llama'
    )


def test_bad_input() -> None:
    with pytest.raises(RequestError, match="the list of facts is empty"):
        trace(tiny_model(), [])
    with pytest.raises(HParamsError, match="must be positive"):
        TracingOptions(num=0)


def test_where_two_modules_mix_tokens_none_is_the_attentions_output() -> None:
    model = tiny_model()
    block = model.block(0)
    block.another = torch.nn.Linear(model.layout.d_model, model.layout.d_model)
    original = block.self_attn.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        first, *rest = original(*args, **kwargs)
        return (first + block.another(first.roll(1, dims=1)), *rest)

    block.self_attn.forward = forward
    assert attention_output(model.hf, model.layout) is None
