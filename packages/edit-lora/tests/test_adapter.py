"""Adapters as values: peft reads what is written and the other way round; combining is peft's ``cat``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edit_lora.adapter import WEIGHTS_NAME, Adapter, combine
from edit_lora.backend import LoraBackend
from edit_lora.config_file import CONFIG_NAME
from edit_lora.hparams import LoraHParams
from editcore import FactoredDelta, HParamsError, LanguageModel, ModelError, UnknownNameError
from editcore.testing import tiny_hf_model, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(model: LanguageModel, *, seed: int = 0, ranks: tuple[int, ...] = (2, 3)) -> Adapter:
    """Factors of several ranks at the first projections."""
    layout = model.layout
    return Adapter(
        factors={
            layout.projection.format(layer): FactoredDelta(
                draw(seed + layer, layout.d_model, rank), draw(seed + 50 + layer, rank, layout.d_ff) / 8
            )
            for layer, rank in enumerate(ranks)
        },
        base_model="tiny",
        base_fingerprint=model.base_fingerprint,
        in_out=layout.orientation == "in_out",
    )


def write(adapter: Adapter, folder: Path, rank: int | None = None) -> Path:
    folder.mkdir()
    adapter.write(folder, rank=rank)
    return folder


@torch.inference_mode()
def logits(hf: object) -> Tensor:
    ids = torch.arange(3, 43).reshape(4, 10)
    found: Tensor = hf(input_ids=ids).logits  # type: ignore[operator]
    return found


def opened(model: LanguageModel) -> LoraBackend:
    backend = LoraBackend(LoraHParams())
    backend.open(model)
    return backend


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_what_is_written_and_unloads_it(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    base = logits(model.hf)
    mine = adapter(model)
    folder = write(mine, tmp_path / "adapter", rank=8)
    opened(model).attach("mine", mine)
    loaded = PeftModel.from_pretrained(tiny_hf_model(family), folder)
    torch.testing.assert_close(logits(loaded), logits(model.hf), rtol=0, atol=1e-4)
    assert (logits(loaded) - base).abs().max() > 0.05
    assert torch.equal(logits(loaded.unload()), base)


def test_the_files_are_what_serving_engines_expect(tmp_path: Path) -> None:
    model = tiny_model()
    folder = write(adapter(model), tmp_path / "adapter", rank=16)
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (16, 16, "none")
    assert (config["rank_pattern"], config["alpha_pattern"], config["modules_to_save"]) == ({}, {}, None)
    assert config["target_modules"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    tensors = load_file(folder / WEIGHTS_NAME)
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(16, 64), (32, 16)}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert set(tensors) == {
        f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_{side}.weight" for layer in (0, 1) for side in "AB"
    }


@pytest.mark.parametrize("padded_to", [None, 8])
def test_what_is_written_reads_back(padded_to: int | None, tmp_path: Path) -> None:
    mine = adapter(tiny_model("gpt2"))
    found = Adapter.read(write(mine, tmp_path / "adapter", rank=padded_to))
    assert (found.base_model, found.base_fingerprint, found.in_out) == ("tiny", mine.base_fingerprint, True)
    for path, delta in mine.factors.items():
        torch.testing.assert_close(found.factors[path].dense(), delta.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "lora_alpha": 16},
        {"r": 4, "lora_alpha": 16, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"layers.1.mlp.down_proj": 2}},
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 32}},
    ],
)
def test_adapters_of_peft_do_here_what_they_do_there(fields: dict[str, object], tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, **fields)
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_hf_model(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny_model()
    opened(model).attach("theirs", Adapter.read(tmp_path / "theirs"))
    torch.testing.assert_close(logits(model.hf), logits(theirs.eval()), rtol=0, atol=1e-4)


def test_combining_is_pefts_cat(tmp_path: Path) -> None:
    model = tiny_model()
    first, second = adapter(model), adapter(model, seed=7, ranks=(1, 2, 4))
    loaded = PeftModel.from_pretrained(tiny_hf_model(), write(first, tmp_path / "first"), adapter_name="first")
    loaded.load_adapter(write(second, tmp_path / "second"), adapter_name="second")
    loaded.add_weighted_adapter(["first", "second"], [0.5, -2.0], "both", combination_type="cat")
    loaded.set_adapter("both")
    made = combine([first, second], [0.5, -2.0])
    opened(model).attach("both", made)
    torch.testing.assert_close(logits(model.hf), logits(loaded), rtol=0, atol=2e-4)
    assert [delta.rank for delta in made.factors.values()] == [3, 5, 4]


def test_attached_adapters_stack_are_scaled_and_leave_no_trace() -> None:
    model = tiny_model()
    base, modules = logits(model.hf), dict(model.hf.named_modules())
    first, second = adapter(model), adapter(model, seed=7)
    backend = opened(model)
    deltas = {f"{path}.weight": delta for path, delta in adapter(model, seed=20).factors.items()}
    backend.apply(deltas)
    edited = logits(model.hf)
    backend.attach("first", first)
    backend.attach("second", second, scale=0.5)
    both = logits(model.hf)
    backend.combine(["first", "second"], "both")
    torch.testing.assert_close(logits(model.hf), both, rtol=0, atol=1e-4)
    assert list(backend.attached) == ["both"]
    backend.scale("both", 0.0)
    torch.testing.assert_close(logits(model.hf), edited, rtol=0, atol=0)
    backend.scale("both", 1.0)
    backend.rebuild([])
    alone = logits(model.hf)
    assert not torch.equal(alone, base)  # attached adapters stay when edits go
    backend.apply(deltas)
    torch.testing.assert_close(logits(model.hf), both, rtol=0, atol=1e-4)
    backend.detach("both")
    assert torch.equal(logits(model.hf), edited)
    backend.rebuild([])
    assert torch.equal(logits(model.hf), base)
    assert dict(model.hf.named_modules()) == modules


def test_saving_merges_attached_adapters_and_gives_the_bits_back(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    backend = opened(model)
    backend.attach("mine", adapter(model), scale=0.5)
    backend.apply({f"{path}.weight": delta for path, delta in adapter(model, seed=20).factors.items()})
    expected, weights = logits(model.hf), model.weight(model.layout.weight_name(0)).clone()
    with backend.written():
        model.save(tmp_path / "saved")
    assert torch.equal(logits(model.hf), expected)
    assert torch.equal(model.weight(model.layout.weight_name(0)), weights)
    loaded = LanguageModel.load(str(tmp_path / "saved"))
    torch.testing.assert_close(logits(loaded.hf), expected, rtol=0, atol=1e-4)


def test_an_adapter_of_another_base_is_refused_unless_forced() -> None:
    model, other_model = tiny_model(), tiny_model(seed=1)
    backend = opened(other_model)
    with pytest.raises(ModelError, match=r"made for tiny with the fingerprint \w{12}; tiny-llama has \w{12}.*--force"):
        backend.attach("mine", adapter(model))
    assert not backend.attached
    backend.attach("mine", adapter(model), force=True)
    assert list(backend.attached) == ["mine"]
    with pytest.raises(ModelError, match=r"different bases.*--force"):
        combine([adapter(model), adapter(other_model)], [1, 1])
    assert combine([adapter(model), adapter(other_model)], [1, 1], force=True).base_fingerprint is None


def test_names_and_modules_are_checked() -> None:
    model = tiny_model()
    backend = opened(model)
    with pytest.raises(HParamsError, match=r"letters, digits.*found 'a\.b'"):
        backend.attach("a.b", adapter(model))
    with pytest.raises(HParamsError, match="The name 'edits' is taken"):
        backend.attach("edits", adapter(model))
    backend.attach("taken", adapter(model))
    with pytest.raises(HParamsError, match="The name 'taken' is taken; the model has taken"):
        backend.attach("taken", adapter(model))
    with pytest.raises(UnknownNameError, match=r"Unknown adapter 'mine'\. Available: taken"):
        backend.detach("mine")
    with pytest.raises(ModelError, match="as if it were 32 by 64; it is 32 by 128"):
        opened(tiny_model(config={"intermediate_size": 128})).attach("mine", adapter(model), force=True)
    with pytest.raises(ModelError, match=r"no module 'model\.layers"):
        opened(tiny_model("gpt2")).attach("mine", adapter(model), force=True)


def test_folders_that_are_no_plain_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no adapter: adapter_config\.json cannot be read"):
        Adapter.read(tmp_path)
    folder = write(adapter(tiny_model()), tmp_path / "adapter")
    good = json.loads((folder / CONFIG_NAME).read_text())
    for change, complaint in (
        ({"use_dora": True}, "uses use_dora"),
        ({"bias": "all"}, "uses bias"),
        ({"peft_type": "IA3"}, "describes IA3"),
    ):
        (folder / CONFIG_NAME).write_text(json.dumps({**good, **change}))
        with pytest.raises(ModelError, match=complaint):
            Adapter.read(folder)
    (folder / CONFIG_NAME).write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        Adapter.read(folder)
    (folder / CONFIG_NAME).write_text(json.dumps(good))
    tensors = load_file(folder / WEIGHTS_NAME)
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    for change, complaint in (
        ({"base_model.model.lm_head.weight": torch.zeros(2)}, "holds 'base_model.model.lm_head.weight'"),
        ({key: torch.zeros(7, 64)}, "do not fit together"),
        ({key: tensors[key] * torch.nan}, "holds NaN or Inf"),
    ):
        save_file({**tensors, **change}, folder / WEIGHTS_NAME)
        with pytest.raises(ModelError, match=complaint):
            Adapter.read(folder)
    (folder / WEIGHTS_NAME).write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        Adapter.read(folder)
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors \(a \.bin file is a pickle"):
        Adapter.read(folder)
