"""AlphaEdit against its published formula in an independent slow loop over batches and layers, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edit_alphaedit.editor import null_dimensions
from edit_alphaedit.hparams import AlphaEditHParams
from editcore import EditRequest, EditSession, HParamsError, LanguageModel, SessionConfig
from editcore.locate_then_edit import Targets, batch_targets
from editcore.models.tokens import lookup_row
from editcore.testing import tiny_model, tiny_requests

TEMPLATES = ("{}", "Yes, yes. {}")
LAYERS = (0, 1, 2)  # of four: what the last block adds at the subject reaches no later token
PUBLISHED = {"nullspace_threshold": 0.02, "L2": 10.0}
# The published numbers fit keys of a certain scale, which these factors give to the tiny models.
SCALES = {"llama": ("up_proj.weight", 1 / 6), "gpt2": ("c_fc.weight", 1 / 3)}
Open = Callable[..., EditSession]


def model_of(family: str) -> LanguageModel:
    """A tiny model of four blocks in float64."""
    model = tiny_model(family, num_layers=4, dtype=torch.float64)
    ending, factor = SCALES[family]
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if name.endswith(ending):
                parameter *= factor
    return model


@pytest.fixture
def open_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a session of alphaedit on such a model."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The old town lies by the river. Anna Berg was born in Rome and paints.\n" * 200)

    def _open(*, family: str = "llama", **alphaedit: Any) -> EditSession:
        settings = {
            "layers": LAYERS,
            "v_num_grad_steps": 3,
            "v_lr": 0.1,
            "context_templates": TEMPLATES,
            **alphaedit,
        }
        config = SessionConfig(
            editor="alphaedit", settings={"alphaedit": settings}, corpus=str(corpus), corpus_tokens=2000
        )
        return EditSession.open(model_of(family), config)

    return _open


@pytest.fixture
def deltas(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Collects the δ of every batch; how they are found is tested elsewhere."""
    found: list[np.ndarray] = []
    optimise = batch_targets.optimise_targets

    def optimised(*args: Any, **options: Any) -> Targets:
        targets = optimise(*args, **options)
        found.append(targets.deltas.double().numpy())
        return targets

    monkeypatch.setattr(batch_targets, "optimise_targets", optimised)
    return found


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
@pytest.mark.parametrize("memory", ["keys", "none"])
def test_batches_are_those_of_the_published_formula(
    open_session: Open, deltas: list[np.ndarray], family: str, memory: str
) -> None:
    """Δ = Xᵀ, [P(KKᵀ + K_pK_pᵀ) + L2·I] X = P K Rᵀ, with P of the eigenvalues below the absolute threshold."""
    session = open_session(family=family, memory=memory, **PUBLISHED)
    session.edit(tiny_requests(6), batch_size=2)
    changed = model_of(family)
    projectors = {}
    for layer, moment in session.context.statistics.moments(LAYERS).items():
        left, singular, _ = np.linalg.svd(moment.numpy())
        kept = left[:, singular < 0.02]
        assert 0 < kept.shape[1] < len(left), "the threshold must take some directions and leave some"
        projectors[layer] = kept @ kept.T
    past = {layer: np.zeros_like(projector) for layer, projector in projectors.items()}
    for batch, requests in enumerate(tiny_requests(6)[start : start + 2] for start in (0, 2, 4)):
        asked = [
            see(changed, request, "{}", LAYERS[-1])[1] + deltas[batch][row] for row, request in enumerate(requests)
        ]
        for number, layer in enumerate(LAYERS):
            keys, residuals = [], []
            for row, request in enumerate(requests):
                bare, in_context = (see(changed, request, template, layer)[0] for template in TEMPLATES)
                keys.append((bare + in_context) / 2)
                residuals.append((asked[row] - see(changed, request, "{}", layer)[1]) / (len(LAYERS) - number))
            columns, residual = np.stack(keys).T, np.stack(residuals).T  # K [d_in, n], R [d_out, n]
            projector = projectors[layer]
            system = projector @ (columns @ columns.T + past[layer]) + 10 * np.eye(len(projector))
            expected = np.linalg.solve(system, projector @ columns @ residual.T).T
            name = changed.layout.weight_name(layer)
            found = session.ledger.entries[batch].changes[name].dense().numpy()
            assert np.linalg.norm(expected) > 1e-4, "the edit must ask for something"
            assert np.linalg.norm(found - expected) <= 1e-8 * np.linalg.norm(expected), f"batch {batch}, layer {layer}"
            if memory == "keys":
                past[layer] += columns @ columns.T
            with torch.no_grad():
                step = torch.from_numpy(expected)
                weight = changed.weight(name)
                weight += step.T if family == "gpt2" else step


def test_a_change_stays_in_the_null_space_and_its_share_is_reported(open_session: Open) -> None:
    session = open_session(nullspace_ratio=1.5)
    [result] = session.edit(tiny_requests(3))
    moments = session.context.statistics.moments(LAYERS)
    for layer, moment in moments.items():
        values, vectors = np.linalg.eigh(moment.numpy())
        text = vectors[:, values >= 1.5 * torch.from_numpy(values).median().item()]
        delta = result.proposal.changes[session.model.layout.weight_name(layer)].dense().numpy()
        assert np.linalg.norm(delta @ text) <= 1e-12 * np.linalg.norm(delta)
        kept = len(values) - text.shape[1]
        assert session.provenance["null_space_dimensions"][str(layer)] == kept
        assert result.proposal.diagnostics[f"layer_{layer}_subspace_share"] == kept / len(values)
    assert session.provenance["dimensions"] == len(values)


def test_auto_l2_is_that_of_the_first_batch(open_session: Open) -> None:
    """The median key of the first batch reaches the fraction; later batches keep the number, also after an undo."""
    session = open_session(layers=(1,), mom2_auto_fraction=0.9)
    first, second = session.edit(tiny_requests(2), batch_size=1)
    [evidence] = first.proposal.evidence
    assert evidence.figures["fraction_reached"] == pytest.approx(0.9, rel=1e-6)
    number = first.proposal.diagnostics["layer_1_moment_weight"]
    assert evidence.figures["key_energy"] == pytest.approx(9 * number, rel=1e-6)  # q = 9 L2
    assert second.proposal.diagnostics["layer_1_moment_weight"] == number
    session.undo(batches=[0])
    [third] = session.edit(tiny_requests(3)[2:])
    assert third.proposal.diagnostics["layer_1_moment_weight"] == number


def test_the_null_space_does_not_depend_on_the_scale_of_the_keys() -> None:
    values = torch.tensor([0.1, 0.2, 1.0, 1.9, 50.0], dtype=torch.float64)
    relative = AlphaEditHParams(layers=(0,), nullspace_ratio=2.0)
    absolute = AlphaEditHParams(layers=(0,), nullspace_threshold=0.3)
    assert [null_dimensions(scale * values, relative) for scale in (1e-3, 1.0, 1e3)] == [4, 4, 4]
    assert [null_dimensions(scale * values, absolute) for scale in (1e-3, 1.0, 1e3)] == [5, 2, 0]


def test_a_null_space_without_a_direction_is_refused(open_session: Open) -> None:
    with pytest.raises(HParamsError, match=r"no direction of layer 0 .* Raise nullspace_threshold"):
        open_session(nullspace_threshold=1e-12)


def test_a_null_space_of_nearly_everything_or_nothing_is_said(
    open_session: Open, caplog: pytest.LogCaptureFixture
) -> None:
    open_session()
    assert "null space of layer" not in caplog.text
    open_session(nullspace_threshold=1e6)
    assert "the null space of layer 2 has 64 of 64 dimensions" in caplog.text


def test_it_needs_second_moments() -> None:
    with pytest.raises(ValueError, match="null space is that of the second moment"):
        AlphaEditHParams(layers=(0,), mom2_adjustment=False)
