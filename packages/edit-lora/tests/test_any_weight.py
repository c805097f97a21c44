"""Changes of any matrix, thin or dense: in every family, at tied embeddings, on trial, cut, and what is refused."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edit_lora import backend as backend_module, factors
from edit_lora.adapter import EDITS, Adapter
from edit_lora.backend import LoraBackend
from edit_lora.hparams import LoraHParams
from editcore import (
    Attachment,
    AttachmentSpec,
    BackendContext,
    Changes,
    DenseDelta,
    FactoredDelta,
    HParamsError,
    LanguageModel,
    LoadOptions,
    ModelError,
    NumericalError,
    Plugins,
    VectorDelta,
    WeightChange,
    Written,
)
from editcore.models import EditedModel, add_changes
from editcore.runs.fit import check_fit
from editcore.second_moments import Metric
from editcore.testing import TINY_FAMILIES, tiny_hf_model, tiny_model, tiny_requests, tiny_tokenizer
from peft.tuners.lora import Embedding, LoraLayer
from torch import Tensor, nn

EMBEDDING = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
ATTENTION = {"llama": "model.layers.1.self_attn.v_proj.weight", "gpt2": "transformer.h.1.attn.c_attn.weight"}
both = pytest.mark.parametrize("family", ["llama", "gpt2"])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shape_of(model: LanguageModel, address: str) -> tuple[int, ...]:
    return tuple(model.as_out_in(address, model.weight(address)).shape)


def dense(model: LanguageModel, address: str, seed: int = 0, size: float = 0.1) -> DenseDelta:
    return DenseDelta(size * draw(seed, *shape_of(model, address)))


def thin(model: LanguageModel, address: str, rank: int = 2, seed: int = 0) -> FactoredDelta:
    d_out, d_in = shape_of(model, address)
    return FactoredDelta(0.2 * draw(seed, d_out, rank), 0.2 * draw(seed + 1, rank, d_in))


@torch.inference_mode()
def logits(model: LanguageModel) -> Tensor:
    encoded = model.encode([request.text for request in tiny_requests(4)])
    found: Tensor = model.hf(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    return found.double() * encoded.attention_mask[..., None]


def made(family: str, *, tied: bool | None = None, dtype: torch.dtype = torch.float64) -> LanguageModel:
    return tiny_model(family, dtype=dtype, config=None if tied is None else {"tie_word_embeddings": tied})


def opened(model: LanguageModel, **hparams: object) -> LoraBackend:
    def metrics(layers: Any) -> dict[int, Metric]:
        keys = draw(1, 256, model.layout.d_ff) * torch.logspace(0, -2, model.layout.d_ff, dtype=torch.float64)
        return {layer: Metric(keys.T @ keys / len(keys)) for layer in layers}

    backend = LoraBackend(LoraHParams.model_validate(hparams))
    backend.take(BackendContext(metrics=metrics))
    backend.open(model)
    return backend


def raw(model: LanguageModel, *active: Changes) -> LanguageModel:
    """The model with changes in its weights."""
    for changes in active:
        for address, change in changes.items():
            add_changes(model, address, [change])
    return model


def agree(found: Tensor, expected: Tensor, base: Tensor, tolerance: float = 1e-9) -> None:
    effect = float((expected - base).abs().max())
    assert effect > 0.01
    assert float((found - expected).abs().max()) <= tolerance * effect


# Every weight


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_matrix_of_every_family_can_be_changed(family: str) -> None:
    """But for embeddings of positions that count the positions themselves, which peft cannot wrap."""
    model = made(family)
    base, modules = logits(model), dict(model.hf.named_modules())
    backend = opened(model)
    matrices = [name for name in model.weights.names() if model.weight(name).ndim == 2]
    refused = []
    for seed, name in enumerate(matrices):
        change = dense(model, name, seed) if seed % 2 else thin(model, name, seed=seed)
        try:
            backend.apply({name: change})
        except ModelError as error:
            refused.append(str(error))
            continue
        agree(logits(model), logits(raw(made(family), {name: change})), base)
        backend.rebuild([])
    positions = "'model.decoder.embed_positions.weight' of OPTForCausalLM, a weight of a OPTLearnedPositionalEmbedding"
    assert [positions in message for message in refused] == ([True] if family == "opt" else [])
    assert torch.equal(logits(model), base)
    assert dict(model.hf.named_modules()) == modules


@both
@pytest.mark.parametrize("tied", [True, False])
def test_thin_and_dense_changes_add_up_at_any_weight(family: str, tied: bool) -> None:
    model = made(family, tied=tied)
    base, bits = logits(model), model.fingerprint()
    head = {} if tied else {"lm_head.weight": dense(model, "lm_head.weight", 5)}
    batches: list[Changes] = [
        {EMBEDDING[family]: thin(model, EMBEDDING[family]), ATTENTION[family]: dense(model, ATTENTION[family])},
        {EMBEDDING[family]: dense(model, EMBEDDING[family], 3), **head},
        {ATTENTION[family]: thin(model, ATTENTION[family], 3), model.layout.weight_name(1): dense(
            model, model.layout.weight_name(1), 4
        )},
    ]  # fmt: skip
    backend = opened(model)
    for count, changes in enumerate(batches, start=1):
        backend.apply(changes)
        agree(logits(model), logits(raw(made(family, tied=tied), *batches[:count])), base)
    statistics = backend.statistics()
    assert (statistics["kept_frobenius"], statistics["kept_weighted"], statistics["kept_keys"]) == (1.0, 1.0, 1.0)
    assert statistics["modules"] == 3 + len(head)
    backend.rebuild([batches[0], batches[2]])
    agree(logits(model), logits(raw(made(family, tied=tied), batches[0], batches[2])), base)
    backend.rebuild([])
    assert torch.equal(logits(model), base)
    assert model.fingerprint() == bits


def test_a_change_of_zeros_changes_nothing() -> None:
    model = made("llama")
    base, name = logits(model), ATTENTION["llama"]
    backend = opened(model)
    backend.apply({name: DenseDelta(torch.zeros(shape_of(model, name)))})
    assert torch.equal(logits(model), base)
    assert backend.statistics()["exact_rank"] == 1
    backend.apply({name: dense(model, name)})
    agree(logits(model), logits(raw(made("llama"), {name: dense(model, name)})), base)


def test_a_bf16_embedding_is_edited_in_float32() -> None:
    model = made("llama", dtype=torch.bfloat16)
    name, ids = EMBEDDING["llama"], torch.arange(3, 40)
    change = thin(model, name)
    exact = model.weight(name).double() + change.dense().T
    opened(model).apply({name: change})
    layer = model.hf.get_input_embeddings()
    assert isinstance(layer, Embedding)
    assert layer.lora_embedding_A[EDITS].dtype == torch.float32
    assert layer(ids).dtype == torch.bfloat16
    in_weight = raw(made("llama", dtype=torch.bfloat16), {name: change}).hf.get_input_embeddings()
    off, off_raw = ((module(ids).double() - exact[ids]).norm() for module in (layer, in_weight))
    assert off <= 1.5 * off_raw  # the row and what is added to it are rounded apart
    assert off <= 2**-7 * exact[ids].norm()


def test_embeddings_that_scale_their_rows_scale_the_change() -> None:
    model = made("gemma3_text")
    name, base = EMBEDDING["llama"], logits(model)
    assert type(model.hf.get_input_embeddings()) is not nn.Embedding
    change = dense(model, name)
    opened(model).apply({name: change})
    agree(logits(model), logits(raw(made("gemma3_text"), {name: change})), base)


def test_a_dense_change_is_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def counting(change: DenseDelta) -> FactoredDelta:
        seen.append(change.value)
        return factors.factored(change)

    monkeypatch.setattr(backend_module, "factored", counting)
    model = made("llama")
    name = ATTENTION["llama"]
    first, second = ({name: dense(model, name, seed)} for seed in (0, 1))
    backend = opened(model)
    backend.apply(first)
    with backend.trial(second):
        pass
    backend.apply(second)
    backend.rebuild([second])
    assert sum(value is first[name].value for value in seen) == 1
    assert 1 <= sum(value is second[name].value for value in seen) <= 2  # on trial, and for good
    assert list(backend._factors) == [id(second[name])]


# Tied embeddings


@both
def test_a_tied_weight_has_an_adapter_at_both_ends_and_is_written_once(family: str, tmp_path: Path) -> None:
    model = made(family, tied=True)
    name, base = EMBEDDING[family], logits(model)
    changes = {name: thin(model, name)}
    backend = opened(model)
    backend.apply(changes)
    ends = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    assert all(isinstance(end, LoraLayer) for end in ends)
    assert ends[0].lora_embedding_B[EDITS].shape == (32, 2)
    assert ends[0].lora_embedding_A[EDITS].shape == (2, model.layout.vocab_size)
    assert torch.equal(ends[1].lora_A[EDITS].weight, ends[0].lora_embedding_B[EDITS].T)
    assert torch.equal(ends[1].lora_B[EDITS].weight, ends[0].lora_embedding_A[EDITS].T)
    edited = logits(model)
    expected = raw(made(family, tied=True), changes)
    agree(edited, logits(expected), base)
    with backend.written():
        hf = model.hf
        assert hf.get_input_embeddings().weight is hf.get_output_embeddings().weight
        assert torch.equal(model.weight(name), expected.weight(name))
        model.save(tmp_path / "saved")
    assert torch.equal(logits(model), edited)
    loaded = LanguageModel.load(str(tmp_path / "saved"), LoadOptions(dtype="float64"))
    assert loaded.hf.get_input_embeddings().weight is loaded.hf.get_output_embeddings().weight
    assert torch.equal(loaded.weight(name), expected.weight(name))
    agree(logits(loaded), edited, base)
    backend.rebuild([])
    assert not any(isinstance(module, LoraLayer) for module in model.hf.modules())
    assert torch.equal(logits(model), base)


def test_alpha_and_scale_reach_both_ends() -> None:
    model = made("llama", tied=True)
    name, base = EMBEDDING["llama"], logits(model)
    change = thin(model, name)
    opened(model, lora_alpha=7.0, lora_scale=0.5).apply({name: change})
    agree(logits(model), logits(raw(made("llama", tied=True), {name: change.scaled(0.5)})), base)


def test_a_tied_weight_that_falls_back_is_raw_at_both_ends() -> None:
    model = made("llama", tied=True)
    name, base = EMBEDDING["llama"], logits(model)
    changes = {name: dense(model, name)}
    backend = opened(model, lora_rank=1, lora_residual_threshold=0.1, allow_fallback=True)
    backend.apply(changes)
    assert torch.equal(model.weight(name), raw(made("llama", tied=True), changes).weight(name))
    assert backend.statistics()["raw_modules"] == 1
    with backend.trial(changes):
        pass
    assert torch.equal(model.weight(name), raw(made("llama", tied=True), changes).weight(name))
    backend.rebuild([])
    assert torch.equal(logits(model), base)


def test_a_module_that_stands_twice_in_a_model_is_wrapped_at_both_places() -> None:
    def build() -> LanguageModel:
        hf = tiny_hf_model(dtype=torch.float64)
        hf.model.layers[2].self_attn.v_proj = hf.model.layers[1].self_attn.v_proj
        return LanguageModel.wrap(hf, tiny_tokenizer(), name="shared")

    model = build()
    name, base = ATTENTION["llama"], logits(model)
    changes = {name: dense(model, name)}
    backend = opened(model)
    backend.apply(changes)
    agree(logits(model), logits(raw(build(), changes)), base)
    backend.rebuild([])
    assert model.hf.model.layers[2].self_attn.v_proj is model.hf.model.layers[1].self_attn.v_proj
    assert torch.equal(logits(model), base)


# Beside attachments


class Doubling:
    """Puts a module around the one that is edited, as the backend does."""

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        self.attention: Any = model.hf.model.layers[1].self_attn
        self.inner = self.attention.v_proj
        self.attention.v_proj = Around(self.inner)

    def remove(self) -> None:
        assert self.attention.v_proj.inner is self.inner, "another one stands where this one was put"
        self.attention.v_proj = self.inner


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        doubled: Tensor = 2 * self.inner(hidden)
        return doubled


def test_an_attachment_may_wrap_the_module_that_the_backend_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "doubling", SimpleNamespace(Doubling=Doubling))  # type: ignore[misc]
    spec = AttachmentSpec("doubling", "doubling:Doubling", summary="Doubles values.")
    monkeypatch.setattr(Plugins, "attachment", lambda _self, _kind: spec)
    model, plugins = made("llama"), Plugins.load()
    name, base = ATTENTION["llama"], logits(model)
    edited = EditedModel(model, opened(model), spec=plugins.backend("lora"), plugins=plugins)
    first, second = (Written(changes={name: dense(model, name, seed)}) for seed in (0, 1))
    beside = Written(attachment=Attachment(kind="doubling"))
    for written in (first, beside, second):
        edited.apply(written)
    with edited.trial(Written(changes=first.changes, attachment=Attachment(kind="doubling"))):
        pass
    expected = made("llama")
    add_changes(expected, name, [first.changes[name], second.changes[name]])
    with torch.no_grad():
        expected.weight(name).mul_(2)
    agree(logits(model), logits(expected), base)
    edited.rebuild([])
    assert torch.equal(logits(model), base)
    assert type(model.hf.model.layers[1].self_attn.v_proj) is nn.Linear


# A bounded rank


@both
def test_a_cut_without_a_second_moment_keeps_most_of_the_change_and_says_so_once(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(family, tied=True)
    names = (EMBEDDING[family], ATTENTION[family])
    changes = {name: dense(model, name, seed) for seed, name in enumerate(names)}
    base = logits(model)
    backend = opened(model, lora_rank=4)
    with caplog.at_level(logging.WARNING, "edit_lora"):
        backend.apply(changes)
        backend.rebuild([changes])
        with backend.trial(changes):
            pass
    [told] = [record.getMessage() for record in caplog.records]
    assert f"{min(names)} is not an MLP output projection" in told
    assert "keeps the most of ‖Δ‖ there (lora_criterion frobenius)" in told
    best: dict[str, WeightChange] = {}
    kept = []
    for name, change in changes.items():
        left, values, right = torch.linalg.svd(change.value, full_matrices=False)
        best[name] = DenseDelta((left[:, :4] * values[:4]) @ right[:4])
        kept.append(float(values[:4].square().sum() / values.square().sum()))
    agree(logits(model), logits(raw(made(family, tied=True), best)), base)
    statistics = backend.statistics()
    assert statistics["kept_frobenius"] == pytest.approx(min(kept))
    assert (statistics["kept_weighted"], statistics["kept_keys"]) == (None, None)
    assert (statistics["rank"], statistics["exact_rank"]) == (4, 32)


def test_a_cut_as_it_was_asked_for_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    model = made("llama")
    with caplog.at_level(logging.WARNING, "edit_lora"):
        opened(model, lora_rank=4, lora_criterion="frobenius").apply(
            {ATTENTION["llama"]: dense(model, ATTENTION["llama"])}
        )
        exact = made("llama")
        opened(exact).apply({ATTENTION["llama"]: dense(exact, ATTENTION["llama"])})
        thinner = made("llama")
        opened(thinner, lora_rank=4).apply({ATTENTION["llama"]: thin(thinner, ATTENTION["llama"])})
    assert not caplog.records


def test_measures_of_a_projection_are_known_and_not_given_for_the_whole() -> None:
    """A cut projection has all three; beside a cut attention matrix they would pass for those of everything."""
    model = made("llama")
    projection = model.layout.weight_name(1)
    backend = opened(model, lora_rank=3)
    backend.apply({projection: thin(model, projection, 6)})
    alone = backend.statistics()
    assert all(0 < alone[name] < 1 for name in ("kept_frobenius", "kept_weighted", "kept_keys"))
    backend.apply({ATTENTION["llama"]: thin(model, ATTENTION["llama"], 3)})
    assert backend.statistics()["kept_weighted"] == alone["kept_weighted"]  # the second is whole
    backend.apply({ATTENTION["llama"]: thin(model, ATTENTION["llama"], 3, seed=9)})
    both_cut = backend.statistics()
    assert (both_cut["kept_weighted"], both_cut["kept_keys"]) == (None, None)
    assert both_cut["kept_frobenius"] <= alone["kept_frobenius"]


@pytest.mark.parametrize("hparams", [{}, {"lora_use_svd": False}, {"lora_fit_steps": 5}])
def test_a_cut_of_any_weight_depends_on_what_is_active_alone(hparams: dict[str, object]) -> None:
    names = (EMBEDDING["gpt2"], ATTENTION["gpt2"])
    model, fresh = made("gpt2"), made("gpt2")
    a, b, c = ({name: dense(model, name, seed) for name in names} for seed in (0, 1, 2))
    backend, fresh_backend = opened(model, lora_rank=3, **hparams), opened(fresh, lora_rank=3, **hparams)
    for changes in (a, b, c):
        backend.apply(changes)
    backend.rebuild([a, c])
    fresh_backend.apply(a)
    fresh_backend.apply(c)
    assert torch.equal(logits(model), logits(fresh))


def test_too_much_left_out_anywhere_is_refused_and_changes_nothing() -> None:
    model = made("llama", tied=True)
    name = EMBEDDING["llama"]
    backend = opened(model, lora_rank=2, lora_residual_threshold=0.05)
    backend.apply({name: thin(model, name)})
    before = logits(model)
    with pytest.raises(NumericalError, match=rf"leaves out 0\.\d+ of the edits at {name}, .*\(frobenius\)"):
        backend.apply({model.layout.weight_name(0): thin(model, model.layout.weight_name(0)), name: dense(model, name)})
    assert torch.equal(logits(model), before)


# Trials


class InsideError(Exception):
    """Raised on trial."""


@pytest.mark.parametrize("hparams", [{}, {"lora_rank": 2}])
@pytest.mark.parametrize("beside", [False, True])
def test_a_trial_is_what_apply_gives_and_nests_and_leaves_no_bit(hparams: dict[str, object], beside: bool) -> None:
    names = (EMBEDDING["gpt2"], ATTENTION["gpt2"], "transformer.h.1.mlp.c_proj.weight")
    model = made("gpt2", dtype=torch.float32)
    a, b, c = ({name: dense(model, name, seed) for name in names[seed:]} for seed in (0, 1, 0))

    def start(model: LanguageModel) -> LoraBackend:
        backend = opened(model, **hparams)
        backend.apply(a)
        if beside:  # an adapter at the module of an edit, attached behind it
            path = ATTENTION["gpt2"].removesuffix(".weight")
            backend.attach("mine", Adapter(factors={path: thin(model, f"{path}.weight", seed=30)}, base_model="tiny"))
        return backend

    def after(*more: Changes) -> Tensor:
        fresh = made("gpt2", dtype=torch.float32)
        backend = start(fresh)
        for changes in more:
            backend.apply(changes)
        return logits(fresh)

    backend = start(model)
    before, modules, statistics = logits(model), dict(model.hf.named_modules()), backend.statistics()
    with backend.trial(b):
        assert torch.equal(logits(model), after(b))
        with contextlib.suppress(InsideError), backend.trial(c):
            assert torch.equal(logits(model), after(b, c))
            raise InsideError
        assert torch.equal(logits(model), after(b))
    assert torch.equal(logits(model), before)
    assert [type(module) for module in model.hf.modules()] == [type(module) for module in modules.values()]
    assert backend.statistics() == statistics
    backend.apply(b)
    assert torch.equal(logits(model), after(b))


def test_a_trial_that_is_refused_leaves_no_bit() -> None:
    model = made("llama")
    backend = opened(model)
    backend.apply({ATTENTION["llama"]: dense(model, ATTENTION["llama"])})
    before = logits(model)
    with pytest.raises(ModelError, match="a vector"), backend.trial({"model.norm.weight": VectorDelta(draw(0, 32))}):
        pytest.fail("the block ran")
    assert torch.equal(logits(model), before)


# What is refused


class Stack(nn.Module):
    """A stack of matrices, and a matrix of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 6))
        self.weight = nn.Parameter(torch.zeros(8, 6))
        self.is_transposed = False


@pytest.fixture
def with_stack() -> LanguageModel:
    hf = tiny_hf_model()
    hf.experts = Stack()
    return LanguageModel.wrap(hf, tiny_tokenizer(), name="tiny-stack")


@pytest.mark.parametrize(
    ("address", "change", "complaint"),
    [
        ("model.norm.weight", VectorDelta(torch.zeros(32)), "they change 'model.norm.weight', a vector"),
        ("experts.down_proj", DenseDelta(torch.zeros(4, 8, 6)), "'experts.down_proj', a parameter with 3 axes"),
        ("experts.down_proj[3]", DenseDelta(torch.zeros(8, 6)), r"'experts.down_proj\[3\]' of .*, a slice of a stack"),
        ("experts.weight", DenseDelta(torch.zeros(8, 6)), "'experts.weight' of LlamaForCausalLM, a weight of a Stack"),
        ("model.norm", DenseDelta(torch.zeros(8, 6)), "has no weight 'model.norm'"),
        ("model.nothing.weight", DenseDelta(torch.zeros(8, 6)), "has no weight 'model.nothing.weight'"),
    ],
)
def test_what_no_adapter_can_hold_is_refused_in_a_sentence(
    with_stack: LanguageModel, address: str, change: WeightChange, complaint: str
) -> None:
    model = with_stack
    good = ATTENTION["llama"]
    backend = opened(model)
    backend.apply({good: thin(model, good)})
    before, modules, statistics = logits(model), dict(model.hf.named_modules()), backend.statistics()
    bad = {good: dense(model, good, 4), address: change}
    for attempt in (lambda: backend.apply(bad), lambda: backend.rebuild([bad]), lambda: backend.trial(bad).__enter__()):
        with pytest.raises(ModelError, match=complaint) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)
    assert dict(model.hf.named_modules()) == modules
    assert backend.statistics() == statistics
    backend.apply({good: dense(model, good, 4)})
    assert backend.statistics()["modules"] == 1


def test_the_other_name_of_a_tied_weight_is_refused() -> None:
    model = made("llama", tied=True)
    with pytest.raises(ModelError, match=r"'lm_head.weight' of .* is tied to 'model.embed_tokens.weight'"):
        opened(model).apply({"lm_head.weight": DenseDelta(draw(0, 640, 32))})
    assert not any(isinstance(module, LoraLayer) for module in model.hf.modules())


def test_modules_that_do_more_than_their_class_says_are_refused() -> None:
    """peft would add to them what it adds to the class they descend from."""

    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Same(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.T

    hf = tiny_hf_model()
    hf.doubling, hf.same = Doubling(8, 6, bias=False), Same(8, 6, bias=False)
    hf.attention, hf.short = nn.MultiheadAttention(8, 2), nn.Embedding(5, 8, max_norm=1.0)
    backend = opened(LanguageModel.wrap(hf, tiny_tokenizer(), name="tiny-other"))
    backend.apply({"same.weight": DenseDelta(torch.zeros(6, 8))})
    for address, shape in (
        ("doubling.weight", (6, 8)), ("attention.out_proj.weight", (8, 8)), ("short.weight", (8, 5)),
        ("attention.in_proj_weight", (24, 8)),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=f"An adapter cannot change '{address}'"):
            backend.apply({address: DenseDelta(torch.zeros(shape))})


def test_the_backend_announces_what_it_takes() -> None:
    assert Plugins.load().backend("lora").takes == {"factored", "dense", "attachment"}


def test_an_editor_of_vectors_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = Plugins.load()
    spec = plugins.editor("rome")
    for gives, fits in (({"factored", "dense"}, True), ({"attachment"}, True), ({"factored", "vector"}, False)):
        made = replace(spec, capabilities=replace(spec.capabilities, gives=frozenset(gives)))
        monkeypatch.setattr(plugins, "editor", {"rome": made}.__getitem__)
        if fits:
            check_fit(plugins, "rome", "lora")
        else:
            with pytest.raises(HParamsError, match=r"the backend 'lora' does not take: vector\. Choose --backend raw"):
                check_fit(plugins, "rome", "lora")
