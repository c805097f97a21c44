"""ROME's change against numpy: the three key modes from the model's own keys, targets and second moment, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edit_rome.editor import RomeEditor
from edit_rome.hparams import RomeHParams
from editcore import EditBatch, EditContext, HParamsError, LanguageModel, Plugins, Proposal
from editcore.locate_then_edit import fact_rows, optimise_targets
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.models.capture import capture
from editcore.models.tokens import lookup_row
from editcore.runs import RawBackend
from editcore.second_moments import CorpusOptions
from editcore.second_moments.statistics import StatisticsStore
from editcore.testing import tiny_model, tiny_requests
from pydantic import ValidationError

TEMPLATES = ("{}", "Yes, yes. {}", "The city is in the north. {}")
BATCH = EditBatch.of(tiny_requests(1))


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


def propose(model: LanguageModel, corpus: Path, **changes: object) -> tuple[RomeHParams, Proposal]:
    values = {"layers": (1,), "v_num_grad_steps": 5, "v_lr": 0.1, "context_templates": TEMPLATES, **changes}
    hparams = RomeHParams.model_validate(values)
    return hparams, RomeEditor(hparams).propose(model, BATCH, context_for(model, corpus))


class Oracle:
    """What ROME's formulas need, from one plain forward pass per context, as numpy arrays."""

    def __init__(self, model: LanguageModel, corpus: Path, hparams: LocateThenEditHParams) -> None:
        [request] = BATCH.requests
        seen = [capture(model, [lookup_row(model, request, template=template)], [1])[1] for template in TEMPLATES]
        self.keys = np.stack([captured.inputs[0].numpy() for captured in seen])  # [contexts, d_in]
        self.outputs = np.stack([captured.outputs[0].numpy() for captured in seen])  # [contexts, d_out]
        self.moment = context_for(model, corpus).statistics.moments([1])[1].numpy()
        targets = optimise_targets(
            model, [[fact] for fact in fact_rows(model, [request], TEMPLATES, hparams)], layer=1, hparams=hparams
        )
        self.delta = targets.deltas[0].double().numpy()
        self.value = self.outputs[0] + self.delta  # v* = h₀ + δ

    def change(self, mode: str, asks: str) -> np.ndarray:
        """METHODS: ΔW = r uᵀ with u = C⁻¹k / ‖C⁻¹k‖ and r = (v* − W k') / (k'ᵀu)."""
        bare, bare_output = self.keys[0], self.outputs[0]
        mean, mean_output = self.keys.mean(0), self.outputs.mean(0)
        along = bare if mode == "prompt" else mean
        direction = np.linalg.inv(self.moment) @ along
        direction = direction / np.linalg.norm(direction)
        if mode == "mean":
            value = self.value if asks == "value" else mean_output + self.delta
            return np.outer((value - mean_output) / (mean @ direction), direction)
        return np.outer((self.value - bare_output) / (bare @ direction), direction)


MODES = [("mean", "shift"), ("mean", "value"), ("prompt", "shift"), ("original", "shift")]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("mode", "asks"), MODES)
def test_the_change_is_that_of_the_formula(family: str, mode: str, asks: str, corpus: Path) -> None:
    model = tiny_model(family, dtype=torch.float64)
    hparams, proposal = propose(model, corpus, key_mode=mode, mean_asks=asks)
    expected = Oracle(model, corpus, hparams).change(mode, asks)
    [(name, delta)] = proposal.changes.items()
    assert name == model.layout.weight_name(1)
    assert np.linalg.norm(delta.dense().numpy() - expected) <= 1e-8 * np.linalg.norm(expected)
    assert delta.rank == 1


def test_without_the_second_moment_the_key_is_the_direction(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2", dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(StatisticsStore, "moments", lambda *_: pytest.fail("no text is needed"))
        hparams, proposal = propose(model, corpus, mom2_adjustment=False)
    oracle = Oracle(model, corpus, hparams)
    oracle.moment = np.eye(len(oracle.moment))
    expected = oracle.change("mean", "shift")
    [delta] = proposal.changes.values()
    assert np.linalg.norm(delta.dense().numpy() - expected) <= 1e-8 * np.linalg.norm(expected)


def test_the_modes_differ(corpus: Path) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    name = model.layout.weight_name(1)
    found = [propose(model, corpus, key_mode=mode, mean_asks=asks)[1].changes[name].dense() for mode, asks in MODES]
    for index, first in enumerate(found):
        assert all((first - second).norm() > 1e-3 * first.norm() for second in found[:index])


@pytest.mark.parametrize("mode", ["original", "prompt"])
def test_the_bare_prompt_has_its_value_in_the_edited_model(mode: str, corpus: Path) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    _, proposal = propose(model, corpus, key_mode=mode)
    name, [request] = model.layout.weight_name(1), BATCH.requests
    known = proposal.known[request.id]
    with context_for(model, corpus).trial(proposal.changes):
        found = capture(model, [lookup_row(model, request)], [1])[1]
    assert torch.allclose(found.inputs[0], known.keys[name], rtol=1e-10)
    assert torch.allclose(found.outputs[0], known.values[name], rtol=1e-8)


def test_energy_and_alignment_of_the_original_form(corpus: Path) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    hparams, proposal = propose(model, corpus, key_mode="original")
    oracle = Oracle(model, corpus, hparams)
    bare, mean, inverse = oracle.keys[0], oracle.keys.mean(0), np.linalg.inv(oracle.moment)
    energy = bare @ inverse @ mean
    assert proposal.evidence[0].figures["key_energy"] == pytest.approx(energy, rel=1e-8)
    cosine = energy / np.sqrt((bare @ inverse @ bare) * (mean @ inverse @ mean))
    assert proposal.diagnostics["layer_1_key_alignment"] == pytest.approx(abs(cosine), rel=1e-8)
    size = float(
        proposal.changes[model.layout.weight_name(1)].norm() / model.weight(model.layout.weight_name(1)).norm()
    )
    assert proposal.diagnostics["layer_1_relative_change"] == pytest.approx(size, rel=1e-6)


def test_energy_of_one_key(corpus: Path) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    hparams, proposal = propose(model, corpus)
    oracle = Oracle(model, corpus, hparams)
    mean = oracle.keys.mean(0)
    energy = mean @ np.linalg.inv(oracle.moment) @ mean
    assert proposal.evidence[0].figures["key_energy"] == pytest.approx(energy, rel=1e-8)
    assert "layer_1_key_alignment" not in proposal.diagnostics


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warn_relative_change": 1e-6}, ["times as long as the weight", "warn_relative_change is 1e-06"]),
        ({"key_mode": "original", "warn_key_alignment": 1.0}, ["cosine in C⁻¹", "key_mode = 'mean'"]),
    ],
)
def test_a_disabling_edit_is_reported(changes: dict[str, object], words: list[str], corpus: Path) -> None:
    _, proposal = propose(tiny_model("llama"), corpus, **changes)
    [note] = proposal.notes
    assert all(word in note for word in words)


def test_an_ordinary_edit_is_not_reported(corpus: Path) -> None:
    _, proposal = propose(tiny_model("llama"), corpus, warn_relative_change=1e6, key_mode="prompt")
    assert proposal.notes == ()


def test_layers_drawn_for_each_fact(corpus: Path) -> None:
    _, proposal = propose(tiny_model("llama"), corpus, layers=(0, 1), layer_selection="random")
    assert len(proposal.changes) == 1


def test_several_layers_are_refused() -> None:
    with pytest.raises(ValidationError, match="each fact is written into one layer"):
        RomeHParams(layers=(1, 2))


def test_a_layer_that_does_not_exist_is_refused(corpus: Path) -> None:
    with pytest.raises(HParamsError, match="layer 9 does not exist"):
        propose(tiny_model("llama"), corpus, layers=(9,))
