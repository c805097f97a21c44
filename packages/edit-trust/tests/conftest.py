"""A tiny model with second moments from a small text, and sessions that trust watches."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_trust.extension import TrustExtension
from editcore import EditSession, LanguageModel, SessionConfig
from editcore.testing import tiny_model, tiny_requests

Open = Callable[..., EditSession]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A text file of a few thousand tokens."""
    words = " ".join(request.text for request in tiny_requests(80)).split()
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return str(path)


@pytest.fixture
def heldout(tmp_path: Path) -> str:
    """A file of records with neighbourhood prompts, about people whom no test edits."""
    path = tmp_path / "heldout.jsonl"
    records = (
        {
            **request.model_dump(exclude={"tags"}),
            "neighborhood_prompts": [request.text, f"The colleagues of {request.text}"],
        }
        for request in tiny_requests(80)[40:]
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def loose(corpus: str, heldout: str) -> dict[str, Any]:
    """Settings under which no clean batch of a tiny model fails: it knows nothing, so everything moves it."""
    return {
        "trust_threshold": 0.0,
        "trust_heldout": heldout,
        "trust_text": corpus,
        "trust_text_tokens": 64,
        "trust_min_efficacy": 0.0,
        "trust_min_retention": 0.0,
        "trust_max_kl": 1e6,
        "trust_max_perplexity_ratio": 1e6,
        "trust_max_norm_growth": 1e6,
    }


@pytest.fixture(scope="session")
def base() -> LanguageModel:
    """A tiny model in float64 that no test edits: finding its layout takes longer than a session."""
    return tiny_model(dtype=torch.float64)


@pytest.fixture
def open_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: LanguageModel, corpus: str, loose: dict[str, Any]
) -> Open:
    """Opens a session with trust on a copy of the tiny model."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))

    def _open(
        *,
        trust: dict[str, Any] | None = None,
        editor: str = "emmet",
        own: dict[str, Any] | None = None,
        plugins: tuple[str, ...] = ("trust",),
        directory: Path | None = None,
        **options: Any,
    ) -> EditSession:
        settings = {editor: {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 5, **(own or {})}}
        if "trust" in plugins:
            settings["trust"] = {**loose, **(trust or {})}
        if "replay" in plugins:
            settings["replay"] = {"replay_rate": 0.5, "replay_asked": 0}
        return EditSession.open(
            copy.deepcopy(base),
            SessionConfig(
                editor=editor, plugins=plugins, settings=settings, corpus=corpus, corpus_tokens=1024, **options
            ),
            directory=directory,
        )

    return _open


@pytest.fixture
def trust_of() -> Callable[[EditSession], TrustExtension]:
    """The extension of a session."""

    def _trust_of(session: EditSession) -> TrustExtension:
        extension = session.extensions["trust"]
        assert isinstance(extension, TrustExtension)
        return extension

    return _trust_of
