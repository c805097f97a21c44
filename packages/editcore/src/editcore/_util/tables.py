"""Checks the tables of a run or a sweep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from editcore.interfaces.errors import RunError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["check_columns", "damaged"]


def check_columns(frame: pd.DataFrame, columns: Iterable[str], path: Path) -> None:
    """Refuse a table that lacks a column.

    Raises:
        RunError: a column is missing; the message names the first one.
    """
    missing = [name for name in columns if name not in frame]
    if missing:
        raise RunError(f"{path} is damaged: it has no column '{missing[0]}'.")


def damaged(path: Path, error: Exception) -> RunError:
    """The error for a file that cannot be parsed."""
    return RunError(f"{path} is damaged: {' '.join(str(error).split())}.")
