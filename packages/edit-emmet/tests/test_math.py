"""EMMET through the model's own forward, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edit_emmet.editor import EmmetEditor
from edit_emmet.hparams import EmmetHParams
from editcore import EditBatch, EditContext, HParamsError, LanguageModel, Plugins, Proposal
from editcore.models.capture import capture
from editcore.models.tokens import lookup_row
from editcore.runs import RawBackend
from editcore.second_moments import CorpusOptions
from editcore.second_moments.statistics import StatisticsStore
from editcore.testing import TINY_FAMILIES, tiny_model, tiny_requests


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("The old town lies by the river. Anna Berg was born in Rome and works as a painter.\n" * 200)
    return path


def context_for(model: LanguageModel, corpus: Path) -> EditContext:
    store = StatisticsStore(model, CorpusOptions(name=str(corpus), tokens=2000), directory=corpus.parent / "statistics")
    backend = RawBackend()
    backend.open(model)
    return EditContext(statistics=store, trial=backend.trial, plugins=Plugins.load())


def propose(model: LanguageModel, corpus: Path, batch: EditBatch, **changes: object) -> tuple[EmmetHParams, Proposal]:
    values = {
        "layers": (1,),
        "v_num_grad_steps": 5,
        "v_lr": 0.1,
        "context_templates": ("{}", "Yes, yes. {}"),
        "key_weighting": "prompt",
        **changes,
    }
    hparams = EmmetHParams.model_validate(values)
    return hparams, EmmetEditor(hparams).propose(model, batch, context_for(model, corpus))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_fact_has_its_value_in_the_edited_model(family: str, corpus: Path) -> None:
    """(W + Δ)k = v at the lookup token of the bare prompt, whatever the family's orientation, bias and norms."""
    model = tiny_model(family, dtype=torch.float64)
    batch = EditBatch.of(tiny_requests(4))
    _, proposal = propose(model, corpus, batch)
    name = model.layout.weight_name(1)
    rows = [lookup_row(model, request) for request in batch.requests]
    with context_for(model, corpus).trial(proposal.changes):
        found = capture(model, rows, [1])[1].outputs
    expected = torch.stack([proposal.known[request.id].values[name] for request in batch.requests])
    assert (found - expected).norm() <= 1e-8 * expected.norm()
    assert (expected - capture(model, rows, [1])[1].outputs).norm() > 1e-3, "the edit must ask for something"


def test_the_update_is_the_closed_form(corpus: Path) -> None:
    """ΔW = R (KᵀC⁻¹K + λI)⁻¹KᵀC⁻¹, recomputed from the proposal's keys and values with plain inverses."""
    model = tiny_model("llama", dtype=torch.float64)
    batch = EditBatch.of(tiny_requests(5))
    moment = context_for(model, corpus).statistics.moments([1])[1]
    name = model.layout.weight_name(1)
    for ridge in (0.0, 0.3):
        _, proposal = propose(model, corpus, batch, emmet_lambda=ridge, mom2_update_weight=2.0, key_weighting="mean")
        known = [proposal.known[request.id] for request in batch.requests]
        keys = torch.stack([target.keys[name] for target in known]).T  # [d_in, n]
        values = torch.stack([target.values[name] for target in known]).T
        residuals = values - model.weight(name) @ keys
        inverse = torch.linalg.inv(2.0 * moment)
        system = keys.T @ inverse @ keys + ridge * torch.eye(5, dtype=torch.float64)
        expected = residuals @ torch.linalg.inv(system) @ keys.T @ inverse
        assert (proposal.changes[name].dense() - expected).norm() <= 1e-8 * expected.norm()


def test_several_layers_together_reach_the_value(corpus: Path) -> None:
    """After the last layer the residual stream has moved by δ: each layer took its share of what was left."""
    model = tiny_model("llama", num_layers=4, dtype=torch.float64)
    batch = EditBatch.of(tiny_requests(3))
    _, proposal = propose(model, corpus, batch, layers=(0, 1, 2))
    rows = [lookup_row(model, request) for request in batch.requests]
    before = capture(model, rows, [2])[2].block_outputs
    with context_for(model, corpus).trial(proposal.changes):
        moved = capture(model, rows, [2])[2].block_outputs - before
    asked = torch.tensor([evidence.figures["delta_norm"] for evidence in proposal.evidence], dtype=torch.float64)
    assert (asked > 1e-3).all(), "the edit must ask for something"
    assert torch.allclose(moved.norm(dim=1), asked, rtol=1e-6)
    assert list(proposal.changes) == [model.layout.weight_name(layer) for layer in (0, 1, 2)]


def test_auto_weight_gives_the_median_fact_its_fraction(corpus: Path) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    batch = EditBatch.of(tiny_requests(1))
    _, proposal = propose(model, corpus, batch, emmet_lambda=0.1, mom2_update_weight="auto", mom2_auto_fraction=0.9)
    assert proposal.evidence[0].figures["fraction_reached"] == pytest.approx(0.9, rel=1e-6)


def test_a_large_weight_is_reported(corpus: Path) -> None:
    model = tiny_model("llama")
    _, proposal = propose(model, corpus, EditBatch.of(tiny_requests(2)), emmet_lambda=1.0, mom2_update_weight=1e9)
    assert any("mom2_update_weight" in note for note in proposal.notes)
    assert all(evidence.figures["fraction_reached"] < 0.01 for evidence in proposal.evidence)


def test_the_objective_adds_up(corpus: Path) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    batch = EditBatch.of(tiny_requests(3))
    _, exact = propose(model, corpus, batch, calculate_objective_value=True)
    _, soft = propose(model, corpus, batch, calculate_objective_value=True, emmet_lambda=100.0)
    assert exact.diagnostics["layer_1_new_edit_distance"] < 1e-12
    assert soft.diagnostics["layer_1_new_edit_distance"] > 1e-6
    assert soft.diagnostics["layer_1_preservation_distance"] < exact.diagnostics["layer_1_preservation_distance"]
    delta = exact.changes[model.layout.weight_name(1)].dense()
    moment = context_for(model, corpus).statistics.moments([1])[1]
    expected = float(torch.trace(delta @ moment @ delta.T))
    assert exact.diagnostics["layer_1_preservation_distance"] == pytest.approx(expected, rel=1e-8)
    _, normed = propose(
        model, corpus, batch, calculate_objective_value=True, mom2_update_weight=3.0, update_norm_lambda=0.5
    )
    delta = normed.changes[model.layout.weight_name(1)].dense()
    expected = float(torch.trace(delta @ moment @ delta.T))
    assert normed.diagnostics["layer_1_preservation_distance"] == pytest.approx(expected, rel=1e-8)


def test_random_layer_selection_draws_one_layer_per_batch_from_the_seed(corpus: Path) -> None:
    model = tiny_model("llama")
    drawn = []
    for index in range(8):
        batch = EditBatch.of(tiny_requests(1), index=index)
        settings = {"layers": (0, 1, 2), "layer_selection": "random", "v_num_grad_steps": 1}
        _, proposal = propose(model, corpus, batch, **settings)
        _, again = propose(model, corpus, batch, **settings)
        assert list(proposal.changes) == list(again.changes)
        assert len(proposal.changes) == 1
        drawn += list(proposal.changes)
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("llama", {"layers": (7,)}, "layer 7 does not exist"),
        ("gemma3_text", {"layers": (0, 1)}, "a norm follows the edited projection"),
        ("gemma3_text", {"clamp_norm": "stream"}, 'clamp_norm is "stream", but in .* a norm follows'),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    family: str, changes: dict[str, object], sentence: str, corpus: Path
) -> None:
    with pytest.raises(HParamsError, match=sentence):
        propose(tiny_model(family), corpus, EditBatch.of(tiny_requests(1)), **changes)
