"""One tree of exceptions, for everything that a user can cause or fix.

The command line prints an :class:`EditcoreError` as one paragraph and exits with code 2. Any other exception is a bug
of ours and keeps its traceback. A message says what was asked, what was found, and what would work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EditcoreError(Exception):
    """Base of every error that a user's input, files or environment can cause."""


class RequestError(EditcoreError):
    """An edit request or a fact record is malformed."""


class SubjectNotFoundError(RequestError):
    """The subject cannot be located in the text or in its tokens."""


class DatasetError(EditcoreError):
    """A data set is unknown, or a file of records cannot be read."""


class HParamsError(EditcoreError):
    """A hyperparameter or setting is unknown, has the wrong type, or is out of range."""


class PluginError(EditcoreError):
    """A plugin cannot be loaded, or two plugins claim one name."""


class UnknownNameError(EditcoreError):
    """A name (editor, backend, model, data set, ...) is not registered."""

    def __init__(self, kind: str, asked: str, installed: Iterable[str], *, hint: str = "") -> None:
        names = sorted(installed)
        near = difflib.get_close_matches(asked, names, n=1)
        message = f"Unknown {kind} '{asked}'. Available: {', '.join(names) or 'none'}."
        if near:
            message += f" Did you mean '{near[0]}'?"
        if hint:
            message += f" {hint}"
        super().__init__(message)
        self.kind = kind
        self.asked = asked


class ModelError(EditcoreError):
    """A model cannot be fetched, loaded, or its structure is not one that editcore can edit."""


class StatisticsError(EditcoreError):
    """Second moments cannot be computed or a cached file does not fit."""


class NumericalError(EditcoreError):
    """A solve met a singular system, NaN or Inf; nothing was applied."""


class StorageError(EditcoreError):
    """A file cannot be written: the disk is full, the folder is read-only, ...; what was there before is unchanged."""


class RunError(EditcoreError):
    """A run directory is in the way, unreadable or incomplete."""
