"""Loading, fingerprints, encoding and generation, on tiny models of every family."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import HParamsError, LoadOptions, ModelError, Sampling, StorageError, UnknownNameError
from editcore.models import LanguageModel, loading
from editcore.models.encoding import continuation_text
from editcore.testing import TINY_FAMILIES, three_facts, tiny_hf_model, tiny_model, tiny_requests, tiny_tokenizer

PROMPTS = ["Marie Curie was born in", "The", "Isaac Newton plays the sport of many people who live there"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save(tmp_path / "model")
    return tmp_path / "model"


# Loading


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_saved_model_comes_back_with_the_same_fingerprint(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save(tmp_path)
    again = LanguageModel.load(str(tmp_path))
    assert again.fingerprint() == model.base_fingerprint
    assert again.layout == model.layout
    assert again.tokenizer("Marie Curie")["input_ids"] == model.tokenizer("Marie Curie")["input_ids"]


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(folder: Path) -> None:
    model = LanguageModel.load(str(folder), LoadOptions(dtype="bfloat16"))
    assert not model.hf.training
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    assert model.name == str(folder)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("config.json", "is no model: it has no config.json"),
        ("model.safetensors", "has a config.json but no weights"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_an_incomplete_folder(folder: Path, missing: str, sentence: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=sentence):
        LanguageModel.load(str(folder))


def test_damaged_files_and_wrong_places(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a file; a model is a folder"):
        LanguageModel.load(str(folder / "config.json"))
    with pytest.raises(ModelError, match="There is no model folder"):
        LanguageModel.load(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="There is no model folder"):
        LanguageModel.load("./nowhere")
    (folder / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelError, match=r"The model in '.*' cannot be loaded"):
        LanguageModel.load(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        LanguageModel.load(str(folder))


def test_an_unknown_id_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("editcore.models.sources.hub_may_answer", lambda: False)
    with pytest.raises(
        ModelError, match=r"There is no model 'smollm2-135': .* cannot be reached\. Did you mean 'smollm2"
    ):
        LanguageModel.load("smollm2-135")


def test_a_device_without_float64_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS, before the model is loaded and with a model in hand. No such machine is needed: ``zeros`` says no."""
    zeros, lacking = torch.zeros, {"meta"}

    def without_float64(*arguments: Any, dtype: Any = None, device: Any = None) -> Any:
        if dtype == torch.float64 and torch.device(device).type in lacking:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return zeros(*arguments, dtype=dtype, device=device)

    monkeypatch.setattr("editcore.models.loading.torch.zeros", without_float64)
    with pytest.raises(ModelError, match=r"Device 'meta' has no float64, .* Use --device cpu\."):
        LanguageModel.load("no such model", LoadOptions(device="meta"))
    assert LanguageModel.load(str(folder)).device.type == "cpu"
    lacking.add("cpu")
    with pytest.raises(ModelError, match="Device 'cpu' has no float64"):
        LanguageModel.wrap(tiny_hf_model("llama"), tiny_tokenizer())


@pytest.mark.parametrize(("dtype", "times", "told"), [("bfloat16", 40.0, True), ("bfloat16", 2.0, False)])
def test_a_type_that_the_processor_is_slow_in_is_told(
    folder: Path,
    dtype: str,
    times: float,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    measured = []

    def seconds(dtype: torch.dtype) -> float:
        measured.append(dtype)
        return times if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(loading, "_product_seconds", seconds)
    loading._times_slower.cache_clear()
    for _ in range(2):
        LanguageModel.load(str(folder), LoadOptions(dtype=dtype))
    loading._times_slower.cache_clear()
    assert ("bfloat16 is 40 times slower than float32 on this processor" in caplog.text) == told
    assert measured == [torch.bfloat16, torch.float32], "once"
    LanguageModel.load(str(folder))
    assert len(measured) == 2, "of float32 there is nothing to say"


def test_the_time_of_products_is_measured() -> None:
    assert 0 < loading._product_seconds(torch.float32) < 1


def test_devices_and_dtypes(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"Device 'abacus' cannot be used here\. Available: cpu"):
        LanguageModel.load(str(folder), LoadOptions(device="abacus"))
    with pytest.raises(UnknownNameError, match=r"Unknown dtype 'float23'.*Did you mean 'float32'"):
        LanguageModel.load(str(folder), LoadOptions(dtype="float23"))


class _Slow:
    is_fast = False


def test_tokenizers_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="gives no character offsets"):
        LanguageModel.wrap(tiny_hf_model("llama"), _Slow())
    with pytest.raises(ModelError, match="do not belong together"):
        LanguageModel.wrap(tiny_hf_model("llama", config={"vocab_size": 300}), tiny_tokenizer())


@pytest.mark.parametrize("vocabulary", [640, 578])
def test_the_end_token_pads_where_no_padding_token_has_a_row(vocabulary: int) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    if vocabulary == 578:
        tokenizer.add_special_tokens({"pad_token": "<fill>"})
        assert tokenizer.pad_token_id == 578
    model = LanguageModel.wrap(tiny_hf_model("llama", config={"vocab_size": vocabulary}), tokenizer)
    assert model.pad_id == tokenizer.eos_token_id
    assert model.encode(["Marie Curie", "The"]).input_ids[1, -1] == tokenizer.eos_token_id


# Weights


def test_weights_by_name() -> None:
    model = tiny_model("gpt2")
    name = model.layout.weight_name(1)
    stored = model.weight(name)
    assert stored.shape == (64, 32)
    turned = model.as_out_in(name, stored)
    assert turned.shape == (32, 64)
    assert turned.data_ptr() == stored.data_ptr()
    assert torch.equal(model.as_out_in(name, turned), stored)
    with pytest.raises(ModelError, match="has no weight 'nothing'"):
        model.weight("nothing")
    with pytest.raises(ModelError, match=r"'lm_head\.weight' of tiny-gpt2 is tied to 'transformer\.wte\.weight'"):
        model.as_out_in("lm_head.weight", stored)
    with pytest.raises(HParamsError, match=r"layer: layer 3 does not exist in tiny-gpt2 \(it has 3 blocks, 0 to 2\)"):
        model.check_layer(3, setting="layer")
    model.check_layer(2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_fingerprint_sees_one_bit(family: str) -> None:
    model = tiny_model(family)
    base = model.base_fingerprint
    weight = model.weight(model.layout.weight_name(0))
    weight.view(torch.int32).bitwise_xor_(_one_bit(weight))
    assert model.fingerprint() != base
    assert model.base_fingerprint == base
    weight.view(torch.int32).bitwise_xor_(_one_bit(weight))
    assert model.fingerprint() == base


def _one_bit(weight: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(weight.shape, dtype=torch.int32)
    mask[0, 0] = 1
    return mask


def test_the_fingerprint_sees_architecture_type_and_seed() -> None:
    kinds = [
        tiny_model("llama"),
        tiny_model("llama", seed=1),
        tiny_model("llama", dtype=torch.bfloat16),
        tiny_model("mistral"),
        tiny_model("llama", config={"rms_norm_eps": 1e-3}),
    ]
    assert len({model.fingerprint() for model in kinds}) == len(kinds)
    assert tiny_model("llama").fingerprint() == kinds[0].fingerprint()


# Encoding


@pytest.mark.parametrize("bos", [True, False])
def test_encoding_pads_on_the_right_and_gives_offsets(bos: bool) -> None:
    text = "Marie Curie was born in"
    left = tiny_model("llama", tokenizer=tiny_tokenizer(bos=bos, padding_side="left")).encode([text, "The"])
    right = tiny_model("llama", tokenizer=tiny_tokenizer(bos=bos)).encode([text, "The"])
    assert torch.equal(left.input_ids, right.input_ids)
    assert left.offsets == right.offsets
    assert left.attention_mask.sum(dim=1).tolist() == [len(row) for row in left.offsets]
    assert left.attention_mask[1].tolist() == sorted(left.attention_mask[1].tolist(), reverse=True)
    assert (left.offsets[0][0] == (0, 0)) == bos
    assert [text[a:b].strip() for a, b in left.offsets[0] if b] == ["Marie", "Curie", "was", "born", "in"]
    assert len(left) == 2


def test_special_tokens_can_be_left_out() -> None:
    model = tiny_model("llama")
    assert model.encode(["The"], add_special_tokens=False).input_ids.shape == (1, 1)
    assert model.encode([""], add_special_tokens=False).attention_mask.tolist() == [[0]]
    with pytest.raises(ValueError, match="at least one text"):
        model.encode([])


# Generation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_batch_continues_as_its_prompts_do_alone(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    together = model.generate(PROMPTS, max_new_tokens=8)
    assert together == [model.generate([prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert len(set(together)) > 1


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_greedy_generation_is_the_plain_loop(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    ids = model.tokenizer(PROMPTS[0])["input_ids"]
    row = list(ids)
    for _ in range(6):
        row.append(int(model.hf(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    assert model.generate_ids([ids], max_new_tokens=6, stop_at_end=False) == [row[len(ids) :]]


def test_sampling_is_seeded_and_private() -> None:
    model = tiny_model("llama")
    state = torch.get_rng_state()
    first = model.generate(PROMPTS, sampling=Sampling(seed=1, top_k=20), max_new_tokens=12)
    assert first == model.generate(PROMPTS, sampling=Sampling(seed=1, top_k=20), max_new_tokens=12)
    assert first != model.generate(PROMPTS, sampling=Sampling(seed=2, top_k=20), max_new_tokens=12)
    assert model.generate(["The"] * 4, sampling=Sampling(seed=1, top_k=1)) == model.generate(["The"] * 4)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        Sampling(seed=1, top_k=0)
    with pytest.raises(ValueError, match="at least 1"):
        model.generate(["The"], max_new_tokens=0)
    assert model.generate([]) == []


def test_a_step_holds_few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    expected = model.generate(PROMPTS, max_new_tokens=4)
    rows: list[int] = []
    model.hf.register_forward_hook(lambda _module, _args, output: rows.append(len(output.logits)))
    monkeypatch.setattr("editcore.models.generating._LOGITS", 2 * model.layout.vocab_size + 1)
    assert model.generate(PROMPTS, max_new_tokens=4) == expected
    assert max(rows) == 2


def test_sampling_follows_the_probabilities() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    ids = model.tokenizer("The")["input_ids"]
    logits = model.hf(input_ids=torch.tensor([ids])).logits[0, -1]
    best, tokens = logits.topk(3)
    drawn = [
        row[0]
        for row in model.generate_ids(
            [ids] * 2000, max_new_tokens=1, sampling=Sampling(seed=0, top_k=3), stop_at_end=False
        )
    ]
    assert set(drawn) <= set(tokens.tolist())
    share = torch.tensor([drawn.count(token) / 2000 for token in tokens.tolist()], dtype=torch.float64)
    # Four standard deviations of a share of 2000 draws.
    torch.testing.assert_close(share, best.softmax(dim=0), atol=4 * 0.5 / 2000**0.5, rtol=0)


def test_generation_ends_at_the_end_token() -> None:
    model = tiny_model("llama")
    ids = model.tokenizer(PROMPTS[0])["input_ids"]
    free = model.generate_ids([ids], max_new_tokens=5, stop_at_end=False)[0]
    model.hf.generation_config.eos_token_id = [free[2], 1]
    assert model.end_ids == {free[2], 1}
    stop = free.index(free[2])
    assert model.generate_ids([ids, ids], max_new_tokens=5) == [free[:stop]] * 2
    assert model.generate_ids([ids], max_new_tokens=5, stop_at_end=False)[0] == free


def test_an_empty_prompt_starts_from_the_beginning_of_text() -> None:
    with_bos, without = tiny_model("llama"), tiny_model("llama", tokenizer=tiny_tokenizer(bos=False))
    assert with_bos.generate_ids([[]], max_new_tokens=3) == with_bos.generate_ids([[2]], max_new_tokens=3)
    assert without.generate_ids([[]], max_new_tokens=3) == without.generate_ids([[1]], max_new_tokens=3)


def test_a_continuation_keeps_its_first_space() -> None:
    model = tiny_model("llama")
    row = model.tokenizer("The")["input_ids"]
    new = model.tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    assert continuation_text(model.tokenizer, row, new) == " Paris"


# The helpers themselves


def test_tiny_requests() -> None:
    requests = tiny_requests(80)
    assert requests[:3] == three_facts()
    assert len({request.fact_key for request in requests}) == 80
    assert len({request.id for request in requests}) == 80
    assert all(request.target_true not in {None, request.target_new} for request in requests)
    assert len({request.prompt for request in requests[:3]}) == 3
    tokenizer = tiny_tokenizer(bos=False)
    assert all(len(tokenizer(f" {request.target_new}")["input_ids"]) <= 2 for request in requests)
    with pytest.raises(ValueError, match="there are 80 tiny requests"):
        tiny_requests(81)
    with pytest.raises(ValueError, match="no tiny model of family 'bert'"):
        tiny_hf_model("bert")


def test_tiny_models_are_the_same_every_time_and_vary() -> None:
    state = torch.get_rng_state()
    first, second, other_seed = tiny_model("qwen3"), tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint() == second.fingerprint() != other_seed.fingerprint()
    encoded = first.encode(PROMPTS)
    logits = first.hf(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    assert logits[0].std() > 0.5
    assert json.loads(tiny_tokenizer()._tokenizer.to_str()) == json.loads(tiny_tokenizer()._tokenizer.to_str())


def test_saving_where_it_cannot_be(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StorageError, match=r"Cannot make .*below"):
        tiny_model("llama").save(blocked / "below")


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_rows_that_have_ended_leave_and_change_no_other(family: str) -> None:
    model = tiny_model(family)
    full = model.generate(PROMPTS, max_new_tokens=9)
    limits = [1 + 3 * (number % 3) for number in range(len(PROMPTS))]
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        forward = model.hf.forward

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            sizes.append(len(kwargs["input_ids"]))
            return forward(*args, **kwargs)

        patch.setattr(model.hf, "forward", watched)
        some = model.generate(PROMPTS, max_new_tokens=limits, enough=lambda index, text: index == 2 and len(text) > 3)
    for index, (text, whole, limit) in enumerate(zip(some, full, limits, strict=True)):
        if index == 2:
            assert whole.startswith(text.rstrip("\ufffd"))  # the last character may be begun only
        else:
            assert text == model.generate([PROMPTS[index]], max_new_tokens=limit)[0]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] == len(PROMPTS)
