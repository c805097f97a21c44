"""What a saved folder holds: whole or not at all, in the type of its base, readable by an older transformers too."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import (
    FactoredDelta,
    HParamsError,
    LanguageModel,
    LoadOptions,
    ModelError,
    Plugins,
    StorageError,
    UnknownNameError,
)
from editcore.cli.options import refuse_used_save
from editcore.interfaces.changes import Written
from editcore.models import CATALOGUE, EditedModel, HubModel, rounded
from editcore.models.card import model_card
from editcore.models.saving import both_forms
from editcore.models.sources import hub_model, look_at, refuse_quantised
from editcore.runs import RawBackend
from editcore.settings.presets import model_stem
from editcore.testing import tiny_hf_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


@torch.inference_mode()
def logits(hf: Any) -> Tensor:
    found: Tensor = hf(input_ids=torch.arange(3, 43).reshape(4, 10)).logits
    return found


def saved(model: LanguageModel, folder: Path) -> Path:
    model.save(folder)
    return folder


# For transformers 4

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
OLDER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {"rope_theta": 1e5}),
    (
        "llama",
        {"rope_parameters": LLAMA_3},
        {"rope_theta": 5e5, "rope_scaling": {name: value for name, value in LLAMA_3.items() if name != "rope_theta"}},
    ),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, {"rope_theta": 2e4}),
    (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 3e4, "rotary_pct": 0.5},
    ),
    (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
        {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
]
"""Of each family what transformers 4.51 reads: the arguments of its configuration class, read in its code."""


@pytest.mark.parametrize(("family", "config", "older"), OLDER)
def test_the_configuration_says_what_transformers_4_reads(
    family: str, config: dict[str, Any], older: Mapping[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family, config=config)
    folder = saved(model, tmp_path / "saved")
    found = read(folder)
    assert {name: found.get(name) for name in older} == older
    assert (found["torch_dtype"], found["dtype"]) == ("float32", "float32")
    again = LanguageModel.load(str(folder))
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(logits(again.hf), logits(model.hf))
    twice = read(saved(again, tmp_path / "twice"))
    assert twice == found


def test_what_only_an_older_transformers_reads_of_the_base_is_kept(tmp_path: Path) -> None:
    folder = saved(tiny_model(), tmp_path / "base")
    config = read(folder)
    del config["rope_parameters"]
    older = {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}}  # as some families insist on
    (folder / "config.json").write_text(json.dumps({**config, **older}))
    model = LanguageModel.load(str(folder))
    found = read(saved(model, tmp_path / "saved"))
    assert {name: found[name] for name in older} == older
    assert found["rope_parameters"]["rope_theta"] == 2e4
    again = LanguageModel.load(str(tmp_path / "saved"))
    assert torch.equal(logits(again.hf), logits(model.hf))
    assert again.fingerprint() == model.fingerprint()


def test_nested_configurations_are_written_in_both_forms() -> None:
    inner = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    found = both_forms({"model_type": "outer", "text_config": inner, "rope_theta": 1.0})
    assert found["text_config"]["rope_theta"] == 7.0
    assert found["rope_theta"] == 1.0


def test_the_tokenizer_has_a_class_that_transformers_4_knows(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<one>"]})
    hf = tiny_hf_model(config={"vocab_size": len(tokenizer)})
    folder = saved(LanguageModel.wrap(hf, tokenizer), tmp_path / "saved")
    config = read(folder, "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<one>"]
    assert "extra_special_tokens" not in config  # a dict in transformers 4
    again = AutoTokenizer.from_pretrained(folder)
    text = "Marie <one> Curie\n naïve"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.all_special_tokens == tokenizer.all_special_tokens


def test_the_card_names_base_and_versions(tmp_path: Path) -> None:
    card = (saved(tiny_model(), tmp_path / "saved") / "README.md").read_text(encoding="utf-8")
    for name in ("editcore", "transformers", "torch"):
        assert f"{name} {version(name)}" in card
    assert "| read by | transformers 5, and transformers 4 from 4.51 on where" in card
    assert "base_model:" not in card  # of a model in hand nobody else finds the base
    hub = HubModel("org/name", "abc")
    card = model_card("mine", base="smollm2-135m", hub=hub, fingerprint="f", dtype=torch.bfloat16)
    assert "base_model: org/name\n" in card
    assert "| its revision | abc |" in card
    assert "| its name in editcore | smollm2-135m |" in card
    assert "| type | bfloat16 |" in card


def test_untied_weights_are_said_to_be_untied(tmp_path: Path) -> None:
    """transformers 5 does not tie two weights that a folder has, though its configuration says so; 4 does."""
    folder = saved(tiny_model(config={"tie_word_embeddings": True}), tmp_path / "base")
    assert read(folder)["tie_word_embeddings"] is True
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    model = LanguageModel.load(str(folder))
    folder = saved(model, tmp_path / "saved")
    assert read(folder)["tie_word_embeddings"] is False
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], head)


# Whole or not at all


@contextmanager
def masked(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(mask: int, tmp_path: Path) -> None:
    with masked(mask):
        folder = saved(tiny_model(), tmp_path / "saved")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 & ~mask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes.keys() >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert set(modes.values()) == {0o644 & ~mask}


def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with monkeypatch.context() as patch:
        patch.setattr(model.tokenizer, "save_pretrained", lambda _folder: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(StorageError, match=r"Cannot make .*saved: full"):
            model.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    model.save(tmp_path / "saved")
    with pytest.raises(StorageError, match="is already there"):
        model.save(tmp_path / "saved")


# The type of the weights


def edited(model: LanguageModel, changes: Mapping[str, FactoredDelta]) -> EditedModel:
    plugins = Plugins.load()
    backend = RawBackend()
    backend.open(model)
    made = EditedModel(model, backend, spec=plugins.backend("raw"), plugins=plugins)
    made.apply(Written(changes=dict(changes)))
    return made


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_folder_keeps_the_type_of_its_base_and_sums_are_rounded_once(stored: torch.dtype, tmp_path: Path) -> None:
    base = tiny_model(dtype=stored)
    address = base.layout.weight_name(1)
    half = torch.finfo(stored).eps / 2  # 1 + half is between two numbers; only the small rest says which is nearer
    with torch.no_grad():
        base.weight(address)[0, 0] = 1.0
    folder = saved(base, tmp_path / "base")
    assert read(folder)["torch_dtype"] == str(stored).removeprefix("torch.")
    model = LanguageModel.load(str(folder))
    assert model.dtype == torch.float32
    left, right = torch.zeros(32, 1, dtype=torch.float64), torch.zeros(1, 64, dtype=torch.float64)
    left[0], left[1] = 1.0, 0.3
    right[0, 0], right[0, 1] = half + 2.0**-40, 0.7
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    made = edited(model, {address: FactoredDelta(left, right)})
    bits = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    made.save(tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {stored}
    expected = rounded(base.weight(address).double() + left @ right, stored)
    assert torch.equal(found[address], expected)
    assert expected[0, 0] == 1 + 2 * half
    assert all(torch.equal(found[name], tensor) for name, tensor in base.hf.state_dict().items() if name != address)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.hf.state_dict().items())
    assert {tensor.dtype for tensor in model.hf.state_dict().values()} == {torch.float32}
    made.save(tmp_path / "asked", dtype="float32")
    asked = load_file(tmp_path / "asked" / "model.safetensors")
    assert torch.equal(asked[address], bits[address])
    made.rebuild([])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.hf.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float64_is_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    middle = torch.tensor([1, 1, 1, -1], dtype=torch.float64) * (1 + step / 2)
    little = torch.tensor([1, -1, 0, -1], dtype=torch.float64) * 2.0**-45
    assert rounded(middle + little, dtype).tolist() == [1 + step, 1.0, 1.0, -1 - step]
    numbers = torch.linspace(-3, 3, 999, dtype=torch.float64)
    assert torch.equal(rounded(numbers, dtype), numbers.to(dtype))  # away from the middle torch is right
    assert rounded(numbers, dtype).dtype == dtype


def test_a_tensor_that_the_folder_has_in_full_is_not_rounded(tmp_path: Path) -> None:
    folder = saved(tiny_model(dtype=torch.bfloat16), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.linspace(0.9, 1.1, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = LanguageModel.load(str(folder))
    made = edited(model, {model.layout.weight_name(0): FactoredDelta(torch.ones(32, 1), torch.ones(1, 64))})
    made.save(tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(found["model.norm.weight"], tensors["model.norm.weight"])
    assert found[model.layout.weight_name(0)].dtype == torch.bfloat16
    made.save(tmp_path / "asked", dtype="bfloat16")
    assert load_file(tmp_path / "asked" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_a_model_that_was_loaded_in_a_smaller_type_is_saved_in_it(tmp_path: Path) -> None:
    folder = saved(tiny_model(), tmp_path / "base")
    edited(LanguageModel.load(str(folder), LoadOptions(dtype="bfloat16")), {}).save(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    with pytest.raises(UnknownNameError, match="Unknown dtype 'bf16'"):
        edited(LanguageModel.load(str(folder)), {}).save(tmp_path / "no", dtype="bf16")
    assert not (tmp_path / "no").exists()


def test_what_is_asked_of_saving_is_checked_at_once(tmp_path: Path) -> None:
    refuse_used_save(tmp_path / "new", "bfloat16")
    with pytest.raises(UnknownNameError, match="Unknown dtype 'bf16'"):
        refuse_used_save(tmp_path / "new", "bf16")
    with pytest.raises(HParamsError, match="--save-dtype is the type that --save DIR writes; give both"):
        refuse_used_save(None, "bfloat16")


# What a name stands for


@pytest.mark.parametrize(
    ("quantisation", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "awq"}, "quantised by awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes"),
        ({"quant_method": "fp8"}, "quantised by fp8"),
        ({"bits": 4}, "that are quantised, which"),
    ],
)
def test_a_quantised_folder_says_what_can_be_done(quantisation: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(), tmp_path / "base")
    config = read(folder)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    for act in (look_at, LanguageModel.load):
        with pytest.raises(ModelError, match=rf"{said}.*Edit the full-precision model.*as an adapter.*serve that"):
            act(str(folder))
    with pytest.raises(ModelError, match=said):  # as a hub id's, of a model with parts
        refuse_quantised({"text_config": {"quantization_config": quantisation}}, "org/name")
    refuse_quantised({"quantization_config": None}, "org/name")


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    for act in (look_at, LanguageModel.load):
        with pytest.raises(ModelError, match=r"is an adapter for org/base .*adapters merge .*editctl import .*RUN"):
            act(str(folder))
    (folder / "adapter_config.json").rename(saved(tiny_model(), tmp_path / "model") / "adapter_config.json")
    with pytest.raises(ModelError, match="is an adapter for org/base"):  # transformers would load it with its adapter
        LanguageModel.load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("content", "needed"), [(b"\x0a\x0e\x0a\x05<unk>", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_a_tokenizer_that_must_be_converted_names_what_it_needs(
    content: bytes, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny_model(), tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == needed else object())
    with pytest.raises(ModelError, match=rf"tokenizer\.model alone.*with {needed}.*pip install {needed}, or put"):
        look_at(str(folder))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    look_at(str(folder))


def test_a_snapshot_of_the_hub_s_cache_has_the_name_and_commit_of_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "models--openai-community--gpt2-xl" / "snapshots" / "607a30d"
    folder.parent.mkdir(parents=True)
    saved(tiny_model(), folder)
    assert model_stem(str(folder)) == "gpt2-xl"
    loaded = LanguageModel.load(str(folder))
    assert loaded.hub == HubModel("openai-community/gpt2-xl", "607a30d")
    card = (saved(loaded, tmp_path / "saved") / "README.md").read_text(encoding="utf-8")
    assert "base_model: openai-community/gpt2-xl\n" in card
    assert model_stem(str(tmp_path / "saved")) == "saved"
    assert LanguageModel.load(str(tmp_path / "saved")).hub is None


def test_every_model_of_the_catalogue_names_one_that_everybody_can_resolve() -> None:
    for name, entry in CATALOGUE.items():
        found = hub_model(name)
        assert found is not None
        assert (found.id, found.revision) == (entry.hub_id, entry.hub_revision)
        assert found.id.count("/") == 1
    assert hub_model("org/name", "abc") == HubModel("org/name", "abc")
    assert hub_model("./folder/that/is/gone") is None
