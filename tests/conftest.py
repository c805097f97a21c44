"""What a user has: a folder with a model, a file of facts, a text, and editctl."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of three blocks, with its tokenizer, as ``save_pretrained`` writes them."""
    from editcore.testing import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six facts that the tiny tokenizer knows, in the schema of CounterFact."""
    from editcore.testing import tiny_requests

    others = tiny_requests(20)[-2:]
    lines = [
        {
            "case_id": number,
            "requested_rewrite": {
                "subject": request.subject,
                "prompt": request.prompt,
                "relation_id": f"P{number % 2}",
                "target_new": {"str": request.target_new},
                "target_true": {"str": request.target_true},
            },
            "paraphrase_prompts": [f"It is known that {request.text}", f"So {request.text}"],
            "neighborhood_prompts": [request.prompt.replace("{}", other.subject) for other in others],
            "generation_prompts": [f"{request.subject} is"],
        }
        for number, request in enumerate(tiny_requests(6))
    ]
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens for the second moments."""
    from editcore.testing import tiny_requests

    words = " ".join(request.text for request in tiny_requests(80)).split()
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return path


@pytest.fixture
def editctl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Calls ``editctl`` in this process, with a cache of its own and in an empty working directory: ``code``, ``out``
    and ``err`` of what a user would type."""
    from editcore.cli import main

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["editctl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=printed.out, err=printed.err)

    return call
