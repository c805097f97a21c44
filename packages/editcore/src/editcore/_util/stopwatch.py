"""Wall time by stage."""

from __future__ import annotations

import time
from collections.abc import Mapping

__all__ = ["Stages"]


class Stages:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> _Stopwatch:
        return _Stopwatch(self, name)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def add_batch(self, seconds: float | None, stages: Mapping[str, float]) -> None:
        """Add a batch's time by the stages that its proposal named; the rest goes to ``other``."""
        for name, part in stages.items():
            self.add(name, part)
        self.add("other", (seconds or 0.0) - sum(stages.values()))


class _Stopwatch:
    def __init__(self, stages: Stages, name: str) -> None:
        self._stages, self._name, self._start = stages, name, 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_exception: object) -> None:
        self._stages.add(self._name, time.perf_counter() - self._start)
