"""``trust`` in a session: it counts, also after an interruption, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edit_trust.extension import TrustExtension
from editcore import EditSession
from editcore.testing import tiny_model, tiny_requests

Open = Callable[..., EditSession]


@pytest.fixture
def open_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a session on a new tiny model, always the same one."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    emmet = {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 3}

    def _open(*plugins: str, directory: Path | None = None) -> EditSession:
        return EditSession.open(
            tiny_model(),
            editor="emmet",
            plugins=plugins,
            settings={"emmet": emmet},
            directory=directory,
        )

    return _open


def counts(session: EditSession) -> tuple[int, int]:
    extension = session.extensions["trust"]
    assert isinstance(extension, TrustExtension)
    return extension.batches, extension.edits


def test_it_counts(open_session: Open) -> None:
    session = open_session("trust")
    assert counts(session) == (0, 0)
    session.edit(tiny_requests(5), batch_size=2)
    assert counts(session) == (3, 5)


def test_a_resumed_run_goes_on_counting(open_session: Open, tmp_path: Path) -> None:
    open_session("trust", directory=tmp_path / "run").edit(tiny_requests(2))
    session = open_session("trust", directory=tmp_path / "run")
    assert counts(session) == (1, 2)
    session.edit(tiny_requests(4)[2:])
    assert counts(session) == (2, 4)


def test_it_changes_nothing(open_session: Open) -> None:
    with_it, without = open_session("trust"), open_session()
    for session in (with_it, without):
        session.edit(tiny_requests(2))
    name = with_it.model.layout.weight_name(1)
    assert torch.equal(with_it.model.weight(name), without.model.weight(name))
