"""Editors that are not locate-then-edit methods, in one session with replay and trust, undone in any order, reopened,
and with the backend lora."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from editcore import EditSession, LanguageModel, ModelError, SessionConfig
from editcore.evaluation import score_targets
from editcore.testing import repeating_model, tiny_model, tiny_requests

FACTS = tiny_requests(6)
TRUST = {
    "trust_threshold": 0, "trust_min_efficacy": 0, "trust_min_retention": 0, "trust_max_kl": 1e9,
    "trust_max_perplexity_ratio": 1e9, "trust_max_norm_growth": 1e9, "trust_text_tokens": 64,
}  # fmt: skip
"""Limits that every batch keeps: trust measures, and accepts."""


@dataclass(frozen=True)
class Case:
    """An editor with its settings, and a model for it."""

    editor: str
    settings: dict[str, object] = field(default_factory=dict)
    model: Callable[[], LanguageModel] = tiny_model
    beside: bool = False
    """Whether the edits are kept beside the weights."""

    def __str__(self) -> str:
        return self.editor

    def open(self, directory: Path | None = None, *, plugins: Sequence[str] = (), backend: str = "raw") -> EditSession:
        """A session on a new model."""
        settings = {self.editor: self.settings, "trust": TRUST}
        wanted = {name: values for name, values in settings.items() if name == self.editor or name in plugins}
        config = SessionConfig(editor=self.editor, settings=wanted, plugins=plugins, backend=backend)
        return EditSession.open(self.model(), config, directory=directory)


FEW_STEPS = {"layers": [1], "v_num_grad_steps": 4, "context_templates": ["{}", "Yes. {}"]}
CASES = (
    Case("retrieval", {}, repeating_model, beside=True),
    Case("memory", FEW_STEPS, beside=True),
    Case("memory", {**FEW_STEPS, "rule": "grace", "fact_token": "last", "key_weighting": "prompt"}, beside=True),
    Case("ft", {"layer": 1, "epochs": 2, "learning_rate": 1e-2}),
    Case("ft", {"layer": 1, "epochs": 2, "learning_rate": 1e-2, "rank": 2}),
    Case("ultra", {"weights": [["mlp.gate_proj", [0, 1]], ["self_attn.o_proj", [1]]], "learning_rate": 1e-3}),
)
every_editor = pytest.mark.parametrize("case", CASES, ids=str)


def state(session: EditSession) -> tuple[str, list[float]]:
    """The bits of the weights and of what the model answers."""
    scores = score_targets(session.model, [fact.text for fact in FACTS], [fact.target_new for fact in FACTS])
    return session.model.fingerprint(), [score.nll for score in scores]


@every_editor
@pytest.mark.parametrize("plugins", [(), ("replay", "trust")], ids=["alone", "with replay and trust"])
def test_undone_in_any_order_and_redone_a_session_is_what_it_was(
    case: Case, plugins: tuple[str, ...], tmp_path: Path
) -> None:
    ids = [fact.id for fact in FACTS]
    session = case.open(tmp_path / "run", plugins=plugins)
    base = state(session)
    session.edit(FACTS, batch_size=2)
    assert len(session.requests) == len(FACTS)
    edited = state(session)
    assert edited[1] != base[1]
    assert (edited[0] == base[0]) == case.beside

    session.undo(ids[3], ids[0])
    without = state(session)
    assert without != edited
    session.redo(ids[0])
    session.undo(batches=[2])
    session.undo(ids[0])
    session.redo(batches=[2])
    assert state(session) == without, "the order of undoing shows"
    assert state(case.open(tmp_path / "run", plugins=plugins)) == without, "a reopened session is another one"
    session.redo(ids[0], ids[3])
    assert state(session) == edited
    session.undo(batches=[0, 1, 2])
    assert state(session) == base


@every_editor
def test_a_session_that_ended_goes_on_as_if_it_had_not(case: Case, tmp_path: Path) -> None:
    plugins = ("replay", "trust")
    straight = case.open(tmp_path / "straight", plugins=plugins)
    straight.edit(FACTS, batch_size=2)
    case.open(tmp_path / "two", plugins=plugins).edit(FACTS[:4], batch_size=2)
    case.open(tmp_path / "two", plugins=plugins).edit(FACTS[4:], batch_size=2)
    lines = [(tmp_path / name / "ledger.jsonl").read_bytes() for name in ("straight", "two")]
    assert lines[0] == lines[1]


@every_editor
def test_with_lora_the_model_says_the_same(case: Case, tmp_path: Path) -> None:
    raw, lora = case.open(), case.open(backend="lora")
    for session in (raw, lora):
        session.edit(FACTS, batch_size=2)
    assert state(lora)[1] == pytest.approx(state(raw)[1], rel=1e-3, abs=1e-4)
    lora.undo(FACTS[2].id)
    lora.undo(batches=[0, 2])
    lora.undo(batches=[1])
    assert state(lora) == state(case.open())


@every_editor
def test_edits_beside_the_weights_say_that_they_cannot_be_saved(case: Case, tmp_path: Path) -> None:
    session = case.open()
    session.edit(FACTS)
    if case.beside:
        with pytest.raises(ModelError, match="kept beside the weights"):
            session.save(tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []
    else:
        session.save(tmp_path / "saved")
        assert LanguageModel.load(tmp_path / "saved").fingerprint() == session.model.fingerprint()
