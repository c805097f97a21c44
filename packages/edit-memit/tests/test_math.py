"""MEMIT against an independent slow loop over layers, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edit_memit.editor import MemitEditor
from edit_memit.hparams import MemitHParams
from editcore import EditBatch, EditContext, EditRequest, EditSession, LanguageModel, Plugins, Proposal, SessionConfig
from editcore.locate_then_edit import fact_rows, optimise_targets
from editcore.models.tokens import lookup_row
from editcore.runs import RawBackend
from editcore.second_moments import CorpusOptions
from editcore.second_moments.statistics import StatisticsStore
from editcore.testing import tiny_model, tiny_requests

TEMPLATES = ("{}", "Yes, yes. {}", "The city is in the north. {}")
LAYERS = (0, 1, 2)  # of four: what the last block adds at the subject reaches no later token


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


def propose(model: LanguageModel, corpus: Path, batch: EditBatch, **changes: object) -> tuple[MemitHParams, Proposal]:
    values = {"layers": LAYERS, "v_num_grad_steps": 5, "v_lr": 0.1, "context_templates": TEMPLATES, **changes}
    hparams = MemitHParams.model_validate(values)
    return hparams, MemitEditor(hparams).propose(model, batch, context_for(model, corpus))


def see(model: LanguageModel, request: EditRequest, template: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Input of the layer's projection, and output of the last edited block, by hooks on one unpadded text."""
    row = lookup_row(model, request, template=template)
    seen: list[np.ndarray] = []
    handles = [
        model.projection(layer).register_forward_hook(lambda _, args, __: seen.append(args[0][0, row.lookup].numpy())),
        model.block(LAYERS[-1]).register_forward_hook(
            lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, row.lookup].numpy())
        ),
    ]
    with torch.no_grad():
        model.hf(input_ids=torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("count", "weight"), [(4, 3.0), (4, 500.0)])
def test_three_layers_are_those_of_a_slow_loop(family: str, count: int, weight: float, corpus: Path) -> None:
    model = tiny_model(family, num_layers=4, dtype=torch.float64)
    batch = EditBatch.of(tiny_requests(count))
    hparams, proposal = propose(model, corpus, batch, mom2_update_weight=weight)

    moments = context_for(model, corpus).statistics.moments(LAYERS)
    targets = optimise_targets(
        model,
        [[fact] for fact in fact_rows(model, batch.requests, TEMPLATES, hparams)],
        layer=LAYERS[-1],
        hparams=hparams,
    )
    asked = [
        see(model, request, "{}", LAYERS[-1])[1] + targets.deltas[row].double().numpy()
        for row, request in enumerate(batch.requests)
    ]
    changed = tiny_model(family, num_layers=4, dtype=torch.float64)
    for number, layer in enumerate(LAYERS):
        keys, residuals = [], []
        for row, request in enumerate(batch.requests):
            bare, *others = [see(changed, request, template, layer)[0] for template in TEMPLATES]
            keys.append(bare / 2 + sum(others) / (2 * len(others)))
            residuals.append((asked[row] - see(changed, request, "{}", layer)[1]) / (len(LAYERS) - number))
        gram = np.stack(keys).T @ np.stack(keys) + weight * moments[layer].numpy()  # KKᵀ + wC, [d_in, d_in]
        expected = np.linalg.solve(gram, np.stack(keys).T @ np.stack(residuals)).T  # R Kᵀ (…)⁻¹, [d_out, d_in]
        name = changed.layout.weight_name(layer)
        found = proposal.changes[name].dense().numpy()
        assert np.linalg.norm(expected) > 1e-3, "the edit must ask for something"
        assert np.linalg.norm(found - expected) <= 1e-8 * np.linalg.norm(expected), f"layer {layer}"
        with torch.no_grad():
            weights = changed.weight(name)
            step = torch.from_numpy(expected)
            weights += step.T if family == "gpt2" else step


def test_auto_weight_gives_the_median_fact_its_fraction(corpus: Path) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    _, proposal = propose(model, corpus, EditBatch.of(tiny_requests(1)), layers=(1,), mom2_auto_fraction=0.9)
    [evidence] = proposal.evidence
    assert evidence.figures["fraction_reached"] == pytest.approx(0.9, rel=1e-6)
    assert proposal.diagnostics["layer_1_moment_weight"] == pytest.approx(evidence.figures["key_energy"] / 9, rel=1e-6)


def test_a_published_weight_that_does_not_fit_the_model_is_reported(corpus: Path) -> None:
    model = tiny_model("llama", num_layers=4)
    _, proposal = propose(model, corpus, EditBatch.of(tiny_requests(2)), mom2_update_weight=1e9)
    assert any("mom2_update_weight" in note for note in proposal.notes)
    assert all(evidence.figures["fraction_reached"] < 0.01 for evidence in proposal.evidence)


def test_a_heavier_fact_gets_more_of_its_residual(corpus: Path) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    requests = tiny_requests(2)
    light, heavy = (
        propose(
            model,
            corpus,
            EditBatch(index=0, requests=requests, weights=(1.0, weight), num_new=2),
            layers=(1,),
            mom2_update_weight=20.0,
        )[1]
        .evidence[1]
        .figures["fraction_reached"]
        for weight in (1.0, 10.0)
    )
    assert heavy > light


@pytest.mark.parametrize("norm_weight", [0.0, 2.0])
def test_a_sequence_is_that_of_a_slow_loop(
    norm_weight: float, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """memit-seq: Δ_t = R_t K_tᵀ (w·C + λI + Σ_{s≤t} K_sK_sᵀ)⁻¹, with R_t measured behind the batches before.

    At one layer, the sum of the three changes is also the one change of all six facts, for the keys and values that
    they had.
    """
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    layer, weight = 1, 3.0
    settings = {
        "layers": [layer],
        "v_num_grad_steps": 3,
        "v_lr": 0.1,
        "context_templates": TEMPLATES,
        "mom2_update_weight": weight,
        "update_norm_lambda": norm_weight,
        "first_token_layers": None,
    }
    config = SessionConfig(editor="memit-seq", settings={"memit-seq": settings}, corpus=str(corpus), corpus_tokens=2000)
    session = EditSession.open(tiny_model("llama", num_layers=4, dtype=torch.float64), config)
    session.edit(tiny_requests(6), batch_size=2)
    model = tiny_model("llama", num_layers=4, dtype=torch.float64)
    name = model.layout.weight_name(layer)
    start = model.weight(name).detach().numpy().copy()
    width = start.shape[1]
    prior = weight * session.context.statistics.moments([layer])[layer].numpy() + norm_weight * np.eye(width)
    now, system, all_keys, all_values = start.copy(), prior.copy(), [], []
    for entry in session.ledger.entries:
        keys = []
        for request in entry.requests:  # no layer below is edited, so keys are those of the unedited model
            bare, *others = [see(model, request, template, layer)[0] for template in TEMPLATES]
            keys.append(bare / 2 + sum(others) / (2 * len(others)))
        columns = np.stack(keys).T
        values = np.stack([entry.known[request.id].values[name].numpy() for request in entry.requests]).T
        system += columns @ columns.T
        expected = np.linalg.solve(system, columns @ (values - now @ columns).T).T
        assert np.linalg.norm(expected) > 1e-3, "the edit must ask for something"
        found = entry.changes[name].dense().numpy()
        assert np.linalg.norm(found - expected) <= 1e-8 * np.linalg.norm(expected), f"batch {entry.batch}"
        now += expected
        all_keys.append(columns)
        all_values.append(values)
    columns, values = np.concatenate(all_keys, axis=1), np.concatenate(all_values, axis=1)
    at_once = np.linalg.solve(prior + columns @ columns.T, columns @ (values - start @ columns).T).T
    found = session.model.weight(name).detach().numpy() - start
    assert np.linalg.norm(found - at_once) <= 1e-8 * np.linalg.norm(at_once)
