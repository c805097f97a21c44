"""Sessions on tiny models, and their second moments from a small text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from editcore import EditSession, SessionConfig
from editcore.testing import tiny_model, tiny_requests


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text file that the tiny tokenizers know, and a cache that no other test sees."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    words = " ".join(request.text for request in tiny_requests(80)).split()
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return path


@pytest.fixture
def session(corpus: Path) -> Callable[..., EditSession]:
    """Opens a session: ``session("lora", editor="rome", rome={"layers": [1]}, lora={"lora_rank": 4})``."""

    def make(
        backend: str,
        *,
        editor: str = "emmet",
        plugins: tuple[str, ...] = (),
        family: str = "llama",
        **settings: dict[str, object],
    ) -> EditSession:
        quick = {"v_num_grad_steps": 4, "context_templates": ["{}"], "layers": [1]}
        return EditSession.open(
            tiny_model(family),
            SessionConfig(
                editor=editor,
                plugins=plugins,
                backend=backend,
                settings={**settings, editor: {**quick, **settings.get(editor, {})}},
                corpus=str(corpus),
                corpus_tokens=1024,
            ),
        )

    return make
