"""Every weight has one address, and is read as (out, in) whatever its module stores."""

from __future__ import annotations

import pytest
import torch
from editcore import FactoredDelta, ModelError
from editcore.models import add_changes, split_address
from editcore.models.weights import Weights
from editcore.testing import TINY_FAMILIES, tiny_hf_model, tiny_model
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from transformers import GptOssConfig, Llama4TextConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.pytorch_utils import Conv1D

WIDTH, HIDDEN = 8, 6


class Stack(nn.Module):
    """Three square matrices; says how it stores them if it is told to."""

    def __init__(self, is_transposed: bool | None = None) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, WIDTH, WIDTH))
        self.biases = nn.Parameter(torch.randn(3, WIDTH))
        if is_transposed is not None:
            self.is_transposed = is_transposed


class Parts(nn.Module):
    """What weights are found in. The head comes before the embedding that it is tied to."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        embedding = nn.Embedding(5, WIDTH)
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.head.weight = embedding.weight
        self.embedding = embedding
        for name, part in parts.items():
            setattr(self, name, part)
        self.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding


def weights_of(**parts: nn.Module) -> Weights:
    return Weights(Parts(**parts), model_name="m")


# Addresses


@settings(deadline=None)
@given(st.from_regex(r"[a-z_0-9]+(\.[a-z_0-9]+){0,4}", fullmatch=True), st.none() | st.integers(0, 10**6))
def test_an_address_is_a_name_and_perhaps_an_index(name: str, index: int | None) -> None:
    address = name if index is None else f"{name}[{index}]"
    assert split_address(address) == (name, index)


@pytest.mark.parametrize("address", ["", "[1]", "a[", "a[]", "a[x]", "a[-1]", "a[1][2]", "a[1].weight", "a]"])
def test_anything_else_is_no_address(address: str) -> None:
    with pytest.raises(ModelError, match=r"is not the address of a weight; one looks like 'name\.weight' or 'name"):
        split_address(address)
    with pytest.raises(ModelError, match="is not the address of a weight"):
        weights_of().stored(address)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_parameter_has_one_name_of_the_state_dict(family: str) -> None:
    model = tiny_model(family)
    names = model.weights.names()
    assert len(set(names)) == len(names)
    assert {id(model.weight(name)) for name in names} == {id(parameter) for parameter in model.hf.parameters()}
    assert {*names, *model.weights.tied()} == {name for name, _ in model.hf.named_parameters(remove_duplicate=False)}
    tied_head = model.hf.get_input_embeddings().weight is model.hf.get_output_embeddings().weight
    assert bool(model.weights.tied()) == tied_head
    for tied, canonical in model.weights.tied().items():
        assert model.weight(canonical) is model.hf.get_input_embeddings().weight
        with pytest.raises(ModelError, match=f"'{tied}' of tiny-{family} is tied to '{canonical}'"):
            model.weight(tied)
    for name in names:
        stored = model.weight(name)
        assert stored.data_ptr() == model.hf.state_dict()[name].data_ptr()
        turned = model.as_out_in(name, stored)
        assert turned.data_ptr() == stored.data_ptr()
        assert torch.equal(model.as_out_in(name, turned), stored)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("model.layers.1.mlp.down_proj.weigth", r" Did you mean 'model\.layers\.1\.mlp\.down_proj\.weight'\?"),
        ("model.layers.1.mlp.down_proj.weights[3]", r" Did you mean 'model\.layers\.1\.mlp\.down_proj\.weight'\?"),
        ("zzz", "$"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(asked: str, hint: str) -> None:
    name = asked.partition("[")[0]
    with pytest.raises(ModelError, match=rf"tiny-llama has no weight '{name}'\.{hint}"):
        tiny_model().weight(asked)


def test_names_are_those_from_before_a_module_was_wrapped() -> None:
    model = tiny_model()
    name = model.layout.weight_name(1)
    before = model.weight(name)
    mlp = model.hf.model.layers[1].mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj)
    assert name not in model.hf.state_dict()
    assert model.weight(name) is before


# How modules store


def test_a_matrix_is_what_it_does_to_a_vector() -> None:
    square, x = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    linear, conv = nn.Linear(WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
    with torch.no_grad():
        linear.weight.copy_(square)
        conv.weight.copy_(square)
    weights = weights_of(linear=linear, conv=conv)
    for name, module in (("linear", linear), ("conv", conv)):
        matrix = weights.as_out_in(f"{name}.weight", weights.stored(f"{name}.weight"))
        torch.testing.assert_close(matrix @ x + module.bias, module(x))
    assert torch.equal(weights.as_out_in("linear.weight", square), square)
    assert torch.equal(weights.as_out_in("conv.weight", square), square.T)


def test_an_embedding_takes_one_hot_tokens() -> None:
    weights = weights_of()
    stored = weights.stored("embedding.weight")
    matrix = weights.as_out_in("embedding.weight", stored)
    assert matrix.shape == (WIDTH, 5)
    for token in range(5):
        one_hot = torch.eye(5)[token]
        torch.testing.assert_close(matrix @ one_hot, stored[token])


def test_a_change_of_a_tied_embedding_reaches_both_ends() -> None:
    model = tiny_model("gpt2")
    name = "transformer.wte.weight"
    d_model, vocabulary = model.as_out_in(name, model.weight(name)).shape
    assert (d_model, vocabulary) == (32, 640)
    before = model.weight(name).clone()
    delta = FactoredDelta(torch.ones(d_model, 1), torch.eye(vocabulary)[7:8])
    add_changes(model, name, [delta])
    assert torch.equal(model.hf.get_output_embeddings().weight, model.weight(name))
    changed = (model.weight(name) != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [7]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_slice_is_stored_as_its_module_says(is_transposed: bool) -> None:
    stack = Stack(is_transposed)
    weights = weights_of(stack=stack)
    stored = weights.stored("stack.matrices[1]")
    assert stored.data_ptr() == stack.matrices[1].data_ptr(), "a view"
    turned = weights.as_out_in("stack.matrices[1]", stored)
    assert torch.equal(turned, stack.matrices[1].T if is_transposed else stack.matrices[1])
    whole = weights.stored("stack.matrices")
    assert weights.as_out_in("stack.matrices", whole) is whole, "a whole stack is as it is stored"
    bias = weights.stored("stack.biases[2]")
    assert torch.equal(weights.as_out_in("stack.biases[2]", bias), stack.biases[2])


def test_a_slice_of_a_module_that_does_not_say_is_not_guessed() -> None:
    weights = weights_of(stack=Stack())
    with pytest.raises(ModelError, match=r"'stack\.matrices' belongs to a Stack, which does not say whether"):
        weights.as_out_in("stack.matrices[0]", weights.stored("stack.matrices[0]"))
    bias = weights.stored("stack.biases[0]")
    assert weights.as_out_in("stack.biases[0]", bias) is bias


def gpt_oss() -> nn.Module:
    return GptOssExperts(GptOssConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=3))


def llama4() -> nn.Module:
    return Llama4TextExperts(Llama4TextConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=3))


@pytest.mark.parametrize("make", [gpt_oss, llama4])
def test_experts_that_store_in_out(make: object) -> None:
    assert callable(make)
    weights = weights_of(experts=make())
    for name, shape in (("gate_up_proj", (2 * HIDDEN, WIDTH)), ("down_proj", (WIDTH, HIDDEN))):
        address = f"experts.{name}[2]"
        assert weights.as_out_in(address, weights.stored(address)).shape == shape


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_that_store_out_in(family: str) -> None:
    weights = Weights(tiny_hf_model(family, d_ff=48), model_name="m")
    name = next(name for name in weights.names() if name.endswith("experts.down_proj"))
    d_model, d_ff = weights.stored(name).shape[1:]
    assert d_model == 32 != d_ff
    for index in range(4):
        address = f"{name}[{index}]"
        assert weights.as_out_in(address, weights.stored(address)).shape == (d_model, d_ff)


def test_vectors_and_single_numbers_are_as_they_are() -> None:
    model = tiny_model("gpt2")
    bias = model.weight("transformer.h.0.mlp.c_proj.bias")
    assert model.as_out_in("transformer.h.0.mlp.c_proj.bias", bias) is bias
    scale = nn.Module()
    scale.temperature = nn.Parameter(torch.tensor(0.5))
    weights = weights_of(scale=scale)
    assert weights.stored("scale.temperature").shape == ()
    assert weights.as_out_in("scale.temperature", weights.stored("scale.temperature")).shape == ()


# What is refused


def test_a_tied_weight_goes_by_the_name_of_the_embedding() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ModelError) as caught:
        model.weight("lm_head.weight")
    assert str(caught.value) == (
        "'lm_head.weight' of tiny-gpt2 is tied to 'transformer.wte.weight': they are one weight. Address it as "
        "'transformer.wte.weight'; a change reaches both ends."
    )
    with pytest.raises(ModelError, match="is tied to"):
        model.as_out_in("lm_head.weight[3]", torch.zeros(32))


def test_the_embedding_gives_the_name_though_the_head_comes_first() -> None:
    weights = weights_of()
    assert weights.names() == ("embedding.weight",)
    assert weights.tied() == {"head.weight": "embedding.weight"}


def test_other_tied_weights_go_by_the_first_name() -> None:
    one, two = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
    two.weight = one.weight
    weights = weights_of(one=one, two=two)
    assert weights.tied()["two.weight"] == "one.weight"
    assert weights_of(one=one, again=one).tied()["again.weight"] == "one.weight", "a module under two names"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_weights_of_integers_are_refused(dtype: torch.dtype) -> None:
    packed = nn.Module()
    packed.weight = nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
    weights = weights_of(packed=packed)
    kind = str(dtype).removeprefix("torch.")
    for address in ("packed.weight", "packed.weight[1]"):
        with pytest.raises(ModelError, match=rf"'packed\.weight' of m holds numbers of type {kind}; load the model"):
            weights.stored(address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("stack.matrices[3]", r"'stack\.matrices\[3\]' of m is not there: .* shape \(3, 8, 8\), with slices 0 to 2\."),
        ("linear.bias[0]", r"'linear\.bias' has the shape \(8,\) and no slices\."),
        ("scale.temperature[0]", r"'scale\.temperature' has the shape \(\) and no slices\."),
    ],
)
def test_a_slice_that_is_not_there(address: str, message: str) -> None:
    scale = nn.Module()
    scale.temperature = nn.Parameter(torch.tensor(0.5))
    weights = weights_of(stack=Stack(False), linear=nn.Linear(WIDTH, WIDTH), scale=scale)
    with pytest.raises(ModelError, match=message):
        weights.stored(address)


def test_a_slice_is_written_where_it_is() -> None:
    """Through its address, and nothing beside it."""

    class Model:
        def __init__(self, weights: Weights) -> None:
            self.weights, self.weight, self.as_out_in = weights, weights.stored, weights.as_out_in

    stack = Stack(True)
    model = Model(weights_of(stack=stack))
    before: Tensor = stack.matrices.clone()
    left, right = torch.randn(WIDTH, 1), torch.randn(1, WIDTH)
    add_changes(model, "stack.matrices[1]", [FactoredDelta(left, right)])  # type: ignore[arg-type]
    torch.testing.assert_close(stack.matrices[1], before[1] + (left @ right).T)
    assert torch.equal(stack.matrices[[0, 2]], before[[0, 2]])
