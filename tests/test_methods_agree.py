"""Where the mathematics of two methods coincide, their editors agree, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from edit_emmet.editor import EmmetEditor
from edit_emmet.hparams import EmmetHParams
from edit_memit.editor import MemitEditor
from edit_memit.hparams import MemitHParams
from edit_rome.editor import RomeEditor
from edit_rome.hparams import RomeHParams
from editcore import Changes, EditBatch, EditContext, Editor, Plugins
from editcore.runs import RawBackend
from editcore.second_moments import CorpusOptions
from editcore.second_moments.statistics import StatisticsStore
from editcore.testing import tiny_model, tiny_requests

SHARED = {
    "v_num_grad_steps": 8,
    "v_lr": 0.1,
    "context_count": 3,  # sampled from the model with the context's seed
    "context_length": 6,
}


def emmet(**values: object) -> Editor:
    return EmmetEditor(EmmetHParams.model_validate({**SHARED, **values}))


def memit(**values: object) -> Editor:
    return MemitEditor(MemitHParams.model_validate({**SHARED, **values}))


def rome(**values: object) -> Editor:
    return RomeEditor(RomeHParams.model_validate({**SHARED, **values}))


@dataclass(frozen=True)
class Pair:
    first: Editor
    second: Editor
    edits: int


PAIRS = {
    "emmet, one fact, λ = 0 = rome, mean key": Pair(
        emmet(layers=(1,), emmet_lambda=0.0, key_weighting="mean"), rome(layers=(1,), key_mode="mean"), edits=1
    ),
    "the same with grouped keys": Pair(
        emmet(layers=(1,), emmet_lambda=0.0), rome(layers=(1,), key_mode="mean", key_weighting="grouped"), edits=1
    ),
    "emmet, one fact, λ = 0, bare key = rome, prompt key": Pair(
        emmet(layers=(0,), emmet_lambda=0.0, key_weighting="prompt"), rome(layers=(0,), key_mode="prompt"), edits=1
    ),
    "rome's three modes with one context": Pair(
        rome(layers=(1,), key_mode="original", context_count=0), rome(layers=(1,), context_count=0), edits=1
    ),
    "emmet, λ = 0.1, w = 30 = memit, w = 3": Pair(
        emmet(layers=(1,), emmet_lambda=0.1, mom2_update_weight=30.0),
        memit(layers=(1,), mom2_update_weight=3.0),
        edits=6,
    ),
    "the same on two layers": Pair(
        emmet(layers=(0, 1), emmet_lambda=0.1, mom2_update_weight=30.0),
        memit(layers=(0, 1), mom2_update_weight=3.0),
        edits=6,
    ),
    "emmet, auto = memit, auto": Pair(
        emmet(layers=(1,), emmet_lambda=0.1, mom2_update_weight="auto"),
        memit(layers=(1,), mom2_update_weight="auto"),
        edits=3,
    ),
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("The old town lies by the river. Anna Berg was born in Rome and works as a painter.\n" * 200)
    return path


def proposed(editor: Editor, family: str, edits: int, corpus: Path) -> Changes:
    """What an editor proposes for the same facts on the same new model."""
    model = tiny_model(family, dtype=torch.float64)
    store = StatisticsStore(model, CorpusOptions(name=str(corpus), tokens=2000), directory=corpus.parent / "statistics")
    backend = RawBackend()
    backend.open(model)
    context = EditContext(statistics=store, trial=backend.trial, plugins=Plugins.load(), seed=3)
    editor.prepare(model, context)
    return editor.propose(model, EditBatch.of(tiny_requests(edits)), context).changes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_two_methods_agree(pair: Pair, family: str, corpus: Path) -> None:
    first, second = (proposed(editor, family, pair.edits, corpus) for editor in (pair.first, pair.second))
    assert first.keys() == second.keys()
    for name, change in first.items():
        expected = second[name].dense()
        assert expected.norm() > 0
        assert (change.dense() - expected).norm() <= 1e-8 * expected.norm()
