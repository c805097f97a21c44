"""How long work shows its progress, whether or not there is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Shows the progress of one task at a time."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a task of ``total`` steps. The block gets a function to call with the number of steps just finished."""
        ...


class _Silent:
    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda _steps: None


silent: Progress = _Silent()
"""Shows nothing. The default of every library call."""
