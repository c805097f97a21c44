"""``batches.jsonl``: the outcome of each batch of a run, for readers. The ledger has the same and the edits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from editcore._util.files import write_text
from editcore._util.records import Figures, Record, read_records, record_text
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError, StorageError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.values import RejectedRequest
from editcore.ledger.ledger import Ledger

__all__ = ["BatchLog", "BatchRecord", "RejectionLine", "read_batches", "write_batches"]

LOG_NAME = "batches.jsonl"


class VerdictLine(Record):
    """An extension's verdict on a batch."""

    action: Literal["accept", "scale", "reject"]
    reason: str
    scale: float
    """For ``scale``: the factor on the change."""
    figures: Figures
    """The numbers behind it."""


class RejectionLine(Record):
    """A request that an extension kept out, for readers."""

    batch: int | None = None
    """Index of its batch; absent where it stands in the line of that batch."""
    id: str
    """Of the request."""
    prompt: str
    """In full."""
    target_new: str
    by: str
    """The extension."""
    reason: str
    figures: Figures
    """The numbers behind it."""

    @classmethod
    def of(cls, rejected: RejectedRequest, **batch: int) -> RejectionLine:
        """The line of a request, with the index of its batch if ``batch`` is given."""
        request = rejected.request
        return cls(
            **batch,
            id=request.id,
            prompt=request.text,
            target_new=request.target_new,
            by=rejected.by,
            reason=rejected.reason,
            figures=dict(rejected.figures),
        )


class EvidenceLine(Record):
    """What was measured while one fact was written; see :class:`editcore.EditEvidence`."""

    request_id: str
    replayed: bool
    figures: Figures


@documented
class BatchRecord(Record):
    """A line of ``batches.jsonl``: one batch, applied or rejected."""

    batch: int
    """Its index in the run."""
    applied: bool
    """False for a batch that was rejected."""
    reason: str
    """Why a gate rejected or scaled the batch."""
    verdicts: Mapping[str, VerdictLine]
    """By the name of the extension that judged."""
    rejected: tuple[RejectionLine, ...]
    """Requests that were left out of the batch."""
    new: int
    """Facts that it wrote."""
    replayed: int
    """Facts that extensions added."""
    seconds: float | None
    """Wall time without evaluation; ``None`` if a crash lost it."""
    stages: Mapping[str, float]
    """The part of that time for each stage of the editor."""
    notes: tuple[str, ...]
    """Sentences for the user."""
    diagnostics: Figures
    """The editor's numbers about the batch."""
    evidence: tuple[EvidenceLine, ...]
    """One per request."""

    @classmethod
    def of(cls, entry: LedgerEntry, seconds: float | None, stages: Mapping[str, float]) -> BatchRecord:
        """The line of a batch that the ledger has."""
        return cls(
            batch=entry.batch,
            applied=entry.applied,
            reason=entry.reason,
            verdicts={
                name: VerdictLine(
                    action=verdict.action, reason=verdict.reason, scale=verdict.scale, figures=dict(verdict.figures)
                )
                for name, verdict in entry.verdicts.items()
            },
            rejected=tuple(map(RejectionLine.of, entry.rejected)),
            new=entry.num_new,
            replayed=len(entry.requests) - entry.num_new,
            seconds=seconds,
            stages=dict(stages),
            notes=entry.notes,
            diagnostics=dict(entry.diagnostics),
            evidence=tuple(EvidenceLine(**asdict(evidence)) for evidence in entry.evidence),
        )


class BatchLog:
    """``batches.jsonl``: a line per batch, applied or rejected.

    Everything but the times comes from the ledger. So a log that a crash left incomplete is completed from the ledger;
    a batch whose time was lost has ``null`` there.
    """

    def __init__(self, directory: Path, ledger: Ledger) -> None:
        self._path = directory / LOG_NAME
        times = {line.batch: (line.seconds, line.stages) for line in self._readable_lines()}
        self.lines = [BatchRecord.of(entry, *times.get(entry.batch, (None, {}))) for entry in ledger.batches]
        if self.lines or self._path.exists():
            write_text(self._path, "".join(f"{record_text(line)}\n" for line in self.lines))

    def add(self, entry: LedgerEntry, seconds: float, stages: Mapping[str, float]) -> None:
        """Log a batch that the ledger has.

        Raises:
            StorageError: the file cannot be written; the ledger has the batch all the same.
        """
        line = BatchRecord.of(entry, seconds, stages)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(record_text(line) + "\n")
        except OSError as error:
            raise StorageError(f"Cannot write {self._path}: {error.strerror}.") from error
        self.lines.append(line)

    def _readable_lines(self) -> Iterator[BatchRecord]:
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunError(f"{self._path} cannot be read ({error.strerror}).") from error
        for line in lines:
            with contextlib.suppress(ValidationError):  # a line that was cut off
                yield BatchRecord.model_validate_json(line)


def read_batches(directory: Path | str) -> list[BatchRecord]:
    """The lines of ``batches.jsonl``; none for a run that has no such file.

    Raises:
        RunError: it cannot be read, or a line is damaged.
    """
    return read_records(Path(directory) / LOG_NAME, BatchRecord)


def write_batches(directory: Path | str, lines: Iterable[BatchRecord]) -> None:
    """Write ``batches.jsonl``.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(Path(directory) / LOG_NAME, "".join(f"{record_text(line)}\n" for line in lines))
