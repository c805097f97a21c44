"""Settings that keep values from growing over many edits: a stop, a term of the loss, a length, and other steps."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import EditContext, HParamsError, LanguageModel, Plugins
from editcore.locate_then_edit import FactRows, Targets, fact_rows, optimise_plainly, optimise_targets
from editcore.locate_then_edit.batch_targets import BatchTargets
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.preparation import prepare
from editcore.locate_then_edit.side_by_side import KnownOfLayer
from editcore.locate_then_edit.targets import anchored
from editcore.locate_then_edit.value_loss import spread_parts
from editcore.locate_then_edit.value_norms import measure_value_norms
from editcore.locate_then_edit.value_steps import LEAST_GAIN, LogOddsSteps, log_odds_aim
from editcore.locate_then_edit.windows import Windows
from editcore.models.capture import capture
from editcore.models.planning import PassBudget
from editcore.models.tokens import TokenRow, lookup_row
from editcore.second_moments import CorpusOptions
from editcore.second_moments.statistics import StatisticsStore
from editcore.settings import build
from editcore.testing import tiny_model, tiny_requests
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import Tensor

TEMPLATES = ("{}", "The old story. {}", "I said so. {}")
FREE = {
    "fact_token": "last",
    "kl_factor": 0.0,
    "v_weight_decay": 0.0,
    "clamp_norm_factor": 100.0,
    "v_lr": 1.0,
    "v_num_grad_steps": 18,
}
"""With these a tiny model says three facts after 6 to 11 steps."""

LOG_ODDS = {"v_optimizer": "log_odds", "v_stop_probability": 0.5}
"""Steps along the gradient of the log-odds."""


def hparams(**changes: object) -> LocateThenEditHParams:
    values = {"layers": (1,), "v_num_grad_steps": 6, "v_stop_loss": 0.0, "v_lr": 0.1, **changes}
    return LocateThenEditHParams.model_validate(values)


def optimised(
    model: LanguageModel, settings: LocateThenEditHParams, *, together: bool = False, **options: Any
) -> Targets:
    """Values of three facts, each its own or one for all of them."""
    facts = fact_rows(model, tiny_requests(3), TEMPLATES, settings)
    return optimise_targets(
        model, [facts] if together else [[fact] for fact in facts], **{"layer": 1, **options}, hparams=settings
    )


def check_with_plain_loop(model: LanguageModel, settings: LocateThenEditHParams, found: Targets) -> None:
    for request, delta in zip(tiny_requests(3), found.deltas, strict=True):
        expected = optimise_plainly(model, [request], layer=1, templates=TEMPLATES, hparams=settings)
        assert (delta - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("cache_prefixes", "dtype"), [(True, torch.float64), (False, torch.float32)])
@pytest.mark.parametrize(
    "changes",
    [
        {**FREE, "v_stop_most_probable": 0},
        {**FREE, "v_stop_most_probable": 2, "v_contexts_per_step": 1},
        {"v_context_factor": 3.0},
        {"v_context_factor": 3.0, "v_context_layers": 1, "v_contexts_per_step": 1},
        {"v_norm_anchor": True, "v_norms": ((1, 2.0),)},
        {"v_norm_anchor": True, "v_norms": ((1, 2.0),), "clamp_norm": "stream"},
        {**LOG_ODDS, "v_longest_step": 2.0},
        {**LOG_ODDS, "clamp_norm": "stream", "clamp_norm_factor": 1.5, "v_contexts_per_step": 1, "v_weight_decay": 0.5},
    ],
    ids=str,
)
def test_the_plain_loop_defines_it(changes: dict[str, object], cache_prefixes: bool, dtype: torch.dtype) -> None:
    model, settings = tiny_model("llama", num_layers=4, dtype=dtype), hparams(**changes)
    found = optimised(model, settings, known=KnownOfLayer(cache_prefixes=cache_prefixes))
    check_with_plain_loop(model, settings, found)
    usual = optimised(model, hparams(**{name: value for name, value in changes.items() if name in FREE}))
    assert all(
        (delta - usual_delta).norm() > 1e-3 * delta.norm()
        for delta, usual_delta in zip(found.deltas, usual.deltas, strict=True)
    ), "the setting should matter for this to mean something"


@pytest.mark.parametrize(
    "changes",
    [{**FREE, "v_stop_most_probable": 1}, {"v_context_factor": 3.0}, {**LOG_ODDS, "v_longest_step": 2.0}],
    ids=str,
)
def test_facts_that_share_a_value_are_asked_together(changes: dict[str, object]) -> None:
    model, settings = tiny_model("llama", dtype=torch.float64), hparams(**changes)
    found = optimised(model, settings, together=True)
    expected = optimise_plainly(model, tiny_requests(3), layer=1, templates=TEMPLATES, hparams=settings)
    assert (found.deltas - expected).norm(dim=1).max() <= 1e-4 * expected.norm()


def outputs_of(model: LanguageModel, context: TokenRow, delta: Tensor) -> Any:
    """What the model gives for a row, with δ at its lookup token."""

    def add(_module: object, _args: object, output: Tensor) -> Tensor:
        moved = output.clone()
        moved[0, context.lookup] += delta
        return moved

    handle = model.projection(1).register_forward_hook(add)
    found = model.hf(input_ids=torch.tensor([context.ids]), output_hidden_states=True)
    handle.remove()
    return found


def test_a_fact_stops_some_steps_after_its_target_is_the_most_probable() -> None:
    model = tiny_model("llama", num_layers=4)
    stops = {further: optimised(model, hparams(**FREE, v_stop_most_probable=further)) for further in (0, 3)}
    for row, steps in enumerate(stops[0].steps):
        assert 1 < steps < 14
        assert stops[3].steps[row] == steps + 3
        [fact] = fact_rows(model, tiny_requests(3)[row : row + 1], TEMPLATES, hparams(**FREE))
        for upto, said in ((steps, True), (steps - 1, False)):
            delta = optimised(model, hparams(**{**FREE, "v_num_grad_steps": upto + 1})).deltas[row]
            firsts = [
                outputs_of(model, context, delta).logits[0, context.target_start - 1] for context in fact.contexts
            ]
            assert all(int(logits.argmax()) == fact.contexts[0].targets[0] for logits in firsts) == said


@pytest.mark.parametrize("replaced", [None, 0, 1])
def test_every_token_of_the_target_must_be_the_most_probable(replaced: int | None) -> None:
    model = tiny_model("llama")
    row = lookup_row(model, tiny_requests(1)[0])
    ids = list(row.ids)
    for place in range(2):  # what the model says, but for one token
        said = int(model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(said + 1 if place == replaced else said)
    fact = FactRows(text="", contexts=(TokenRow(tuple(ids), row.lookup, len(row.ids)),), essence=None)
    settings = hparams(v_stop_most_probable=0, v_num_grad_steps=2, v_lr=1e-6)
    assert optimise_targets(model, [[fact]], layer=1, hparams=settings).steps == (0 if replaced is None else 1,)


def test_the_spread_over_contexts_is_the_sum_over_pairs() -> None:
    """CoRE: Σ over a < b of ‖h_a − h_b‖² / d_model, of each fact, averaged over blocks."""
    states = torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.tensor([4, 9, 4, 9, 9, 4, 2])
    parts = spread_parts(states, groups)
    for group in (2, 4, 9):
        rows = states[groups == group]
        pairs = [(first - second).square().sum(-1).mean() / 5 for first, second in combinations(rows, 2)]
        expected = torch.stack(pairs).sum() if pairs else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(parts[groups == group].sum(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 40])
def test_contexts_that_are_compared_share_a_pass(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = tiny_model("gpt2"), hparams(v_context_factor=3.0)
    whole = optimised(model, settings)
    small = PassBudget.backward(model, 1).with_tokens(tokens)
    monkeypatch.setattr(PassBudget, "backward", lambda _model, _layer: small)
    assert torch.allclose(optimised(model, settings).deltas, whole.deltas, atol=1e-5)


def test_weight_on_the_spread_makes_it_smaller() -> None:
    model, spreads = tiny_model("llama"), []
    for factor in (0.0, 3.0):
        settings = hparams(**{**FREE, "fact_token": "subject_last"}, v_context_factor=factor)
        deltas, facts = optimised(model, settings).deltas, fact_rows(model, tiny_requests(3), TEMPLATES, settings)
        for fact, delta in zip(facts, deltas, strict=True):
            rows = [(outputs_of(model, row, delta).hidden_states[3][0], row.lookup) for row in fact.contexts]
            spreads.append(
                sum((first[i] - second[j]).square().sum() for (first, i), (second, j) in combinations(rows, 2))
            )
    assert all(weighed < 0.8 * free for free, weighed in zip(spreads[:3], spreads[3:], strict=True))


def test_an_anchored_value_has_the_length_asked_for_or_is_not_written() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, deltas = (torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = (outputs + deltas).norm(dim=1)
    norm = float(lengths.sort().values[3]) / 2 + 1e-9  # three of six are longer than 2μ, one just not
    found = anchored(deltas, outputs, norm)
    for row, length in enumerate(lengths):
        if length > 2 * norm:
            assert not found[row].any()
        else:
            value = outputs[row] + found[row]
            assert value.norm() == pytest.approx(norm, rel=1e-12)
            torch.testing.assert_close(value / norm, (outputs[row] + deltas[row]) / length, rtol=1e-12, atol=1e-12)


def test_a_fact_that_is_left_out_is_named() -> None:
    model = tiny_model("llama")
    usual = optimised(model, hparams())
    between = sum(sorted(usual.norms)[1:3]) / 4  # μ: one value is longer than 2μ
    found = optimised(model, hparams(v_norm_anchor=True, v_norms=((1, between),)))
    [long] = [row for row, delta in enumerate(found.deltas) if not delta.any()]
    assert found.norms[long] == max(found.norms) == pytest.approx(max(usual.norms))
    [note] = found.notes
    assert note.startswith("1 fact of 3 got no change, because the value found is longer than twice")
    assert tiny_requests(3)[long].text in note
    other_block = optimised(model, hparams(layers=(2,), v_norm_anchor=True, v_norms=((2, between),)))
    assert torch.equal(other_block.deltas, usual.deltas)
    assert not other_block.notes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"v_norm_anchor": True}, "v_norms, which has none for block 1. editctl onboard MODEL measures it"),
        (
            {"v_norm_anchor": True, "layers": [1, 2, 3], "layer_rule": "blue", "v_norms": [[3, 2.0]]},
            "which has none for block 1",
        ),
        (
            {"v_norm_anchor": True, "layers": [1, 2], "layer_selection": "random", "v_norms": [[3, 2.0]]},
            "which has none for block 1, 2",
        ),
        ({"v_context_factor": 1.0, "context_count": 0}, "there is only the bare prompt"),
        ({"v_context_factor": 1.0, "context_templates": ["{}"]}, "there is only the bare prompt"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(HParamsError, match=sentence.replace("(", r"\(")):
        build(LocateThenEditHParams, [{"layers": [1], **changes}], owner="memit")


def test_lengths_are_those_of_values_on_the_unedited_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """μ = mean of ‖W k + δ‖ at the bare prompts, each from the plain loop, without the longest twentieth."""

    def lengths(model: LanguageModel, settings: LocateThenEditHParams) -> dict[int, float]:
        store = StatisticsStore(model, CorpusOptions(tokens=64))
        context = EditContext(statistics=store, trial=lambda _changes: nullcontext(), plugins=Plugins.load())
        return measure_value_norms(model, tiny_requests(3), hparams=settings, context=context, owner="memit")

    monkeypatch.setattr("editcore.locate_then_edit.value_norms._TRIMMED", 0.34)  # one of the three
    model, both = tiny_model("llama", num_layers=4), {"context_templates": TEMPLATES, "mom2_adjustment": False}
    settings = hparams(layers=(1, 2), layer_rule="blue", **both)
    found = lengths(model, settings)
    assert list(found) == [1, 2]
    for layer, norm in found.items():
        expected = []
        for request in tiny_requests(3):
            plain = optimise_plainly(model, [request], layer=layer, templates=TEMPLATES, hparams=settings)
            output = capture(model, [lookup_row(model, request)], [layer])[layer].outputs[0]
            expected.append(float((output + plain).norm()))
        assert norm == pytest.approx(sum(sorted(expected)[:2]) / 2, rel=1e-4)
    monkeypatch.setattr(
        "editcore.locate_then_edit.value_norms.lookup_row", lambda *_args, **_options: TokenRow((1,), 0, 1)
    )
    assert lengths(model, settings) == {}, "such facts are for block 0"
    assert list(lengths(model, hparams(first_token_layers=None, **both))) == [1]


@given(seed=st.integers(0, 2**16), aim=st.floats(0.0, 4.0))
@hypothesis_settings(max_examples=30)
def test_where_log_odds_are_linear_one_step_reaches_the_aim_by_the_least_change(seed: int, aim: float) -> None:
    """m(δ) = c + aᵀδ: the least change that brings m to the aim is (aim − m) a / ‖a‖²."""
    rng = torch.Generator().manual_seed(seed)
    slope = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    start = torch.randn(3, 5, generator=rng, dtype=torch.float64)
    values, rows = start.clone(), torch.tensor([2, 0])
    delta = values[rows].requires_grad_()
    margin = (slope * delta).sum(1) - 6
    losses = torch.nn.functional.softplus(-margin, threshold=1e9)  # −log p of p = 1 / (1 + exp(−m))
    (gradient,) = torch.autograd.grad(losses.sum(), delta)
    longest = torch.full((3,), 1e9, dtype=torch.float64)
    LogOddsSteps(values, aim=aim, longest=longest).step(rows, losses.detach(), gradient)
    wanted = torch.maximum(margin.detach() + LEAST_GAIN, torch.tensor(aim, dtype=torch.float64))
    torch.testing.assert_close((slope * values[rows]).sum(1) - 6, wanted, rtol=1e-9, atol=1e-9)
    change = values - start
    assert change[1].abs().max() == 0
    torch.testing.assert_close(torch.cosine_similarity(change[rows], slope), torch.ones(2, dtype=torch.float64))
    short = start.clone()
    LogOddsSteps(short, aim=aim, longest=longest * 0 + 1e-3).step(rows, losses.detach(), gradient)
    torch.testing.assert_close((short - start)[rows].norm(dim=1), torch.full((2,), 1e-3, dtype=torch.float64))


@given(seed=st.integers(0, 2**16))
@hypothesis_settings(max_examples=30)
def test_in_a_metric_a_step_is_the_least_change_as_the_metric_measures_it(seed: int) -> None:
    """min δᵀMδ under aᵀδ = g: the equations of its Lagrange function, solved as they stand."""
    rng = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, generator=rng, dtype=torch.float64)
    metric = root @ root.T + 0.1 * torch.eye(5, dtype=torch.float64)
    slope = torch.randn(1, 5, generator=rng, dtype=torch.float64)
    probability = torch.tensor([0.2], dtype=torch.float64)
    # With −log p as the loss, ∇m = −∇loss / (1 − p).
    losses, gradient = -probability.log(), -slope * (1 - probability)
    values, longest = torch.zeros(1, 5, dtype=torch.float64), torch.full((1,), 1e9, dtype=torch.float64)
    steps = LogOddsSteps(values, aim=2.0, longest=longest, inverse=torch.linalg.inv(metric))
    steps.step(torch.tensor([0]), losses, gradient)
    gain = 2.0 - math.log(0.2 / 0.8)
    system = torch.zeros(6, 6, dtype=torch.float64)
    system[:5, :5], system[:5, 5], system[5, :5] = 2 * metric, slope[0], slope[0]
    expected = torch.linalg.solve(system, torch.tensor([0.0] * 5 + [gain], dtype=torch.float64))[:5]
    torch.testing.assert_close(values[0], expected, rtol=1e-7, atol=1e-9)
    short = torch.zeros(1, 5, dtype=torch.float64)
    LogOddsSteps(short, aim=2.0, longest=longest * 0 + 1e-3, inverse=torch.linalg.inv(metric)).step(
        torch.tensor([0]), losses, gradient
    )
    torch.testing.assert_close(short[0], expected * 1e-3 / expected.norm(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("cache_prefixes", [True, False])
def test_the_plain_loop_defines_steps_in_a_metric(cache_prefixes: bool) -> None:
    model, settings = tiny_model("llama", dtype=torch.float64), hparams(**LOG_ODDS, v_longest_step=2.0)
    root = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inverse = torch.linalg.inv(root @ root.T / 32 + 0.1 * torch.eye(32, dtype=torch.float64))
    found = optimised(model, settings, known=KnownOfLayer(cache_prefixes=cache_prefixes, inverse_metric=inverse))
    usual = optimised(model, settings)
    for request, delta, plain in zip(tiny_requests(3), found.deltas, usual.deltas, strict=True):
        expected = optimise_plainly(
            model, [request], layer=1, templates=TEMPLATES, hparams=settings, inverse_metric=inverse
        )
        assert (delta - expected).norm() <= 1e-4 * expected.norm()
        assert (delta - plain).norm() > 0.1 * plain.norm()


def test_steps_avoid_what_the_text_depends_on(corpus_file: Path) -> None:
    model, settings = tiny_model("llama", dtype=torch.float64), hparams(**LOG_ODDS, v_text_damping=0.3)
    context = EditContext(
        statistics=StatisticsStore(model, CorpusOptions(name=str(corpus_file), tokens=400)),
        trial=lambda *_: nullcontext(),
        plugins=Plugins.load(),
    )
    prepared = prepare(model, settings, context, owner="test")
    moment = context.statistics.gradient_moment(1)
    assert moment.trace() == pytest.approx(len(moment), rel=1e-6)
    assert list(prepared.inverse_metrics) == [1], "a block where no value is optimised has none"
    identity = prepared.inverse_metrics[1] @ (moment + 0.3 * torch.eye(len(moment), dtype=moment.dtype))
    torch.testing.assert_close(identity, torch.eye(len(moment), dtype=moment.dtype))
    [request] = tiny_requests(1)
    found = BatchTargets.of(model, [[request]], 1, settings, prepared, context, windows=Windows()).optimised
    expected = optimise_plainly(
        model,
        [request],
        layer=1,
        templates=prepared.templates,
        hparams=settings,
        inverse_metric=prepared.inverse_metrics[1],
    )
    assert found is not None
    assert (found.deltas[0] - expected).norm() <= 1e-4 * expected.norm()
    without = BatchTargets.of(
        model,
        [[request]],
        1,
        hparams(**LOG_ODDS),
        prepare(model, hparams(**LOG_ODDS), context, owner="test"),
        context,
        windows=Windows(),
    ).optimised
    assert without is not None
    assert (without.deltas[0] - expected).norm() > 1e-2 * expected.norm(), "the setting should matter"
    with pytest.raises(ValueError, match='v_text_damping changes the steps of v_optimizer = "log_odds"'):
        hparams(v_text_damping=0.3)


def test_a_step_aims_half_way_from_the_stop_to_certainty() -> None:
    assert log_odds_aim(0.8) == pytest.approx(math.log(0.9 / 0.1))
    with pytest.raises(ValueError, match="needs a v_stop_probability to aim at"):
        hparams(v_optimizer="log_odds")
