"""Every byte of a run's ledger held against what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.progress import Progress, silent
from editcore.ledger.ledger import DELTAS_NAME, LEDGER_NAME, Ledger
from editcore.ledger.lines import BatchLine, RevisionLine

__all__ = ["Verification", "verify"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found."""

    lines: int
    """Lines that were read."""
    files: int
    """Tensor files that the lines speak of."""
    problems: tuple[str, ...]
    """A sentence for each, which names the file, the line and what is wrong with it."""
    notes: tuple[str, ...]
    """What is not as after a clean end, but does no harm."""


def verify(directory: Path, *, progress: Progress = silent) -> Verification:
    """Read every line and every tensor of a ledger.

    Raises:
        RunError: there is no ledger.
    """
    ledger, problems, read = Ledger(directory), [], []
    for line, where in ledger.lines():
        read.append(line)
        try:
            if isinstance(line, RunError):
                raise line
            ledger.take(line, where)
        except RunError as error:
            problems.append(str(error))
    files = {line.file.name for line in read if isinstance(line, BatchLine | RevisionLine) and line.file is not None}
    with progress.task("verifying", len(ledger.batches)) as advance:
        for entry in ledger.batches:
            for view in (entry, *ledger.revisions(entry.batch)):
                problems += _damage(view)
            advance(1)
    notes = [ledger.note] if ledger.note else []
    if not any(isinstance(line, RunError) for line in read):  # otherwise it is not known what they speak of
        notes += _strangers(directory, files)
    return Verification(lines=len(read), files=len(files), problems=tuple(problems), notes=tuple(notes))


def _damage(entry: LedgerEntry) -> Iterator[str]:
    try:
        for address, change in entry.changes.items():
            if not change.is_finite():
                yield f"Batch {entry.batch}: the change of {address} holds NaN or Inf."
        beside = {} if entry.attachment is None else entry.attachment.tensors
        for name, tensor in {**beside, **entry.memory}.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                yield f"Batch {entry.batch}: the tensor {name} holds NaN or Inf."
        len(entry.known)  # reads it
    except RunError as error:
        yield str(error)


def _strangers(directory: Path, files: set[str]) -> Iterator[str]:
    """Tensor files without a line: a process was killed between the two."""
    folder = directory / DELTAS_NAME
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name not in files and path.suffix == ".safetensors":
            yield f"{path}: no line of {LEDGER_NAME} speaks of it; it does not count."
