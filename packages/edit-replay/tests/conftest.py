"""A tiny model with second moments from a small text, and sessions that replay on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_replay.extension import ReplayExtension
from editcore import EditSession, Plugins, SessionConfig
from editcore.testing import tiny_model, tiny_requests

Open = Callable[..., EditSession]

LAYER = 1


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A text file of a few thousand tokens."""
    words = " ".join(request.text for request in tiny_requests(80)).split()
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return str(path)


@pytest.fixture
def open_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: str) -> Open:
    """Opens a session of emmet with replay on a new tiny model in float64."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))

    def _open(
        *,
        replay: dict[str, Any] | None = None,
        emmet: dict[str, Any] | None = None,
        editor: str = "emmet",
        hparams: dict[str, Any] | None = None,
        directory: Path | None = None,
        registry: Plugins | None = None,
        **options: Any,
    ) -> EditSession:
        settings = {
            editor: {
                "layers": [LAYER],
                "context_templates": ["{}"],
                "v_num_grad_steps": 5,
                **(emmet or {}),
                **(hparams or {}),
            },
            # A tiny model says nothing with confidence, so that every replayed or asked fact would be optimised anew.
            "replay": {"replay_mode": "requests", "replay_refresh": 0.0, "replay_asked": 0.0, **(replay or {})},
        }
        model = tiny_model(dtype=torch.float64)
        return EditSession.open(
            model,
            SessionConfig(
                editor=editor, plugins=["replay"], settings=settings, corpus=corpus, corpus_tokens=1024, **options
            ),
            directory=directory,
            registry=registry,
        )

    return _open


@pytest.fixture
def replay_of() -> Callable[[EditSession], ReplayExtension]:
    """The extension of a session."""

    def _replay_of(session: EditSession) -> ReplayExtension:
        extension = session.extensions["replay"]
        assert isinstance(extension, ReplayExtension)
        return extension

    return _replay_of
