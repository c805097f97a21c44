"""Writes folders whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from editcore._util.files import make_readable
from editcore.interfaces.errors import StorageError

__all__ = ["new_folder", "refuse_existing"]


@contextmanager
def new_folder(directory: Path | str) -> Iterator[Path]:
    """A temporary folder beside ``directory`` to fill. On success it is renamed to ``directory``, otherwise it is
    removed.

    Raises:
        StorageError: ``directory`` is there already, or cannot be made.
    """
    directory = Path(directory)
    refuse_existing(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    except OSError as error:
        raise StorageError(f"Cannot make {directory}: {error.strerror or error}.") from error
    try:
        yield temporary
        make_readable(temporary)  # mkdtemp makes it private, and some programs make their files private
        temporary.rename(directory)
    except OSError as error:
        raise StorageError(f"Cannot make {directory}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(directory: Path | str, *, option: str = "") -> None:
    """Refuse a path for a new folder if something is there.

    Args:
        option: the option of the command line that gave the path.

    Raises:
        StorageError: there is a file, or a folder that is not empty.
    """
    directory = Path(directory)
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        place = f"{option} {directory}".strip()
        raise StorageError(f"{place} is already there; give a directory that does not exist yet.")
