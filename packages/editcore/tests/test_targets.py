"""Value optimisation of many facts at once, against the plain loop over one (``plain_values``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from editcore import EditRequest, LanguageModel, NumericalError
from editcore.locate_then_edit import Targets, fact_rows, optimise_plainly, optimise_targets
from editcore.locate_then_edit.cached_prefixes import CachedPrefixes, prefixes_fit
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.prepared_rows import PreparedRows, logits_with_delta, whole_rows
from editcore.locate_then_edit.side_by_side import KnownOfLayer
from editcore.locate_then_edit.token_rows import ESSENCE, RowName
from editcore.locate_then_edit.value_loss import VocabularyLosses
from editcore.models.planning import PassBudget
from editcore.models.tokens import TokenRow, continuation_row, lookup_row
from editcore.testing import TINY_FAMILIES, tiny_model, tiny_requests
from torch import Tensor
from torch.nn import functional

TEMPLATES = ("{}", "The old story. {}", "I said so. {}")


def hparams(**changes: object) -> LocateThenEditHParams:
    values = {"layers": (1,), "v_num_grad_steps": 6, "v_stop_loss": 0.0, "v_lr": 0.1, **changes}
    return LocateThenEditHParams.model_validate(values)


def optimised(
    model: LanguageModel, requests: Sequence[EditRequest], settings: LocateThenEditHParams, **options: Any
) -> Targets:
    values = [[fact] for fact in fact_rows(model, requests, TEMPLATES, settings)]
    return optimise_targets(model, values, **{"layer": 1, **options}, hparams=settings)


def plainly(model: LanguageModel, request: EditRequest, settings: LocateThenEditHParams) -> Tensor:
    return optimise_plainly(model, [request], layer=1, templates=TEMPLATES, hparams=settings)


@pytest.mark.parametrize("cache_prefixes", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt", "gptj"])
def test_delta_equals_the_plain_loop(family: str, cache_prefixes: bool) -> None:
    model = tiny_model(family)
    requests = tiny_requests(3)
    settings = hparams(clamp_norm_factor=1.0)
    found = optimised(model, requests, settings, known=KnownOfLayer(cache_prefixes=cache_prefixes))
    for request, delta in zip(requests, found.deltas, strict=True):
        expected = plainly(model, request, settings)
        assert torch.cosine_similarity(delta, expected, dim=0) >= 0.99999
        assert (delta - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_position": "lookup"},
        {"v_beta1": 0.5},
        {"kl_factor": 0.0},
        {"v_weight_decay": 50.0},
        {"v_contexts_per_step": 1},
        {"v_stop_probability": 1e-4, "v_final_step": True},
        {"v_num_grad_steps": 3, "v_final_step": True},
        {"v_stop_loss": 9.1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_the_loss_and_of_adam_are_the_plain_loops(changes: dict[str, object]) -> None:
    model, requests = tiny_model("llama"), tiny_requests(2)
    usual = optimised(model, requests, hparams())
    settings = hparams(**changes)
    found = optimised(model, requests, settings)
    for request, delta, usual_delta in zip(requests, found.deltas, usual.deltas, strict=True):
        expected = plainly(model, request, settings)
        assert (delta - expected).norm() <= 1e-4 * expected.norm()
        assert (delta - usual_delta).norm() > 1e-3 * expected.norm(), (
            "the setting should matter for this to mean something"
        )


def test_the_rows_of_a_value_are_its_contexts_and_the_essence_prompt() -> None:
    model = tiny_model("gpt2")
    [request] = tiny_requests(1)  # Marie Curie was born in → its target
    encode = lambda text: tuple(model.tokenizer(text)["input_ids"])  # noqa: E731
    subject = encode("Marie Curie")
    for position, ids in (("last", encode("Marie Curie is a")), ("lookup", subject)):
        [value] = fact_rows(model, [request], TEMPLATES, hparams(kl_position=position))
        assert value.row(ESSENCE).ids == ids
        assert value.row(ESSENCE).lookup == len(subject) - 1
    for template, row in zip(TEMPLATES, value.contexts, strict=True):
        prompt, target = encode(template.format(request.text)), encode(" " + request.target_new)[1:]  # without BOS
        assert row.ids == prompt + target
        assert (row.targets, row.lookup) == (target, len(encode(template.format("Marie Curie"))) - 1)
        assert value.model_input(value.contexts.index(row)).ids == (prompt + target)[:-1]
    assert list(value.contexts_and_essence()) == [0, 1, 2, ESSENCE]
    [value] = fact_rows(model, [request], TEMPLATES, hparams(kl_factor=0.0))
    assert list(value.contexts_and_essence()) == [0, 1, 2]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "granite"])
@pytest.mark.parametrize("changes", [{"clamp_norm_factor": 0.02, "v_lr": 0.5}, {"v_weight_decay": 50.0}], ids=str)
def test_a_clamp_by_the_stream_is_the_plain_loops(family: str, changes: dict[str, object]) -> None:
    """MEMIT's reference code: h₀ is the output of the block, in the clamp and in the weight decay."""
    model, requests = tiny_model(family), tiny_requests(2)
    usual, settings = hparams(**changes), hparams(clamp_norm="stream", **changes)
    found = optimised(model, requests, settings)
    others = optimised(model, requests, usual).deltas
    for row, request in enumerate(requests):
        delta, expected = found.deltas[row], plainly(model, request, settings)
        assert (delta - expected).norm() <= 1e-4 * expected.norm()
        assert (delta - others[row]).norm() > 1e-2 * expected.norm(), "the setting should matter for this"
        [ids] = model.encode([request.text]).input_ids.tolist()
        states = model.hf(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        at_lookup = states[2][0, lookup_row(model, request).lookup]
        torch.testing.assert_close(found.base[row], at_lookup.detach(), rtol=1e-4, atol=1e-5)
        if "clamp_norm_factor" in changes:
            added = delta.norm() * getattr(model.hf.config, "residual_multiplier", 1.0)
            assert added == pytest.approx(0.02 * at_lookup.norm().item(), rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 12, 40])
def test_small_passes_give_what_a_large_one_gives(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = tiny_model("gpt2"), tiny_requests(4)
    whole = optimised(model, requests, hparams())
    sizes: list[tuple[int, ...]] = []

    def watched(model: LanguageModel, prepared: PreparedRows, **options: Any) -> Tensor:
        sizes.append(tuple(prepared.ids.shape))
        return logits_with_delta(model, prepared, **options)

    small = PassBudget.backward(model, 1).with_tokens(tokens)
    monkeypatch.setattr(PassBudget, "backward", lambda _model, _layer: small)
    monkeypatch.setattr("editcore.locate_then_edit.value_loss.logits_with_delta", watched)
    parts = optimised(model, requests, hparams())
    assert sizes
    assert all(rows * length <= tokens or rows == 1 for rows, length in sizes)
    assert torch.allclose(parts.deltas, whole.deltas, atol=1e-5)


def by_context(model: LanguageModel) -> dict[int, list[TokenRow]]:
    return {
        number: [continuation_row(model, request, template=template) for request in tiny_requests(3)]
        for number, template in enumerate(TEMPLATES)
    }


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_cached_prefixes_give_the_logits_of_whole_rows(family: str, layer: int) -> None:
    """The shortcut serves every family; where one stops fitting, this test says which."""
    model = tiny_model(family)
    assert prefixes_fit(model, by_context(model), layer=layer)


def test_a_family_that_does_not_fit_runs_whole_rows_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = tiny_model("llama"), tiny_requests(2)
    expected = optimised(model, requests, hparams())
    monkeypatch.setattr("editcore.locate_then_edit.targets.prefixes_fit", lambda *_args, **_kwargs: False)
    found = optimised(model, requests, hparams())
    assert not expected.notes
    assert "whole rows" in found.notes[0]
    assert torch.allclose(found.deltas, expected.deltas, atol=1e-4)


def test_fits_notices_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert prefixes_fit(model, by_context(model), layer=1)

    take = CachedPrefixes.take

    def unmasked(self: CachedPrefixes, names: Sequence[RowName]) -> PreparedRows:
        prepared = take(self, names)
        prepared.mask.fill_(1)
        return prepared

    monkeypatch.setattr(CachedPrefixes, "take", unmasked)
    assert not prefixes_fit(model, by_context(model), layer=1)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_cached_prefixes_fit_in_bfloat16_as_whole_rows_do(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    assert prefixes_fit(model, by_context(model), layer=1)


@pytest.mark.parametrize(
    ("dtype", "share", "good"),
    [(torch.bfloat16, 0.03, False), (torch.bfloat16, 0.002, True), (torch.float32, 0.001, False)],
)
def test_fits_is_as_strict_as_rounding_allows(
    dtype: torch.dtype, share: float, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows in another padding say how much sums in another order make; a few times that is an error."""
    model = tiny_model("llama", dtype=dtype)

    def off(model: LanguageModel, prepared: PreparedRows, **options: Any) -> Tensor:
        logits = logits_with_delta(model, prepared, **options)
        if prepared.edited is None:
            return logits
        return logits + share * (logits.max() - logits.min())

    monkeypatch.setattr("editcore.locate_then_edit.cached_prefixes.logits_with_delta", off)
    assert prefixes_fit(model, by_context(model), layer=1) == good


@pytest.mark.parametrize("turn", [None, 1])
def test_facts_do_not_depend_on_their_neighbours(turn: int | None) -> None:
    model, requests = tiny_model("llama"), tiny_requests(5)
    settings = hparams(v_contexts_per_step=turn)
    together = optimised(model, requests, settings)
    alone = optimised(model, requests[2:3], settings)
    assert torch.allclose(together.deltas[2], alone.deltas[0], atol=1e-5)


def test_finished_facts_leave_and_keep_their_value() -> None:
    """A fact that stops early has the δ it had when it stopped, while others go on."""
    model, requests = tiny_model("llama"), tiny_requests(4)
    short = optimised(model, requests, hparams(v_num_grad_steps=8))
    threshold = sorted(short.losses)[1] + 1e-4  # two of the four get there within these steps
    stopping = hparams(v_num_grad_steps=30, v_stop_loss=threshold)
    found = optimised(model, requests, stopping)
    assert len(set(found.steps)) > 1, "the facts should stop at different steps for this test to mean something"
    for row, (steps, loss) in enumerate(zip(found.steps, found.losses, strict=True)):
        assert loss < threshold or steps == 29
        upto = hparams(v_num_grad_steps=steps + 1)
        expected = optimised(model, requests[row : row + 1], upto)
        assert torch.allclose(found.deltas[row], expected.deltas[0], atol=1e-4)


@pytest.mark.parametrize("turn", [None, 1])
def test_a_fact_stops_at_the_probability_asked_for(turn: int | None) -> None:
    model, requests = tiny_model("llama"), tiny_requests(3)
    free: dict[str, object] = {
        "kl_factor": 0.0,
        "v_weight_decay": 0.0,
        "clamp_norm_factor": 100.0,
        "v_num_grad_steps": 30,
    }
    free["v_contexts_per_step"] = turn
    full = optimised(model, requests, hparams(**free))
    goal = min(full.probabilities) / 2
    found = optimised(model, requests, hparams(**free, v_stop_probability=goal))
    assert all(probability >= goal for probability in found.probabilities)
    assert all(stopped < all_steps for stopped, all_steps in zip(found.steps, full.steps, strict=True))


def test_the_final_step_is_the_next_one_of_all() -> None:
    model, requests = tiny_model("llama"), tiny_requests(3)
    full = optimised(model, requests, hparams(v_num_grad_steps=30))
    stop: dict[str, object] = {"v_num_grad_steps": 30, "v_stop_probability": min(full.probabilities) / 2}
    plain, final = (optimised(model, requests, hparams(**stop, v_final_step=step)) for step in (False, True))
    assert final.steps == tuple(steps + 1 for steps in plain.steps)
    assert final.probabilities == plain.probabilities
    for row, steps in enumerate(final.steps):
        upto = hparams(v_num_grad_steps=steps + 1)
        expected = optimised(model, requests[row : row + 1], upto)
        assert torch.allclose(final.deltas[row], expected.deltas[0], atol=1e-4)
        assert not torch.allclose(final.deltas[row], plain.deltas[row], atol=1e-2)


def test_delta_stays_within_the_clamp_and_raises_the_target() -> None:
    model, requests = tiny_model("gpt2"), tiny_requests(4)
    settings = hparams(v_num_grad_steps=20, v_lr=0.5, clamp_norm_factor=0.7)
    found = optimised(model, requests, settings)
    assert (found.deltas.norm(dim=1) <= 0.7 * found.base.norm(dim=1) * (1 + 1e-5)).all()
    start = optimised(model, requests, hparams(v_num_grad_steps=1))
    assert all(new > old for new, old in zip(found.probabilities, start.probabilities, strict=True))


def test_the_model_is_left_as_it_was() -> None:
    model, requests = tiny_model("llama"), tiny_requests(2)
    fingerprint, forwards = model.fingerprint(), [model.block(layer).__dict__.get("forward") for layer in range(3)]
    optimised(model, requests, hparams(), layer=2)
    assert model.fingerprint() == fingerprint
    assert [model.block(layer).__dict__.get("forward") for layer in range(3)] == forwards
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


def test_a_loss_that_is_not_finite_stops_with_a_sentence() -> None:
    model, requests = tiny_model("llama"), tiny_requests(1)
    with torch.no_grad():
        model.projection(2).weight.fill_(float("nan"))
    sentence = "tiny-llama gives NaN or Inf for 'Marie Curie was born in' before anything is changed; .* look for NaN"
    with pytest.raises(NumericalError, match=sentence) as caught:
        optimised(model, requests, hparams(), known=KnownOfLayer(cache_prefixes=False))
    assert "v_lr" not in str(caught.value)
    with pytest.raises(NumericalError, match=r"'Marie Curie was born in' met NaN or Inf after 1 steps; .* Lower v_lr"):
        optimised(tiny_model(), requests, hparams(v_lr=1e39))


def test_added_delta_reaches_only_its_own_row() -> None:
    model = tiny_model("llama")
    rows = [continuation_row(model, request) for request in tiny_requests(3)]
    prepared = whole_rows(model, rows)
    index = torch.arange(3)
    last = torch.tensor([len(row.ids) - 1 for row in rows])
    delta = torch.zeros(3, model.layout.d_model)
    scored: Any = {"layer": 1, "rows": index, "positions": last}
    before = logits_with_delta(model, prepared, delta=delta, **scored)
    delta[1] = 1.0
    after = logits_with_delta(model, prepared, delta=delta, **scored)
    changed = (after - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("at_a_time", [1, 14, 100])
@pytest.mark.parametrize("scored", [0, 2, 5])
def test_the_losses_over_the_vocabulary_and_their_gradient(
    scored: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("editcore.locate_then_edit.value_loss._LOGITS_PER_CHUNK", at_a_time)
    generator = torch.Generator().manual_seed(0)
    logits, other_logits = (torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    labels, log_q = torch.randint(7, (scored,), generator=generator), other_logits[scored:].log_softmax(-1)
    nll, drift = VocabularyLosses.apply(logits, labels, list(log_q))
    assert torch.allclose(nll, functional.cross_entropy(logits[:scored], labels, reduction="none"))
    log_p = logits[scored:].log_softmax(-1)
    assert torch.allclose(drift, functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    assert torch.autograd.gradcheck(lambda z: VocabularyLosses.apply(z, labels, list(log_q)), logits.requires_grad_())


@pytest.mark.parametrize("where", ["forward", "preparation"])
def test_facts_go_on_in_smaller_passes_when_memory_runs_out(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = tiny_model("llama"), tiny_requests(5)
    expected = optimised(model, requests, hparams())
    refused = 0

    def refuse_duplicates(rows: int) -> None:
        nonlocal refused
        if rows > 4 and refused < 2:
            refused += 1
            raise MemoryError

    def forward(model: LanguageModel, prepared: PreparedRows, **options: Any) -> Tensor:
        refuse_duplicates(len(prepared.ids))
        return logits_with_delta(model, prepared, **options)

    replace = CachedPrefixes.replace

    def preparation(
        self: CachedPrefixes, kept: Sequence[RowName], new: Mapping[RowName, TokenRow], budget: PassBudget
    ) -> None:
        refuse_duplicates(len(new))
        replace(self, kept, new, budget)

    if where == "forward":
        monkeypatch.setattr("editcore.locate_then_edit.value_loss.logits_with_delta", forward)
    else:
        monkeypatch.setattr(CachedPrefixes, "replace", preparation)
    found = optimised(model, requests, hparams())
    assert refused == 2
    assert found.steps == expected.steps
    assert torch.allclose(found.deltas, expected.deltas, atol=1e-5)
