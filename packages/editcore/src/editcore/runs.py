"""Run directories, for commands that read or make them: records, ledgers, folders written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from editcore._backends import save_edited
from editcore._files import json_text, write_tensors, write_text
from editcore._folders import making, refuse_existing
from editcore._hparams import build
from editcore._ledger import DELTAS_NAME, LEDGER_NAME, Ledger, LedgerEntry
from editcore._ledger_lines import HeaderLine
from editcore._progress import silent
from editcore._run import RUN_NAME, RunConfig, RunRecord, folder_of, open_run, statistics_of
from editcore._session import default_editor

__all__ = [
    "DELTAS_NAME",
    "LEDGER_NAME",
    "RUN_NAME",
    "HeaderLine",
    "Ledger",
    "LedgerEntry",
    "RunConfig",
    "RunRecord",
    "build",
    "default_editor",
    "folder_of",
    "json_text",
    "making",
    "open_run",
    "refuse_existing",
    "save_edited",
    "silent",
    "statistics_of",
    "write_ledger",
    "write_tensors",
    "write_text",
]


def write_ledger(directory: Path, entries: Iterable[LedgerEntry], header: HeaderLine) -> None:
    """A new ledger of batches that were made elsewhere.

    Raises:
        StorageError: it cannot be written.
    """
    ledger = Ledger(directory, header)
    for entry in entries:
        ledger.append(entry)
