"""What the contract suite of executors has workers do. Imports no torch, so that workers start fast."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editcore.interfaces.errors import HParamsError

__all__ = ["Errand", "Seen", "make_runner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """One item."""

    number: int
    what: Literal["square", "refuse", "stumble", "die once", "die", "sleep"] = "square"
    folder: Path | None = None
    """Where a worker that dies once leaves word for its successor, and one that sleeps its process number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What comes back."""

    square: int
    process: int
    call: int
    """Number of this call of the worker's function, from 1."""
    threads: str | None


def make_runner() -> Callable[[Errand], Seen]:
    """A function that counts its calls."""
    calls = 0

    def run(errand: Errand) -> Seen:
        nonlocal calls
        calls += 1
        if errand.what == "refuse":
            raise HParamsError(f"{errand.number} is refused.")
        if errand.what == "stumble":
            raise ZeroDivisionError(f"{errand.number} stumbles")
        if errand.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if errand.folder is not None:
            word = errand.folder / f"{errand.number}-{errand.what.replace(' ', '-')}"
            if errand.what == "die once" and not word.exists():
                word.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if errand.what == "sleep":
                word.write_text(str(os.getpid()), encoding="utf-8")
                time.sleep(600)
        threads = os.environ.get("OMP_NUM_THREADS")
        return Seen(square=errand.number**2, process=os.getpid(), call=calls, threads=threads)

    return run
