"""Layouts: found in every family, and refused when they do not fit what the model does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from editcore import ModelError
from editcore.models import LanguageModel, ModelLayout, check_layout, detect_layout
from editcore.testing import TINY_FAMILIES, TINY_MOE_FAMILIES, tiny_hf_model, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModel

PROJECTIONS = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "gpt_neo": "transformer.h.{}.mlp.c_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "phi": "model.layers.{}.mlp.fc2",
    "starcoder2": "model.layers.{}.mlp.c_proj",
    "mpt": "transformer.blocks.{}.ffn.down_proj",
}
POST_NORM = {"gemma2", "gemma3_text", "olmo2"}
VARIANTS = {
    "opt with a norm after the addition": ("opt", {"do_layer_norm_before": False}),
    "opt with a narrow embedding": ("opt", {"word_embed_proj_dim": 16}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, sequential": ("falcon", {"parallel_attn": False, "bias": True, "alibi": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "cohere with query norms": ("cohere", {"use_qk_norm": True}),
    "llama with biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_is_found_and_passes_the_check(family: str) -> None:
    hf = tiny_hf_model(family)
    layout = detect_layout(hf)
    check_layout(hf, layout)
    assert layout.projection == PROJECTIONS.get(family, "model.layers.{}.mlp.down_proj")
    assert layout.blocks == layout.projection.partition(".{}")[0] + ".{}"
    assert (layout.num_layers, layout.d_model, layout.vocab_size) == (3, 32, 640)
    assert layout.d_ff == (128 if family in {"bloom", "mpt"} else 64)
    assert layout.orientation == ("in_out" if family == "gpt2" else "out_in")
    assert layout.norm_placement == ("post" if family in POST_NORM else "pre")
    assert layout.residual_scale == (0.5 if family == "granite" else 1.0)
    assert hf.get_submodule(layout.head) is hf.get_output_embeddings()
    assert "norm" in type(hf.get_submodule(layout.final_norm)).__name__.lower()
    module = hf.get_submodule(layout.projection.format(2))
    assert layout.has_bias == (getattr(module, "bias", None) is not None)
    assert hf.state_dict()[layout.weight_name(2)].data_ptr() == module.weight.data_ptr()
    assert layout.layer_of(layout.weight_name(2)) == 2


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_delta_in_out_in_changes_the_projection_by_delta_times_its_input(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    layout = model.layout
    name = layout.weight_name(1)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = model.projection(1).register_forward_hook(
        lambda _module, args, output: seen.append((args[0].clone(), output.clone()))
    )
    encoded = model.encode(["Marie Curie was born in"])
    model.hf(input_ids=encoded.input_ids)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(layout.d_model, 1, generator=generator, dtype=torch.float64)
    right = torch.randn(1, layout.d_ff, generator=generator, dtype=torch.float64)
    model.as_out_in(name, model.weight(name)).add_(left @ right)
    model.hf(input_ids=encoded.input_ids)
    handle.remove()
    (key, before), (same_key, after) = seen
    assert torch.equal(key, same_key)
    torch.testing.assert_close(after - before, key @ right.T @ left.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_families(variant: str) -> None:
    family, config = VARIANTS[variant]
    hf = tiny_hf_model(family, config=config)
    layout = detect_layout(hf)
    check_layout(hf, layout)
    assert layout.projection == PROJECTIONS.get(family, "model.layers.{}.mlp.down_proj")


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_one_block_and_a_square_projection(family: str) -> None:
    hf = tiny_hf_model(family, num_layers=1, d_ff=32)
    layout = detect_layout(hf)
    check_layout(hf, layout)
    assert layout.num_layers == 1
    assert layout.projection == PROJECTIONS.get(family, "model.layers.{}.mlp.down_proj")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "granite", "falcon"])
def test_other_number_types(family: str, dtype: torch.dtype) -> None:
    hf = tiny_hf_model(family, dtype=dtype)
    layout = detect_layout(hf)
    check_layout(hf, layout)
    assert layout.residual_scale == pytest.approx(0.5 if family == "granite" else 1.0, rel=0.02)


@pytest.mark.parametrize("family", TINY_MOE_FAMILIES)
def test_mixtures_of_experts_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match="mixture-of-experts models are not supported yet"):
        detect_layout(tiny_hf_model(family))


@pytest.mark.parametrize(
    ("family", "output"),
    [
        ("llama", "self_attn.o_proj"),
        ("gpt2", "attn.c_proj"),
        ("phi", "self_attn.dense"),  # parallel: attention, too, is added to the residual stream as it is
        ("cohere", "self_attn.o_proj"),
        ("gptj", "attn.out_proj"),
        ("gemma3_text", "self_attn.o_proj"),
        ("opt", "self_attn.out_proj"),
    ],
)
def test_an_attention_output_projection_is_refused(family: str, output: str) -> None:
    hf = tiny_hf_model(family, d_ff=32)
    layout = detect_layout(hf)
    path = f"{layout.blocks}.{output}"
    wrong = replace(layout, projection=path, has_bias=hf.get_submodule(path.format(0)).bias is not None)
    with pytest.raises(ModelError, match="is not an MLP output projection"):
        check_layout(hf, wrong)


def test_an_up_projection_is_refused() -> None:
    hf = tiny_hf_model("llama", d_ff=32)
    layout = detect_layout(hf)
    with pytest.raises(ModelError, match="is not an MLP output projection"):
        check_layout(hf, replace(layout, projection="model.layers.{}.mlp.up_proj"))


@pytest.mark.parametrize(("family", "orientation"), [("llama", "in_out"), ("gpt2", "out_in")])
def test_the_wrong_orientation_of_a_square_weight_is_refused(family: str, orientation: str) -> None:
    hf = tiny_hf_model(family, d_ff=32)
    layout = detect_layout(hf)
    assert layout.d_model == layout.d_ff
    with pytest.raises(ModelError, match="stores its weight"):
        check_layout(hf, replace(layout, orientation=orientation))


class _Backwards(nn.Linear):
    """Says it is a linear module and multiplies by the transpose."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight


def test_a_module_that_does_not_do_what_its_class_says_is_refused() -> None:
    hf = tiny_hf_model("llama", d_ff=32)
    for block in hf.model.layers:
        module = _Backwards(32, 32, bias=False)
        module.weight = block.mlp.down_proj.weight
        block.mlp.down_proj = module
    with pytest.raises(ModelError, match="does not do what its weight says"):
        check_layout(hf, detect_layout(hf))


class _Unknown(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T


def test_an_unknown_module_class_is_not_guessed() -> None:
    hf = tiny_hf_model("llama")
    for block in hf.model.layers:
        block.mlp.down_proj = _Unknown(block.mlp.down_proj)
    with pytest.raises(ModelError, match="Found none for the MLP output projection"):
        detect_layout(hf)
    with pytest.raises(ModelError, match="will not guess"):
        detect_layout(hf, overrides={"projection": "model.layers.{}.mlp.down_proj"})


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma3_text", {"norm_placement": "pre", "post_norm": ""}),
        ("olmo2", {"norm_placement": "pre", "post_norm": ""}),
        ("gemma2", {"post_norm": "model.layers.{}.post_attention_layernorm"}),
        ("llama", {"norm_placement": "post", "post_norm": "model.layers.{}.post_attention_layernorm"}),
    ],
)
def test_the_wrong_norm_placement_is_refused(family: str, change: dict[str, str]) -> None:
    hf = tiny_hf_model(family)
    with pytest.raises(ModelError, match="between the MLP output projection and the residual stream"):
        check_layout(hf, replace(detect_layout(hf), **change))


def test_the_wrong_residual_scale_is_refused() -> None:
    hf = tiny_hf_model("granite")
    with pytest.raises(ModelError, match="do not add up"):
        check_layout(hf, replace(detect_layout(hf), residual_scale=1.0))


def test_a_block_that_does_more_than_add_is_refused() -> None:
    hf = tiny_hf_model("llama")
    hf.model.layers[1].register_forward_hook(lambda _module, _args, output: torch.tanh(output))
    with pytest.raises(ModelError, match="do not add up"):
        check_layout(hf, detect_layout(hf))


def test_the_wrong_final_norm_is_refused() -> None:
    hf = tiny_hf_model("llama")
    with pytest.raises(ModelError, match="do not reproduce the logits"):
        check_layout(hf, replace(detect_layout(hf), final_norm=""))


def test_blocks_that_differ_are_refused() -> None:
    hf = tiny_hf_model("llama")
    hf.model.layers[2].mlp = tiny_hf_model("llama", d_ff=48).model.layers[0].mlp
    with pytest.raises(ModelError, match=r"The blocks .* differ: block 0 .* block 2"):
        detect_layout(hf)


def test_a_model_without_head_is_refused() -> None:
    config = tiny_hf_model("llama").config
    with pytest.raises(ModelError, match="no output embedding"):
        detect_layout(AutoModel.from_config(config))


def test_a_family_may_name_the_modules() -> None:
    hf = tiny_hf_model("llama")
    given = detect_layout(hf, overrides={"projection": "model.layers.{}.mlp.down_proj", "blocks": "model.layers.{}"})
    assert given == detect_layout(hf)
    with pytest.raises(ModelError, match="A model family may set blocks, projection"):
        detect_layout(hf, overrides={"projektion": "x"})
    with pytest.raises(ModelError, match=r"has no module 'model\.layers\.0\.mlp\.nothing'"):
        detect_layout(hf, overrides={"projection": "model.layers.{}.mlp.nothing"})


def test_a_family_speaks_for_its_model_types_only() -> None:
    families = {"llama": {"projection": "model.layers.{}.self_attn.o_proj"}}
    with pytest.raises(ModelError, match="is not an MLP output projection"):
        LanguageModel.wrap(tiny_hf_model("llama"), tiny_tokenizer(), families=families)
    LanguageModel.wrap(tiny_hf_model("mistral"), tiny_tokenizer(), families=families)


def test_weight_names_of_other_modules_are_refused() -> None:
    layout: ModelLayout = tiny_model("llama").layout
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight", "lm_head.weight"):
        with pytest.raises(ModelError, match="is not an MLP output projection of this model"):
            layout.layer_of(name)


def test_looking_leaves_the_model_as_it_was() -> None:
    hf = tiny_hf_model("falcon")
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    state = torch.get_rng_state()
    check_layout(hf, detect_layout(hf))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in hf.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in hf.modules())
    assert all(parameter.grad is None for parameter in hf.parameters())
