"""The work that workers do in the contract suite of executors. Imports no torch, so that workers start fast."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editcore.interfaces.errors import HParamsError

__all__ = ["WorkItem", "WorkResult", "make_runner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """One item of work."""

    number: int
    what: Literal["square", "refuse", "stumble", "die once", "die", "sleep"] = "square"
    folder: Path | None = None
    """A folder for marks: a worker that dies once marks that it did, and one that sleeps writes its process number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkResult:
    """The result of one item."""

    square: int
    process: int
    call: int
    """Number of this call of the worker's function, from 1."""
    threads: str | None


def make_runner() -> Callable[[WorkItem], WorkResult]:
    """A function that counts its calls."""
    calls = 0

    def run(item: WorkItem) -> WorkResult:
        nonlocal calls
        calls += 1
        if item.what == "refuse":
            raise HParamsError(f"{item.number} is refused.")
        if item.what == "stumble":
            raise ZeroDivisionError(f"{item.number} stumbles")
        if item.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if item.folder is not None:
            word = item.folder / f"{item.number}-{item.what.replace(' ', '-')}"
            if item.what == "die once" and not word.exists():
                word.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if item.what == "sleep":
                word.write_text(str(os.getpid()), encoding="utf-8")
                time.sleep(600)
        threads = os.environ.get("OMP_NUM_THREADS")
        return WorkResult(square=item.number**2, process=os.getpid(), call=calls, threads=threads)

    return run
