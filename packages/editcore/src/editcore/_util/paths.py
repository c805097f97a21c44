"""The cache folder, and the folders for results."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from editcore.interfaces.errors import RunError


def cache_dir() -> Path:
    """``$EDITCORE_CACHE``, else ``$XDG_CACHE_HOME/editcore``, else ``~/.cache/editcore``. Not created here."""
    if chosen := os.environ.get("EDITCORE_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "editcore"
    return Path.home() / ".cache" / "editcore"


def hub_snapshot(folder: Path) -> tuple[str, str] | None:
    """Hub id and commit of a snapshot in the hub's cache; ``None`` for any other folder.

    >>> hub_snapshot(Path("/cache/hub/models--openai-community--gpt2/snapshots/607a30d"))
    ('openai-community/gpt2', '607a30d')
    """
    commit, snapshots, kept = folder.name, folder.parent.name, folder.parent.parent.name
    if snapshots != "snapshots" or not kept.startswith("models--"):
        return None
    return kept.removeprefix("models--").replace("--", "/"), commit


def check_writable(directory: Path) -> None:
    """Refuse a folder that cannot be made, before long work starts.

    Raises:
        RunError: the nearest existing parent is not a folder that can be written to.
    """
    above = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"The output {directory} cannot be made: {above} is not a folder that can be written to.")


def fresh_directory(given: Path | None, stem: str) -> Path:
    """The folder for results that the user gave, or ``runs/STEM-TIME``. Not created here.

    Raises:
        RunError: the folder is not empty, or cannot be made.
    """
    directory = given or timed_directory(stem)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise RunError(f"The output {directory} is already there; give another --out, or remove it.")
    check_writable(directory)
    return directory


def timed_directory(stem: str) -> Path:
    """``runs/STEM-TIME``, in the working directory."""
    return Path("runs") / f"{stem}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
