"""Weights of few digits: what is measured is what is written, and what is lost in writing is told."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import EditSession, LanguageModel, SessionConfig
from editcore.runs import BatchResult
from editcore.testing import tiny_model, tiny_requests
from torch import Tensor

FACTS = tiny_requests(4)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    words = " ".join(request.text for request in tiny_requests(80)).split()
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return path


def opened(model: LanguageModel, corpus: Path, editor: str = "emmet", backend: str = "raw", **own: Any) -> EditSession:
    settings = {"layers": [0, 1], "context_templates": ["{}"], "v_num_grad_steps": 3, **own}
    if editor == "rome":
        settings["layers"] = [1]
    return EditSession.open(
        model,
        SessionConfig(
            editor=editor, backend=backend, settings={editor: settings}, corpus=str(corpus), corpus_tokens=1024
        ),
    )


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: model.weight(name).detach().clone() for name in model.weights.names()}


def figures(result: BatchResult) -> list[float]:
    return [figure.figures["fraction_written"] for figure in result.proposal.evidence]


def by_hand(model: LanguageModel, session: EditSession, before: dict[str, Tensor]) -> list[float]:
    """METHODS: Σ⟨(W_after − W_before) k, r⟩ / Σ⟨r, r⟩ over the layers, r = v − W_before k."""
    [entry] = session.ledger.entries
    found = []
    for request in entry.requests:
        known, written, asked = entry.known[request.id], 0.0, 0.0
        for layer in (0, 1):
            name = model.layout.weight_name(layer)
            projection, now = model.projection(layer), model.weight(name).clone()
            change = model.as_out_in(name, now).double() - model.as_out_in(name, before[name]).double()
            with torch.no_grad():
                model.weight(name).copy_(before[name])
                residual = known.values[name] - projection(known.keys[name].to(model.dtype)[None])[0].double()
                model.weight(name).copy_(now)
            written += float((change @ known.keys[name]) @ residual)
            asked += float(residual @ residual)
        found.append(written / asked)
    return found


@pytest.mark.parametrize(("family", "width"), [("llama", "intermediate_size"), ("gpt2", "n_inner")])
@pytest.mark.parametrize("clamp", [0.04, 0.01])
def test_an_edit_below_the_last_digit_is_told(
    family: str, width: str, clamp: float, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(family, dtype=torch.bfloat16, config={width: 768})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # of weights that are large beside an edit little of it is left
        for layer in (0, 1):
            weight = model.weight(model.layout.weight_name(layer))
            weight.add_(0.5 * torch.randn(weight.shape, generator=generator).sign())
    before = weights(model)
    session = opened(model, corpus, clamp_norm_factor=clamp, mom2_adjustment=False)
    [result] = session.edit(FACTS)
    if clamp == 0.04:  # else a fact asks for less than the model's outputs are rounded by, and has no such figure
        shares = figures(result)
        assert shares == pytest.approx(by_hand(model, session, before), rel=1e-6)
        assert min(shares) < 0.9 * min(figure.figures["fraction_reached"] for figure in result.proposal.evidence)
    [note] = [note for note in result.proposal.notes if "too few digits" in note]
    assert "bfloat16" in note
    assert "--dtype float32" in note
    assert "--backend lora" in note
    assert note in caplog.text
    [entry] = session.ledger.entries
    assert entry.notes == result.proposal.notes
    assert entry.evidence == result.proposal.evidence


@pytest.mark.parametrize("editor", ["emmet", "memit", "rome"])
def test_an_edit_that_keeps_its_digits_is_not(editor: str, corpus: Path) -> None:
    session = opened(tiny_model(dtype=torch.bfloat16), corpus, editor, clamp_norm_factor=4.0)
    [result] = session.edit(FACTS[:1])
    [share] = figures(result)
    [evidence] = result.proposal.evidence
    assert share == pytest.approx(evidence.figures["fraction_reached"], abs=0.05)
    assert not [note for note in result.proposal.notes if "digits" in note]


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "raw"), (torch.bfloat16, "lora")])
def test_where_nothing_is_rounded_nothing_is_measured(dtype: torch.dtype, backend: str, corpus: Path) -> None:
    session = opened(tiny_model(dtype=dtype), corpus, backend=backend, clamp_norm_factor=0.01)
    [result] = session.edit(FACTS)
    assert result.applied
    assert not any("fraction_written" in figure.figures for figure in result.proposal.evidence)
    assert not [note for note in result.proposal.notes if "digits" in note]


def test_a_type_that_is_slow_here_is_computed_in_float32_and_written_as_itself(corpus: Path, tmp_path: Path) -> None:
    """The numbers are those of bfloat16, whoever opens the run; only the arithmetic is float32's."""
    narrow, wide = (tiny_model("gpt2", dtype=torch.bfloat16) for _ in range(2))
    wide.compute_in_float32()
    assert (wide.dtype, wide.compute_dtype, narrow.compute_dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert wide.base_fingerprint == narrow.base_fingerprint
    assert all(torch.equal(wide.weight(name), narrow.weight(name).float()) for name in narrow.weights.names())
    assert wide.hf(input_ids=torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32
    before = weights(wide)
    with opened_in(tmp_path / "run", wide, corpus) as session:
        [result] = session.edit(FACTS)
        assert figures(result) != [1.0] * len(FACTS), "what rounding leaves of an edit is measured"
        edited = weights(wide)
        assert any(not torch.equal(before[name], edited[name]) for name in before)
        assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in edited.values())
        session.save(tmp_path / "of-wide")
    with opened_in(tmp_path / "run", narrow, corpus) as session:
        assert all(torch.equal(narrow.weight(name).float(), edited[name]) for name in edited)
        session.save(tmp_path / "of-narrow")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("of-wide", "of-narrow")]
    assert files[0] == files[1]


@contextmanager
def opened_in(directory: Path, model: LanguageModel, corpus: Path) -> Iterator[EditSession]:
    settings = {"layers": [0, 1], "context_templates": ["{}"], "v_num_grad_steps": 3}
    config = SessionConfig(editor="emmet", settings={"emmet": settings}, corpus=str(corpus), corpus_tokens=1024)
    session = EditSession.open(model, config, directory=directory)
    yield session
    session.close()
