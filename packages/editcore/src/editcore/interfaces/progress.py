"""How long work reports itself, without core knowing whether a terminal is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Shows one piece of work at a time."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a piece of work of ``total`` steps; the value entered is called with the steps just finished."""
        ...


class _Silent:
    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda _steps: None


silent: Progress = _Silent()
"""Shows nothing: the default of every library call."""
