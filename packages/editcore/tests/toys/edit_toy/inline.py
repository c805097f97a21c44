"""An executor without workers: quick to start, and nothing can be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from editcore import Outcome
from editcore.execution.executors import attempt

T = TypeVar("T")
R = TypeVar("R")


class InlineExecutor:
    shares_files = True

    def map(
        self,
        make: Callable[[], Callable[[T], R]],
        items: Sequence[T],
        *,
        started: Callable[[int], None],
        accelerator: bool = False,
    ) -> Iterator[Outcome[R]]:
        function = make()
        for index, item in enumerate(items):
            started(index)
            yield attempt(function, index, item)

    def close(self) -> None: ...
