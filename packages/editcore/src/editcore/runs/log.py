"""What a run keeps beside its ledger: the log of its batches, and what was measured before the first one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from editcore._util.files import json_text, replacing, write_text
from editcore.evaluation.measures import Measure
from editcore.evaluation.summaries import Measurement
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


class _Kept(BaseModel):
    """``before.json``: what of it is no observation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    said: tuple[str, ...]
    text: HeldOutText | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What the unedited model scored and said, kept while the run goes on: a resumed one need not measure it again.

    Its observations are in ``before.parquet``, the rest in ``before.json``, which is written last.
    """

    measured: Measurement
    said: tuple[str, ...]
    text: HeldOutText | None = None
    """What its perplexity is measured on, in a run with checkpoints."""

    @classmethod
    def read(cls, directory: Path, measures: tuple[Measure, ...]) -> Before | None:
        """``None`` if there is none.

        Args:
            measures: those of the run's evaluators.

        Raises:
            RunError: a file is damaged.
        """
        return cls._read(directory / BEFORE_NAME, measures)

    @classmethod
    def shared(
        cls,
        folder: Path,
        identity: Mapping[str, Any],
        measures: tuple[Measure, ...],
        measure: Callable[[], Before],
    ) -> tuple[Before, bool]:
        """What another run measured of the same model on the same records, or else measured now and kept for others.

        Args:
            identity: everything that changes the measurement, JSON-able.

        Returns:
            The measurement, and whether it is another run's.
        """
        digest = hashlib.sha256(json_text(dict(sorted(identity.items()))).encode()).hexdigest()[:32]
        path = folder / f"before-{digest}.json"
        found = cls._read(path, measures)
        if found is not None:
            return found, True
        measured = measure()
        measured._write(path)
        return measured, False

    @classmethod
    def _read(cls, path: Path, measures: tuple[Measure, ...]) -> Before | None:
        import pandas as pd

        table = path.with_suffix(".parquet")
        try:
            kept = _Kept.model_validate_json(path.read_bytes())
            measured = Measurement.from_frame(pd.read_parquet(table), measures)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise RunError(f"{path} is damaged ({first_problem(error)}). Remove it to measure anew.") from error
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
            why = " ".join(str(error).split())
            raise RunError(f"{path} or {table.name} is damaged ({why}). Remove them to measure anew.") from error
        return cls(measured=measured, said=kept.said, text=kept.text)

    def write(self, directory: Path) -> None:
        """Keep it, whole or not at all."""
        self._write(directory / BEFORE_NAME)

    def _write(self, path: Path) -> None:
        with replacing(path.with_suffix(".parquet")) as table:
            self.measured.frame({}).to_parquet(table, index=False)
        write_text(path, _Kept(said=self.said, text=self.text).model_dump_json() + "\n")

    @staticmethod
    def remove(directory: Path) -> None:
        """The results have it now."""
        path = directory / BEFORE_NAME
        path.unlink(missing_ok=True)  # first: without it the table counts for nothing
        path.with_suffix(".parquet").unlink(missing_ok=True)
