"""``in-turn`` in sessions of the extension that it is for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from editcore import EditSession, Plugins, SessionConfig
from editcore.testing import tiny_model, tiny_requests

Open = Callable[..., EditSession]

REQUESTS = tiny_requests(10)
NAMES = [request.id for request in REQUESTS]


@pytest.fixture
def open_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a session that replays one fact in each batch of two."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join([request.text for request in tiny_requests(80)] * 3), encoding="utf-8")

    def open_it(directory: Path | None = None) -> EditSession:
        return EditSession.open(
            tiny_model(),
            SessionConfig(
                editor="emmet",
                plugins=["replay"],
                settings={
                    "emmet": {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 2},
                    "replay": {"replay_strategy": "in-turn", "replay_asked": 0},
                },
                corpus=str(corpus),
                corpus_tokens=1024,
            ),
            directory=directory,
        )

    return open_it


def replayed(session: EditSession) -> list[list[str]]:
    return [[request.id for request in entry.requests[entry.num_new :]] for entry in session.ledger.entries]


def in_pairs(session: EditSession, first: int, last: int) -> None:
    session.edit(REQUESTS[first:last], batch_size=2)


def test_every_fact_has_its_turn(open_session: Open) -> None:
    session = open_session()
    in_pairs(session, 0, 10)
    assert replayed(session) == [[], *([name] for name in NAMES[:4])]


def test_resumed_it_goes_on_where_it_was(open_session: Open, tmp_path: Path) -> None:
    first = open_session(tmp_path / "run")
    in_pairs(first, 0, 6)
    first.close()
    second = open_session(tmp_path / "run")
    in_pairs(second, 6, 10)
    assert replayed(second) == [[], *([name] for name in NAMES[:4])]


def test_an_undone_fact_loses_its_turn_and_a_redone_one_has_it_again(open_session: Open) -> None:
    session = open_session()
    in_pairs(session, 0, 4)  # the first fact had its turn
    session.undo(NAMES[1])
    in_pairs(session, 4, 6)
    session.redo(NAMES[1])
    in_pairs(session, 6, 8)
    assert replayed(session) == [[], [NAMES[0]], [NAMES[2]], [NAMES[1]]]


def test_it_is_announced_without_torch() -> None:
    assert Plugins.load().component("replay.strategy", "in-turn").target == "third_strategy.strategy:in_turn"
    code = "import sys, third_strategy.plugin, third_strategy.strategy; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
