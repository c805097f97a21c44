"""Fixtures of editcore's own tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """A text that the tiny tokenizers know, long enough for a few sequences."""
    path = tmp_path / "corpus.txt"
    path.write_text("The old town lies by the river. Anna Berg was born in Rome and works as a painter.\n" * 200)
    return path
