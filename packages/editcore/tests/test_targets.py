"""Value optimisation against a plain loop: one fact, one row at a time, whole sequences, all logits, no cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from editcore import EditRequest, LanguageModel, NumericalError
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.rows import PreparedRows, RowName, Tails, fits, forward_logits, prepare_plain
from editcore.locate_then_edit.targets import _Losses, optimise_targets
from editcore.models.tokens import TokenRow, continuation_row, lookup_row
from editcore.testing import TINY_FAMILIES, tiny_model, tiny_requests
from torch import Tensor
from torch.nn import functional

TEMPLATES = ("{}", "The old story. {}", "I said so. {}")


def hparams(**changes: object) -> LocateThenEditHParams:
    values = {"layers": (1,), "v_num_grad_steps": 6, "v_stop_loss": 0.0, "v_lr": 0.1, **changes}
    return LocateThenEditHParams.model_validate(values)


def oracle(model: LanguageModel, request: EditRequest, layer: int, h: LocateThenEditHParams) -> Tensor:
    """δ by the textbook: every row alone through ``model.hf`` with all logits, losses summed in a Python loop."""
    projection = model.projection(layer)
    delta = torch.zeros(model.layout.d_model, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=h.v_lr, betas=(h.v_beta1, 0.999))

    def log_probs(ids: Sequence[int], lookup: int, change: Tensor) -> tuple[Tensor, Tensor]:
        seen = []

        def hook(_module: object, _args: object, output: Tensor) -> Tensor:
            flat = output.reshape(len(ids), -1)
            seen.append(flat[lookup].detach())
            rows = [row + change if index == lookup else row for index, row in enumerate(flat)]
            return torch.stack(rows).reshape(output.shape)

        handle = projection.register_forward_hook(hook)
        try:
            logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            handle.remove()
        return logits.log_softmax(-1), seen[0]

    essence = lookup_row(model, request.model_copy(update={"prompt": "{} is a"}))
    reading = essence.lookup if h.kl_position == "lookup" else len(essence.ids) - 1
    with torch.no_grad():
        before = log_probs(essence.ids, essence.lookup, torch.zeros_like(delta))[0][reading]
        bare = lookup_row(model, request)
        value, unit = log_probs(bare.ids, bare.lookup, torch.zeros_like(delta))[1], 1.0
        if h.clamp_norm == "stream":  # what leaves the block, and what δ adds to that
            states = model.hf(input_ids=torch.tensor([bare.ids]), output_hidden_states=True).hidden_states
            value, unit = states[layer + 1][0, bare.lookup], getattr(model.hf.config, "residual_multiplier", 1.0)
    for step in range(h.v_num_grad_steps):
        losses = []
        turn = h.v_contexts_per_step or len(TEMPLATES) - 1
        others = [TEMPLATES[1 + (step * turn + place) % (len(TEMPLATES) - 1)] for place in range(turn)]
        for template in ("{}", *others):
            row = continuation_row(model, request, template=template)
            predicted, _ = log_probs(row.ids, row.lookup, delta)
            nll = [-predicted[row.target_start - 1 + t, token] for t, token in enumerate(row.targets)]
            losses.append(sum(nll) / len(nll))
        loss = (losses[0] + sum(losses[1:]) * (len(TEMPLATES) - 1) / turn) / len(TEMPLATES)
        after = log_probs(essence.ids, essence.lookup, delta)[0][reading]
        loss = loss + h.kl_factor * (after.exp() * (after - before)).sum()
        if delta.norm() > 0:
            loss = loss + h.v_weight_decay * (unit * delta).norm() / value.norm() ** 2
        if step == h.v_num_grad_steps - 1:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            limit = h.clamp_norm_factor * value.norm()
            if (unit * delta).norm() > limit:
                delta.mul_(limit / (unit * delta).norm())
    return delta.detach()


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt", "gptj"])
def test_delta_equals_the_plain_loop(family: str, shortcut: bool) -> None:
    model = tiny_model(family)
    requests = tiny_requests(3)
    settings = hparams(clamp_norm_factor=1.0)
    found = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=settings, shortcut=shortcut)
    for request, delta in zip(requests, found.deltas, strict=True):
        expected = oracle(model, request, 1, settings)
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
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_the_loss_and_of_adam_are_the_plain_loops(changes: dict[str, object]) -> None:
    model, requests = tiny_model("llama"), tiny_requests(2)
    usual = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams())
    settings = hparams(**changes)
    found = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=settings)
    for request, delta, other in zip(requests, found.deltas, usual.deltas, strict=True):
        expected = oracle(model, request, 1, settings)
        assert (delta - expected).norm() <= 1e-4 * expected.norm()
        assert (delta - other).norm() > 1e-3 * expected.norm(), "the setting should matter for this to mean something"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "granite"])
@pytest.mark.parametrize("changes", [{"clamp_norm_factor": 0.02, "v_lr": 0.5}, {"v_weight_decay": 50.0}], ids=str)
def test_a_clamp_by_the_stream_is_the_plain_loops(family: str, changes: dict[str, object]) -> None:
    """MEMIT's reference code: h₀ is the output of the block, in the clamp and in the weight decay."""
    model, requests = tiny_model(family), tiny_requests(2)
    usual, settings = hparams(**changes), hparams(clamp_norm="stream", **changes)
    found = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=settings)
    others = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=usual).deltas
    for row, request in enumerate(requests):
        delta, expected = found.deltas[row], oracle(model, request, 1, settings)
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
    whole = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams())
    sizes: list[tuple[int, ...]] = []

    def watched(*arguments: object) -> Tensor:
        sizes.append(tuple(arguments[1].ids.shape))  # type: ignore[attr-defined]
        return forward_logits(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("editcore.locate_then_edit.targets._token_budget", lambda _model, _layer: tokens)
    monkeypatch.setattr("editcore.locate_then_edit.targets.forward_logits", watched)
    parts = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams())
    assert all(rows * length <= tokens or rows == 1 for rows, length in sizes)
    assert torch.allclose(parts.deltas, whole.deltas, atol=1e-5)


def by_context(model: LanguageModel) -> list[list[TokenRow]]:
    return [[continuation_row(model, request, template=t) for request in tiny_requests(3)] for t in TEMPLATES]


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_tails_give_the_logits_of_whole_rows(family: str, layer: int) -> None:
    """The shortcut serves every family; where one stops fitting, this test says which."""
    model = tiny_model(family)
    assert fits(model, by_context(model), layer)


def test_a_family_that_does_not_fit_runs_whole_rows_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = tiny_model("llama"), tiny_requests(2)
    expected = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams())
    monkeypatch.setattr("editcore.locate_then_edit.targets.fits", lambda *_args, **_kwargs: False)
    found = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams())
    assert not expected.notes
    assert "whole rows" in found.notes[0]
    assert torch.allclose(found.deltas, expected.deltas, atol=1e-4)


def test_fits_notices_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert fits(model, by_context(model), 1)

    take = Tails.take

    def unmasked(self: Tails, names: Sequence[RowName]) -> PreparedRows:
        prepared = take(self, names)
        prepared.mask.fill_(1)
        return prepared

    monkeypatch.setattr(Tails, "take", unmasked)
    assert not fits(model, by_context(model), 1)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tails_fit_in_bfloat16_as_whole_rows_do(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    assert fits(model, by_context(model), 1)


@pytest.mark.parametrize(
    ("dtype", "share", "good"),
    [(torch.bfloat16, 0.03, False), (torch.bfloat16, 0.002, True), (torch.float32, 0.001, False)],
)
def test_fits_is_as_strict_as_rounding_allows(
    dtype: torch.dtype, share: float, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows in another padding say how much sums in another order make; a few times that is an error."""
    model = tiny_model("llama", dtype=dtype)

    def off(*arguments: object) -> Tensor:
        logits = forward_logits(*arguments)  # type: ignore[arg-type]
        if arguments[1].edited is None:  # type: ignore[attr-defined]
            return logits
        return logits + share * (logits.max() - logits.min())

    monkeypatch.setattr("editcore.locate_then_edit.rows.forward_logits", off)
    assert fits(model, by_context(model), 1) == good


@pytest.mark.parametrize("turn", [None, 1])
def test_facts_do_not_depend_on_their_neighbours(turn: int | None) -> None:
    model, requests = tiny_model("llama"), tiny_requests(5)
    settings = hparams(v_contexts_per_step=turn)
    together = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=settings)
    alone = optimise_targets(model, requests[2:3], layer=1, templates=TEMPLATES, hparams=settings)
    assert torch.allclose(together.deltas[2], alone.deltas[0], atol=1e-5)


def test_finished_facts_leave_and_keep_their_value() -> None:
    """A fact that stops early has the δ it had when it stopped, while others go on."""
    model, requests = tiny_model("llama"), tiny_requests(4)
    short = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams(v_num_grad_steps=8))
    threshold = sorted(short.losses)[1] + 1e-4  # two of the four get there within these steps
    stopping = hparams(v_num_grad_steps=30, v_stop_loss=threshold)
    found = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=stopping)
    assert len(set(found.steps)) > 1, "the facts should stop at different steps for this test to mean something"
    for row, (steps, loss) in enumerate(zip(found.steps, found.losses, strict=True)):
        assert loss < threshold or steps == 29
        upto = hparams(v_num_grad_steps=steps + 1)
        expected = optimise_targets(model, requests[row : row + 1], layer=1, templates=TEMPLATES, hparams=upto)
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
    full = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams(**free))
    goal = min(full.probabilities) / 2
    found = optimise_targets(
        model, requests, layer=1, templates=TEMPLATES, hparams=hparams(**free, v_stop_probability=goal)
    )
    assert all(probability >= goal for probability in found.probabilities)
    assert all(stopped < all_steps for stopped, all_steps in zip(found.steps, full.steps, strict=True))


def test_the_final_step_is_the_next_one_of_all() -> None:
    model, requests = tiny_model("llama"), tiny_requests(3)
    full = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams(v_num_grad_steps=30))
    stop: dict[str, object] = {"v_num_grad_steps": 30, "v_stop_probability": min(full.probabilities) / 2}
    plain, final = (
        optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams(**stop, v_final_step=step))
        for step in (False, True)
    )
    assert final.steps == tuple(steps + 1 for steps in plain.steps)
    assert final.probabilities == plain.probabilities
    for row, steps in enumerate(final.steps):
        upto = hparams(v_num_grad_steps=steps + 1)
        expected = optimise_targets(model, requests[row : row + 1], layer=1, templates=TEMPLATES, hparams=upto)
        assert torch.allclose(final.deltas[row], expected.deltas[0], atol=1e-4)
        assert not torch.allclose(final.deltas[row], plain.deltas[row], atol=1e-2)


def test_delta_stays_within_the_clamp_and_raises_the_target() -> None:
    model, requests = tiny_model("gpt2"), tiny_requests(4)
    settings = hparams(v_num_grad_steps=20, v_lr=0.5, clamp_norm_factor=0.7)
    found = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=settings)
    assert (found.deltas.norm(dim=1) <= 0.7 * found.base.norm(dim=1) * (1 + 1e-5)).all()
    start = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams(v_num_grad_steps=1))
    assert all(new > old for new, old in zip(found.probabilities, start.probabilities, strict=True))


def test_the_model_is_left_as_it_was() -> None:
    model, requests = tiny_model("llama"), tiny_requests(2)
    fingerprint, forwards = model.fingerprint(), [model.block(layer).__dict__.get("forward") for layer in range(3)]
    optimise_targets(model, requests, layer=2, templates=TEMPLATES, hparams=hparams())
    assert model.fingerprint() == fingerprint
    assert [model.block(layer).__dict__.get("forward") for layer in range(3)] == forwards
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


def test_a_loss_that_is_not_finite_stops_with_a_sentence() -> None:
    model, requests = tiny_model("llama"), tiny_requests(1)
    with torch.no_grad():
        model.projection(2).weight.fill_(float("nan"))
    sentence = "tiny-llama gives NaN or Inf for 'Marie Curie was born in' before anything is changed; .* look for NaN"
    with pytest.raises(NumericalError, match=sentence) as caught:
        optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams(), shortcut=False)
    assert "v_lr" not in str(caught.value)
    with pytest.raises(NumericalError, match=r"'Marie Curie was born in' met NaN or Inf after 1 steps; .* Lower v_lr"):
        optimise_targets(tiny_model(), requests, layer=1, templates=TEMPLATES, hparams=hparams(v_lr=1e39))


def test_added_delta_reaches_only_its_own_row() -> None:
    model = tiny_model("llama")
    rows = [continuation_row(model, request) for request in tiny_requests(3)]
    prepared = prepare_plain(model, rows)
    index = torch.arange(3)
    last = torch.tensor([len(row.ids) - 1 for row in rows])
    delta = torch.zeros(3, model.layout.d_model)
    before = forward_logits(model, prepared, 1, delta, index, last)
    delta[1] = 1.0
    after = forward_logits(model, prepared, 1, delta, index, last)
    changed = (after - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("at_a_time", [1, 14, 100])
@pytest.mark.parametrize("scored", [0, 2, 5])
def test_the_losses_over_the_vocabulary_and_their_gradient(
    scored: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("editcore.locate_then_edit.targets._LOGITS_AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    labels, log_q = torch.randint(7, (scored,), generator=generator), other[scored:].log_softmax(-1)
    nll, drift = _Losses.apply(logits, labels, list(log_q))
    assert torch.allclose(nll, functional.cross_entropy(logits[:scored], labels, reduction="none"))
    log_p = logits[scored:].log_softmax(-1)
    assert torch.allclose(drift, functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    assert torch.autograd.gradcheck(lambda z: _Losses.apply(z, labels, list(log_q)), logits.requires_grad_())


@pytest.mark.parametrize("where", ["forward", "preparation"])
def test_facts_go_on_in_smaller_passes_when_memory_runs_out(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = tiny_model("llama"), tiny_requests(5)
    expected = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams())
    refused = 0

    def refuse_twice(rows: int) -> None:
        nonlocal refused
        if rows > 4 and refused < 2:
            refused += 1
            raise MemoryError

    def forward(*arguments: object) -> Tensor:
        refuse_twice(len(arguments[1].ids))  # type: ignore[attr-defined]
        return forward_logits(*arguments)  # type: ignore[arg-type]

    replace = Tails.replace

    def preparation(self: Tails, kept: Sequence[RowName], new: Mapping[RowName, TokenRow], *, most: int) -> None:
        refuse_twice(len(new))
        replace(self, kept, new, most=most)

    if where == "forward":
        monkeypatch.setattr("editcore.locate_then_edit.targets.forward_logits", forward)
    else:
        monkeypatch.setattr(Tails, "replace", preparation)
    found = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams())
    assert refused == 2
    assert found.steps == expected.steps
    assert torch.allclose(found.deltas, expected.deltas, atol=1e-5)
