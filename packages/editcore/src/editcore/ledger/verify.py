"""Checks every line and every tensor file of a ledger against its hash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from editcore.interfaces.changes import Written
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import KnownTarget
from editcore.ledger.file import DELTAS_NAME, LEDGER_NAME
from editcore.ledger.ledger import Ledger
from editcore.ledger.lines import BatchLine, RevisionLine

__all__ = ["Verification", "verify"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of checking a ledger."""

    lines: int
    """Lines that were read."""
    files: int
    """Tensor files that the lines name."""
    problems: tuple[str, ...]
    """A sentence for each problem, which names the file and the line and says what is wrong."""
    notes: tuple[str, ...]
    """Sentences on harmless traces of a process that was killed."""


def verify(directory: Path, *, progress: Progress = silent) -> Verification:
    """Read every line and every tensor of a ledger. Only the tensors that were read last are in memory.

    Raises:
        RunError: there is no ledger.
    """
    ledger, problems, read = Ledger(directory), [], []
    with_tensors: list[tuple[BatchLine | RevisionLine, str]] = []
    for line, where in ledger.lines():
        read.append(line)
        try:
            if isinstance(line, RunError):
                raise line
            ledger.take(line, where)
            if isinstance(line, BatchLine | RevisionLine):
                with_tensors.append((line, where))
        except RunError as error:
            problems.append(str(error))
    files = {line.file.name for line in read if isinstance(line, BatchLine | RevisionLine) and line.file is not None}
    with progress.task("verifying", len(with_tensors)) as advance:
        for line, where in with_tensors:
            problems += _damage(line.batch, *ledger.tensors_of(line, where))
            advance(1)
    notes = [ledger.note] if ledger.note else []
    if not any(isinstance(line, RunError) for line in read):  # otherwise the files that they name are not known
        notes += _strangers(directory, files)
    return Verification(lines=len(read), files=len(files), problems=tuple(problems), notes=tuple(notes))


def _damage(batch: int, written: Written, known: Mapping[str, KnownTarget]) -> Iterator[str]:
    try:
        for address, change in written.changes.items():
            if not change.is_finite():
                yield f"Batch {batch}: the change of {address} holds NaN or Inf."
        beside = {} if written.attachment is None else written.attachment.tensors
        for name, tensor in {**beside, **written.memory}.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                yield f"Batch {batch}: the tensor {name} holds NaN or Inf."
        for name, target in known.items():
            for kind, tensors in (("key", target.keys), ("value", target.values)):
                for address, tensor in tensors.items():
                    if not tensor.isfinite().all():
                        yield f"Batch {batch}: the {kind} of '{name}' at {address} holds NaN or Inf."
    except RunError as error:
        yield str(error)


def _strangers(directory: Path, files: set[str]) -> Iterator[str]:
    """Tensor files without a line. They are left if a process is killed before it writes the line."""
    folder = directory / DELTAS_NAME
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name not in files and path.suffix == ".safetensors":
            yield f"{path}: no line of {LEDGER_NAME} names this file; it is ignored."
