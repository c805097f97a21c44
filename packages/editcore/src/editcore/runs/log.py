"""What a run keeps beside its ledger: the log of its batches, and what was measured before the first one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from editcore._util.files import json_text, write_text
from editcore.evaluation import PromptScore
from editcore.interfaces.errors import RunError, StorageError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.values import RejectedRequest, first_problem
from editcore.ledger.ledger import Ledger
from editcore.runs.checkpoints import HeldOutText

__all__ = ["BatchLog", "Before", "rejection_line"]

LOG_NAME = "batches.jsonl"
BEFORE_NAME = "before.json"


class BatchLog:
    """``batches.jsonl``: a line per batch, applied or rejected.

    Everything but the times comes from the ledger. A log that a crash left behind is made whole from it; a batch whose
    time was lost has ``null`` there.
    """

    def __init__(self, directory: Path, ledger: Ledger) -> None:
        self._path = directory / LOG_NAME
        times = self._times()
        self.lines = [_line(entry, *times.get(entry.batch, (None, {}))) for entry in ledger.batches]
        if self.lines or self._path.exists():
            write_text(self._path, "".join(f"{json_text(line)}\n" for line in self.lines))

    def add(self, entry: LedgerEntry, seconds: float, stages: Mapping[str, float]) -> None:
        """Log a batch that the ledger has.

        Raises:
            StorageError: the file cannot be written; the ledger has the batch all the same.
        """
        line = _line(entry, seconds, stages)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json_text(line) + "\n")
        except OSError as error:
            raise StorageError(f"Cannot write {self._path}: {error.strerror}.") from error
        self.lines.append(line)

    def _times(self) -> dict[int, tuple[float | None, dict[str, float]]]:
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RunError(f"{self._path} cannot be read ({error.strerror}).") from error
        found = {}
        for line in lines:
            with contextlib.suppress(ValidationError):  # cut off
                times = _Times.model_validate_json(line)
                found[times.batch] = (times.seconds, times.stages)
        return found


def _line(entry: LedgerEntry, seconds: float | None, stages: Mapping[str, float]) -> dict[str, Any]:
    return {
        "batch": entry.batch,
        "applied": entry.applied,
        "reason": entry.reason,
        "verdicts": {
            name: {"action": one.action, "reason": one.reason, "scale": one.scale, "figures": dict(one.figures)}
            for name, one in entry.verdicts.items()
        },
        "rejected": [rejection_line(one) for one in entry.rejected],
        "new": entry.num_new,
        "replayed": len(entry.requests) - entry.num_new,
        "seconds": seconds,
        "stages": dict(stages),
        "notes": list(entry.notes),
        "diagnostics": dict(entry.diagnostics),
        "evidence": [asdict(evidence) for evidence in entry.evidence],
    }


def rejection_line(one: RejectedRequest) -> dict[str, Any]:
    """A request that was kept out, for readers."""
    return {
        "id": one.request.id,
        "prompt": one.request.text,
        "target_new": one.request.target_new,
        "by": one.by,
        "reason": one.reason,
        "figures": dict(one.figures),
    }


class _Times(BaseModel):
    """What of a line is not in the ledger."""

    batch: int
    seconds: float | None
    stages: dict[str, float]


class Before(BaseModel):
    """What the unedited model scored and said, kept while the run goes on: a resumed one need not measure it again."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    scores: tuple[PromptScore, ...]
    said: tuple[str, ...]
    text: HeldOutText | None = None
    """What its perplexity is measured on, in a run with checkpoints."""

    @classmethod
    def read(cls, directory: Path) -> Before | None:
        """``None`` if there is none.

        Raises:
            RunError: the file is damaged.
        """
        return cls._read(directory / BEFORE_NAME)

    @classmethod
    def shared(cls, folder: Path, identity: Mapping[str, Any], measure: Callable[[], Before]) -> tuple[Before, bool]:
        """What another run measured of the same model on the same records, or else measured now and kept for others.

        Args:
            identity: everything that changes the measurement, JSON-able.

        Returns:
            The measurement, and whether it is another run's.
        """
        digest = hashlib.sha256(json_text(dict(sorted(identity.items()))).encode()).hexdigest()[:32]
        path = folder / f"before-{digest}.json"
        found = cls._read(path)
        if found is not None:
            return found, True
        measured = measure()
        write_text(path, measured.model_dump_json() + "\n")
        return measured, False

    @classmethod
    def _read(cls, path: Path) -> Before | None:
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror}).") from error
        except ValidationError as error:
            raise RunError(f"{path} is damaged ({first_problem(error)}). Remove it to measure anew.") from error

    def write(self, directory: Path) -> None:
        """Keep it, whole or not at all."""
        write_text(directory / BEFORE_NAME, self.model_dump_json() + "\n")

    @staticmethod
    def remove(directory: Path) -> None:
        """The results have it now."""
        (directory / BEFORE_NAME).unlink(missing_ok=True)
