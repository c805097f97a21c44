"""Adapters of attention, embeddings and heads: peft reads what is written and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_lora.adapter import WEIGHTS_NAME, Adapter, combine
from edit_lora.backend import LoraBackend
from edit_lora.config_file import CONFIG_NAME
from edit_lora.hparams import LoraHParams
from edit_lora.targets import Targets, seen_from
from editcore import FactoredDelta, LanguageModel, ModelError
from editcore.testing import tiny_hf_model, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

PATHS = {
    "llama": ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj", "lm_head"),
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.h.0.attn.c_attn", "lm_head"),
}
both = pytest.mark.parametrize("family", ["llama", "gpt2"])
either = pytest.mark.parametrize("tied", [True, False])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(model: LanguageModel, *, seed: int = 0, rank: int = 3) -> Adapter:
    """Factors at all of ``PATHS``; tied ends are changed alike."""
    targets = Targets(model.hf)
    factors: dict[str, FactoredDelta] = {}
    embeddings, in_out = set(), False
    for number, path in enumerate(PATHS[str(model.hf.config.model_type)]):
        here = targets.find(path)
        done = [end for end in targets.ends(path) if end.path in factors]
        delta = FactoredDelta(
            0.3 * draw(seed + number, here.shape[0], rank + number), 0.3 * draw(seed + 50, rank + number, here.shape[1])
        )
        factors[path] = seen_from(factors[done[0].path], done[0], here) if done else delta
        if here.kind == "embedding":
            embeddings.add(path)
        in_out = in_out or here.kind == "conv1d"
    return Adapter(
        factors=factors,
        base_model="tiny",
        base_fingerprint=model.base_fingerprint,
        in_out=in_out,
        embeddings=frozenset(embeddings),
    )


def opened(model: LanguageModel) -> LoraBackend:
    backend = LoraBackend(LoraHParams())
    backend.open(model)
    return backend


def write(made: Adapter, folder: Path) -> Path:
    folder.mkdir()
    made.write(folder)
    return folder


@torch.inference_mode()
def logits(hf: Any) -> Tensor:
    found: Tensor = hf(input_ids=torch.arange(3, 43).reshape(4, 10)).logits
    return found


def pair(family: str, tied: bool) -> tuple[LanguageModel, Any]:
    """A model and the same in plain transformers."""
    config = {"tie_word_embeddings": tied}
    return tiny_model(family, config=config), tiny_hf_model(family, config=config)


@both
@either
def test_peft_loads_every_kind_of_module_and_unloads_it(family: str, tied: bool, tmp_path: Path) -> None:
    model, plain = pair(family, tied)
    base = logits(model.hf)
    mine = adapter(model)
    folder = write(mine, tmp_path / "adapter")
    opened(model).attach("mine", mine)
    loaded = PeftModel.from_pretrained(plain, folder)
    torch.testing.assert_close(logits(loaded), logits(model.hf), rtol=0, atol=2e-4)
    assert (logits(loaded) - base).abs().max() > 0.05
    assert torch.equal(logits(loaded.unload()), base)


@both
def test_embeddings_have_the_names_and_shapes_of_peft(family: str, tmp_path: Path) -> None:
    model, _ = pair(family, True)
    folder = write(adapter(model), tmp_path / "adapter")
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert config["target_modules"] == sorted(PATHS[family])
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (5, 5, family == "gpt2")
    found = {
        key.removeprefix("base_model.model."): tuple(tensor.shape)
        for key, tensor in load_file(folder / WEIGHTS_NAME).items()
    }
    embedding, vocab = PATHS[family][0], model.layout.vocab_size
    assert found[f"{embedding}.lora_embedding_A"] == (5, vocab)
    assert found[f"{embedding}.lora_embedding_B"] == (32, 5)
    assert found["lm_head.lora_A.weight"] == (5, 32)
    assert found["lm_head.lora_B.weight"] == (vocab, 5)
    assert len(found) == 2 * len(PATHS[family])


@both
def test_every_kind_of_module_reads_back(family: str, tmp_path: Path) -> None:
    model, _ = pair(family, True)
    mine = adapter(model)
    found = Adapter.read(write(mine, tmp_path / "adapter"))
    assert (found.embeddings, found.in_out, found.copies) == (mine.embeddings, mine.in_out, {})
    found.check_modules(Targets(model.hf))
    for path, delta in mine.factors.items():
        torch.testing.assert_close(found.factors[path].dense(), delta.dense(), rtol=1e-5, atol=1e-6)


TARGETS = {"llama": ["embed_tokens", "q_proj", "lm_head"], "gpt2": ["wte", "c_attn", "c_proj", "lm_head"]}


def theirs(family: str, tied: bool, folder: Path, **fields: Any) -> Any:
    """An adapter of peft's own making, saved."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[family], init_lora_weights=False, **fields)
    made = get_peft_model(pair(family, tied)[1], config)
    made.save_pretrained(folder)
    return made.eval()


@both
@either
def test_adapters_of_peft_do_here_what_they_do_there(family: str, tied: bool, tmp_path: Path) -> None:
    made = theirs(family, tied, tmp_path / "theirs")
    model, _ = pair(family, tied)
    found = Adapter.read(tmp_path / "theirs")
    assert found.embeddings == {PATHS[family][0]}
    assert "lm_head" in found.copies  # peft puts the base's own weights beside the factors
    backend = opened(model)
    backend.attach("theirs", found)
    torch.testing.assert_close(logits(model.hf), logits(made), rtol=0, atol=2e-4)
    again = Adapter.read(write(found, tmp_path / "again"))
    assert again.copies.keys() == found.copies.keys()


def test_weights_beside_an_adapter_that_are_not_the_base_s_are_refused(tmp_path: Path) -> None:
    theirs("llama", False, tmp_path / "theirs")
    file = tmp_path / "theirs" / WEIGHTS_NAME
    tensors = load_file(file)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, key: tensors[key] + 1e-3}, file)
    trained = Adapter.read(tmp_path / "theirs")
    model, _ = pair("llama", False)
    backend = opened(model)
    base = logits(model.hf)
    with pytest.raises(
        ModelError, match=r"brings a weight of its own for 'model\.embed_tokens', .* trained or resized"
    ):
        backend.attach("theirs", trained, force=True)
    assert torch.equal(logits(model.hf), base)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"different weights for 'model\.embed_tokens'"):
        combine([trained, Adapter.read(tmp_path / "theirs")], [1, 1])


def test_an_adapter_that_peft_ties_itself_is_refused(tmp_path: Path) -> None:
    theirs("llama", True, tmp_path / "theirs", ensure_weight_tying=True)
    with pytest.raises(ModelError, match="uses ensure_weight_tying"):
        Adapter.read(tmp_path / "theirs")


@both
@either
def test_combined_adapters_do_what_they_do_together(family: str, tied: bool, tmp_path: Path) -> None:
    model, plain = pair(family, tied)
    first, second = adapter(model), adapter(model, seed=7)
    made = combine([first, second], [0.5, -2.0])
    assert (made.embeddings, made.in_out) == (first.embeddings, first.in_out)
    backend = opened(model)
    backend.attach("first", first, scale=0.5)
    backend.attach("second", second, scale=-2.0)
    apart = logits(model.hf)
    backend.combine(["first", "second"], "both")
    torch.testing.assert_close(logits(model.hf), apart, rtol=0, atol=2e-3)
    loaded = PeftModel.from_pretrained(plain, write(made, tmp_path / "made"))
    torch.testing.assert_close(logits(loaded), apart, rtol=0, atol=2e-3)
    embedding = next(iter(made.embeddings))
    as_linear = Adapter(factors={embedding: made.factors[embedding]}, base_model="tiny")
    with pytest.raises(ModelError, match=f"differ in the shape of '{embedding}'"):
        combine([made, as_linear], [1, 1])


@both
@either
def test_merging_writes_a_tied_weight_once(family: str, tied: bool, tmp_path: Path) -> None:
    model, _ = pair(family, tied)
    backend = opened(model)
    base = logits(model.hf)
    backend.attach("mine", adapter(model), scale=0.5)
    embedding = f"{PATHS[family][0]}.weight"
    backend.apply({embedding: FactoredDelta(draw(1, 32, 2) / 4, draw(2, 2, model.layout.vocab_size) / 4)})
    expected, bits = logits(model.hf), model.weight(embedding).clone()
    with backend.written():
        hf = model.hf
        assert (hf.get_input_embeddings().weight is hf.get_output_embeddings().weight) is tied
        model.save(tmp_path / "saved")
    assert torch.equal(logits(model.hf), expected)
    assert torch.equal(model.weight(embedding), bits)
    loaded = LanguageModel.load(str(tmp_path / "saved"))
    torch.testing.assert_close(logits(loaded.hf), expected, rtol=0, atol=1e-3)
    backend.detach("mine")
    backend.rebuild([])
    assert torch.equal(logits(model.hf), base)


@both
@pytest.mark.parametrize("changed", ["embedding", "head", "both"])
def test_ends_of_a_tied_weight_that_are_changed_apart_are_written_untied(
    family: str, changed: str, tmp_path: Path
) -> None:
    """As peft has it: the ends may differ beside the weights. One weight cannot hold that, two can."""
    model, plain = pair(family, True)
    embedding = PATHS[family][0]
    whole = adapter(model)
    factors = {**whole.factors, "lm_head": adapter(model, seed=9).factors["lm_head"]}
    if changed != "both":
        kept = embedding if changed == "embedding" else "lm_head"
        factors = {kept: whole.factors[kept]}
    lora = Adapter(factors=factors, base_model="tiny", embeddings=whole.embeddings & set(factors), in_out=whole.in_out)
    base, backend = logits(model.hf), opened(model)
    backend.attach("one", lora)
    loaded = PeftModel.from_pretrained(plain, write(lora, tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model.hf), rtol=0, atol=2e-4)
    with pytest.raises(ModelError, match=r"one weight, which cannot hold both.*adapters merge.*not become an edit"):
        Targets(tiny_model(family, config={"tie_word_embeddings": True}).hf).one_per_weight(lora.factors)
    backend.apply({f"{embedding}.weight": FactoredDelta(draw(1, 32, 2) / 4, draw(2, 2, model.layout.vocab_size) / 4)})
    backend.attach("two", whole, scale=0.5)
    expected = logits(model.hf)
    with backend.written():
        model.save(tmp_path / "saved")
    assert torch.equal(logits(model.hf), expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=5e-4)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    assert again.get_input_embeddings().weight is not again.get_output_embeddings().weight
    assert {f"{embedding}.weight", "lm_head.weight"} <= load_file(tmp_path / "saved" / "model.safetensors").keys()
    for name in ("one", "two"):
        backend.detach(name)
    backend.rebuild([])
    assert model.hf.get_input_embeddings().weight is model.hf.get_output_embeddings().weight
    assert torch.equal(logits(model.hf), base)


def test_modules_of_another_kind_are_refused() -> None:
    model, _ = pair("llama", False)
    whole = adapter(model)
    backend = opened(model)
    bare = Adapter(factors=whole.factors, base_model="tiny")
    with pytest.raises(ModelError, match=r"changes 'model\.embed_tokens' as no embedding; it is an embedding"):
        backend.attach("bare", bare)
    head = Adapter(factors={"lm_head": whole.factors["lm_head"]}, base_model="tiny", embeddings=frozenset({"lm_head"}))
    with pytest.raises(ModelError, match="changes 'lm_head' as an embedding; it is no embedding"):
        backend.attach("head", head)
    turned = whole.factors["lm_head"]
    with pytest.raises(ModelError, match=r"'model\.embed_tokens' as if it were 640 by 32; it is 32 by 640"):
        backend.attach("turned", Adapter(factors={"model.embed_tokens": turned}, base_model="tiny"))
    norm = Adapter(factors={"model.norm": turned}, base_model="tiny")
    with pytest.raises(
        ModelError, match=r"'model\.norm' is a LlamaRMSNorm; adapters go onto nn\.Linear, Conv1D and nn"
    ):
        backend.attach("norm", norm)
    assert not backend.attached
