"""``state.json``: the size of the change of each weight, as of the ledger's last line. It can be measured again at any
time, and is not authoritative."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from editcore._util.records import Record, read_record
from editcore.interfaces.errors import RunError
from editcore.ledger.file import LEDGER_NAME

__all__ = ["STATE_NAME", "DirectoryState"]

STATE_NAME = "state.json"


class DirectoryState(Record):
    """What was measured of a directory's model after its last change."""

    ledger_bytes: int
    """Size of the ledger then."""
    relative_change: Mapping[str, float]
    """By address, ‖ΔW‖ / ‖W‖."""
    norms: Mapping[str, float]
    """By address, ‖W‖ of the unedited weight."""

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The state; ``None`` if there is none, or if the ledger has changed since."""
        state = cls._last(directory)
        return state if state is not None and state.ledger_bytes == ledger_bytes(directory) else None

    @classmethod
    def norms_of(cls, directory: Path) -> Mapping[str, float]:
        """``norms``, whether the ledger has changed since or not; empty if they were never measured."""
        state = cls._last(directory)
        return {} if state is None else state.norms

    @classmethod
    def _last(cls, directory: Path) -> Self | None:
        try:
            return read_record(directory / STATE_NAME, cls)
        except RunError:
            return None


def ledger_bytes(directory: Path) -> int:
    """Size of a directory's ledger; 0 if it has none yet."""
    path = directory / LEDGER_NAME
    return path.stat().st_size if path.exists() else 0
