"""The backend on tiny models of every family: the logits of raw, the base to the bit, and what a bounded rank does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from edit_lora.adapter import EDITS
from edit_lora.backend import LoraBackend
from edit_lora.hparams import LoraHParams
from editcore import BackendContext, EditSession, FactoredDelta, LanguageModel, NumericalError
from editcore.models.writing import add_changes
from editcore.second_moments.linalg import Metric
from editcore.testing import TINY_FAMILIES, tiny_model, tiny_requests
from peft.tuners.lora import LoraLayer
from torch import Tensor

Deltas = Mapping[str, FactoredDelta]


def batches(model: LanguageModel, ranks: Sequence[int] = (2, 3), layers: Sequence[int] = (0, 1)) -> list[Deltas]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for rank in ranks:
        deltas = {}
        for layer in layers:
            name = model.layout.weight_name(layer)
            d_out, d_in = model.as_out_in(name, model.weight(name)).shape
            left = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
            right = torch.randn(rank, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
            deltas[name] = FactoredDelta(left, right)
        found.append(deltas)
    return found


@torch.inference_mode()
def logits(model: LanguageModel) -> Tensor:
    encoded = model.encode([request.text for request in tiny_requests(4)])
    found: Tensor = model.hf(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    return found.double() * encoded.attention_mask[..., None]


def written(model: LanguageModel, active: Sequence[Deltas]) -> LanguageModel:
    """The model with its deltas in the weights."""
    for deltas in active:
        for name, delta in deltas.items():
            add_changes(model, name, [delta])
    return model


def opened(model: LanguageModel, **hparams: object) -> LoraBackend:
    backend = LoraBackend(LoraHParams.model_validate(hparams))
    backend.take(BackendContext(metrics=lambda layers: {layer: Metric(moment(model)) for layer in layers}))
    backend.open(model)
    return backend


def moment(model: LanguageModel) -> Tensor:
    """A second moment whose directions differ in size by orders."""
    width = model.layout.d_ff
    keys = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys *= torch.logspace(0, -2, width, dtype=torch.float64)
    return keys.T @ keys / len(keys)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_logits_are_those_of_the_raw_change_in_every_family(family: str) -> None:
    model = tiny_model(family)
    base, bits, modules = logits(model), model.fingerprint(), dict(model.hf.named_modules())
    active = batches(model)
    expected = logits(written(tiny_model(family), active))
    backend = opened(model)
    for deltas in active:
        backend.apply(deltas)
    # float32 rounding: 2e-6 of logits that are of size 10.
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert (expected - base).abs().max() > 0.05
    assert isinstance(model.projection(0), LoraLayer)
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    backend.rebuild([])
    assert torch.equal(logits(model), base)
    assert dict(model.hf.named_modules()) == modules
    assert model.fingerprint() == bits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_tied_or_not_stay_as_they_are(family: str, tied: bool) -> None:
    config = {"tie_word_embeddings": tied}
    model = tiny_model(family, config=config)
    active = batches(model)
    opened(model).rebuild(active)
    expected = logits(written(tiny_model(family, config=config), active))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert (model.hf.get_input_embeddings().weight is model.hf.get_output_embeddings().weight) is tied


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bf16_base_is_edited_in_float32(family: str) -> None:
    """What the projection gives is the exact product rounded once: closer to it than a bf16 weight can be."""
    model = tiny_model(family, dtype=torch.bfloat16)
    name = model.layout.weight_name(0)
    small = [
        {name: FactoredDelta(delta.left * 1e-3, delta.right)} for (delta,) in map(_only, batches(model, layers=(0,)))
    ]
    exact = model.as_out_in(name, model.weight(name)).double()
    for deltas in small:
        exact = exact + deltas[name].dense()
    bias = getattr(model.projection(0), "bias", None)
    key = torch.randn(5, exact.shape[1], generator=torch.Generator().manual_seed(3)).bfloat16()
    wanted = key.double() @ exact.T + (0 if bias is None else bias.double())
    raw = written(tiny_model(family, dtype=torch.bfloat16), small)
    opened(model).rebuild(small)
    layer = model.projection(0)
    assert layer.lora_A[EDITS].weight.dtype == torch.float32
    assert layer(key).dtype == torch.bfloat16
    off, off_raw = ((edited.projection(0)(key).double() - wanted).norm() for edited in (model, raw))
    assert off <= 1.05 * off_raw
    assert off <= 2**-7 * wanted.norm()


def _only(deltas: Deltas) -> tuple[FactoredDelta]:
    (delta,) = deltas.values()
    return (delta,)


def test_wrapping_draws_nothing_from_the_process_generator() -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    opened(model).rebuild(batches(model))
    assert torch.equal(before, torch.get_rng_state())


def test_alpha_changes_the_files_and_scale_the_effect() -> None:
    model = tiny_model(dtype=torch.float64)
    base, active = logits(model), batches(model, layers=(2,))  # the last block, whose effect on the stream is linear
    name = model.layout.weight_name(2)
    key = torch.randn(3, model.layout.d_ff, dtype=torch.float64)
    exact = key @ sum(deltas[name].dense() for deltas in active).T
    plain = model.projection(2)(key)
    for alpha, scale in ((None, 1.0), (0.5, 1.0), (64.0, 0.25), (None, 0.0)):
        backend = opened(model, lora_alpha=alpha, lora_scale=scale)
        backend.rebuild(active)
        torch.testing.assert_close(model.projection(2)(key) - plain, scale * exact)
        assert model.projection(2).lora_alpha[EDITS] == (alpha or 5)
        backend.rebuild([])
    assert torch.equal(logits(model), base)


# A bounded rank


@pytest.mark.parametrize(
    "hparams", [{}, {"lora_use_svd": False}, {"lora_fit_steps": 5}, {"lora_criterion": "frobenius"}]
)
def test_a_cut_depends_on_what_is_active_and_not_on_earlier_cuts(hparams: dict[str, object]) -> None:
    model, fresh = tiny_model(), tiny_model()
    a, b, c = batches(model, ranks=(2, 3, 2))
    backend = opened(model, lora_rank=3, **hparams)
    for deltas in (a, b, c):
        backend.apply(deltas)
    backend.rebuild([a, c])
    fresh_backend = opened(fresh, lora_rank=3, **hparams)
    fresh_backend.apply(a)
    fresh_backend.apply(c)
    assert torch.equal(logits(model), logits(fresh))
    assert model.projection(0).r == {EDITS: 3}


def test_each_criterion_keeps_most_by_its_own_measure_and_both_are_reported() -> None:
    kept = {}
    for criterion in ("weighted", "frobenius"):
        backend = opened(tiny_model(), lora_rank=3, lora_criterion=criterion)
        backend.rebuild(batches(tiny_model(), ranks=(4, 4), layers=(1,)))
        kept[criterion] = backend.statistics()
        assert (kept[criterion]["rank"], kept[criterion]["exact_rank"]) == (3, 8)
    assert kept["weighted"]["kept_weighted"] > kept["frobenius"]["kept_weighted"]
    assert kept["frobenius"]["kept_frobenius"] > kept["weighted"]["kept_frobenius"]


def test_fitting_keeps_more_at_the_keys() -> None:
    kept = []
    for steps in (0, 50):
        backend = opened(tiny_model(), lora_rank=3, lora_fit_steps=steps)
        backend.rebuild(batches(tiny_model(), ranks=(4, 4), layers=(1,)))
        kept.append(backend.statistics())
    assert kept[1]["kept_keys"] > kept[0]["kept_keys"]


def test_an_exact_adapter_reports_that_it_is() -> None:
    backend = opened(tiny_model())
    assert backend.statistics()["modules"] == 0
    backend.rebuild(batches(tiny_model()))
    assert backend.statistics() == {
        "modules": 2, "raw_modules": 0, "exact_rank": 5, "rank": 5,
        "kept_frobenius": 1.0, "kept_weighted": 1.0, "kept_keys": 1.0,
    }  # fmt: skip


def test_too_much_left_out_is_refused_with_the_figure_and_changes_nothing() -> None:
    model = tiny_model()
    a, b = batches(model, ranks=(2, 3))
    backend = opened(model, lora_rank=2, lora_residual_threshold=0.05)
    backend.apply(a)
    before = logits(model)
    message = r"lora: rank 2 leaves out 0\.\d+ of the edits at model\.layers\.0\.mlp\.down_proj\.weight"
    with pytest.raises(NumericalError, match=message):
        backend.apply(b)
    assert torch.equal(logits(model), before)
    backend.rebuild([a])
    assert torch.equal(logits(model), before)


def test_a_projection_that_falls_back_is_raw_and_the_others_are_not() -> None:
    model = tiny_model()
    name, other_name = model.layout.weight_name(0), model.layout.weight_name(1)
    wide, thin = batches(model, ranks=(4,), layers=(0,))[0], batches(model, ranks=(1,), layers=(1,))[0]
    backend = opened(model, lora_rank=2, lora_residual_threshold=0.05, allow_fallback=True)
    bits = model.weight(name).clone()
    backend.apply({**wide, **thin})
    assert not isinstance(model.projection(0), LoraLayer)
    assert isinstance(model.projection(1), LoraLayer)
    expected = written(tiny_model(), [wide]).weight(name)
    assert torch.equal(model.weight(name), expected)
    assert backend.statistics()["raw_modules"] == 1
    backend.rebuild([thin])
    assert torch.equal(model.weight(name), bits)
    assert isinstance(model.hf.get_submodule(other_name.removesuffix(".weight")), LoraLayer)


def test_what_a_session_cannot_express_is_not_in_its_ledger(session: Callable[..., EditSession]) -> None:
    tight = session("lora", lora={"lora_rank": 1, "lora_residual_threshold": 1e-6})
    with pytest.raises(NumericalError, match="lora_residual_threshold"):
        tight.edit(tiny_requests(2))
    assert not tight.ledger.entries
    assert not isinstance(tight.model.projection(1), LoraLayer)
    assert tight.next_batch == 0


# Editors and extensions


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("editor", "settings", "plugins"),
    [
        ("rome", {"layers": [1]}, ()),
        ("memit", {"layers": [0, 1]}, ()),
        ("emmet", {"layers": [1]}, ()),
        ("emmet", {"layers": [1], "emmet_lambda": 0.1}, ("replay",)),
    ],
)
def test_every_editor_and_extension_sees_the_edited_model(
    session: Callable[..., EditSession], family: str, editor: str, settings: dict[str, object], plugins: tuple[str, ...]
) -> None:
    """Batches after the first read what the earlier ones wrote; what they write then is what they write with raw."""
    made = {}
    for backend in ("raw", "lora"):
        edit_session = session(backend, editor=editor, plugins=plugins, family=family, **{editor: settings})
        edit_session.edit(tiny_requests(6), batch_size=2)
        made[backend] = edit_session
    raw, lora = made["raw"], made["lora"]
    for first, second in zip(raw.ledger.entries, lora.ledger.entries, strict=True):
        assert first.requests == second.requests
        for name, delta in first.changes.items():
            torch.testing.assert_close(second.changes[name].dense(), delta.dense(), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(logits(lora.model), logits(raw.model), rtol=0, atol=2e-2)
    prompts = [request.text for request in tiny_requests(3)]
    assert lora.generate_unedited(prompts) == raw.generate_unedited(prompts)


def test_the_same_deltas_give_the_same_scores(session: Callable[..., EditSession]) -> None:
    """One ledger under both backends, so that nothing but the backend differs."""
    raw = session("raw", emmet={"layers": [1]})
    raw.edit(tiny_requests(6), batch_size=2)
    model = tiny_model()
    opened(model).rebuild([written.changes for written in raw.ledger.active()])
    torch.testing.assert_close(logits(model), logits(raw.model), rtol=0, atol=1e-4)


def test_a_saved_session_is_a_normal_folder(session: Callable[..., EditSession], tmp_path: Path) -> None:
    edit_session = session("lora")
    edit_session.edit(tiny_requests(2))
    expected = logits(edit_session.model)
    edit_session.save(tmp_path / "saved")
    torch.testing.assert_close(logits(LanguageModel.load(str(tmp_path / "saved"))), expected, rtol=0, atol=1e-4)
    assert edit_session.statistics()["lora"]["rank"] == 2
    edit_session.close()
    assert torch.equal(logits(edit_session.model), logits(tiny_model()))
