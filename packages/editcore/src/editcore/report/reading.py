"""Files of a run or a sweep, read and checked for a report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from editcore.interfaces.errors import RunError
from editcore.interfaces.values import first_problem

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["check_columns", "damaged", "read_json"]

T = TypeVar("T", bound=BaseModel)


def read_json(path: Path, model: type[T]) -> T:
    """A JSON file as a pydantic model.

    Raises:
        RunError: it cannot be read, or is damaged.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise RunError(f"{path} is damaged ({first_problem(error)}).") from error


def check_columns(frame: pd.DataFrame, columns: Iterable[str], path: Path) -> None:
    """Refuse a table that lacks a column.

    Raises:
        RunError: it does; the message names the first.
    """
    missing = [name for name in columns if name not in frame]
    if missing:
        raise RunError(f"{path} is damaged: it has no column '{missing[0]}'.")


def damaged(path: Path, error: Exception) -> RunError:
    """The error of a file that a reader cannot make sense of."""
    return RunError(f"{path} is damaged: {' '.join(str(error).split())}.")
