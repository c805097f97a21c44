"""What all tests of the repository start from."""

from __future__ import annotations

import os

import pytest

# Off a terminal editctl writes whole lines; COLUMNS, which some shells and runners export, would have it break them.
os.environ.pop("COLUMNS", None)

LONGEST = (
    "test_docs.py",
    "test_wheels.py",
    "test_third_party.py",
    "test_contracts.py",
    "test_resume.py",
    "test_new.py",
    "test_cli_run.py",
)
"""Files whose tests take half a minute and more. They come first, so that no process works at one when the others have
nothing left to do."""


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist give files away in the order below; by itself it begins with those that have the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; the others keep their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
