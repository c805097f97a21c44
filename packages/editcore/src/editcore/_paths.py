"""Where editcore keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$EDITCORE_CACHE``, else ``$XDG_CACHE_HOME/editcore``, else ``~/.cache/editcore``. Not created here."""
    if chosen := os.environ.get("EDITCORE_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "editcore"
    return Path.home() / ".cache" / "editcore"
