"""``added.jsonl``: facts that a run directory was given after its run, with their probes.

They are written before the edits, so a directory may have facts here that no batch wrote. What is edited is in the
ledger alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from editcore._util.files import write_text
from editcore._util.records import read_records
from editcore.interfaces.values import FactRecord

__all__ = ["ADDED_NAME", "keep_added", "read_added"]

ADDED_NAME = "added.jsonl"


def read_added(directory: Path | str) -> list[FactRecord]:
    """The facts; none for a directory that was given none.

    Raises:
        RunError: the file cannot be read, or is damaged.
    """
    return read_records(Path(directory) / ADDED_NAME, FactRecord)


def keep_added(directory: Path | str, records: Sequence[FactRecord], *, written: Collection[str]) -> None:
    """Add facts to the file. The file is replaced as a whole, so that a crash leaves the old one or the new one.

    Args:
        written: ids in the ledger. Facts of the file that are not among them were never written, and are left out.

    Raises:
        RunError: as :func:`read_added`.
        StorageError: the file cannot be written.
    """
    kept = [record for record in read_added(directory) if record.request.id in written]
    write_text(Path(directory) / ADDED_NAME, _lines([*kept, *records]))


def _lines(records: Iterable[FactRecord]) -> str:
    return "".join(f"{record.model_dump_json()}\n" for record in records)
