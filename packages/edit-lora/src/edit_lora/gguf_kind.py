"""What a GGUF file is: a model or an adapter, and whether one is in the way. Told without torch."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
from editcore import ModelError, StorageError

__all__ = ["field_of", "kind_of", "open_gguf", "refuse_existing_file"]


_HEAD = 1 << 16
"""Bytes at the start of a file, among which an adapter says that it is one."""
_ADAPTER = b"general.type" + struct.pack("<IQ", gguf.GGUFValueType.STRING, len("adapter")) + b"adapter"


def kind_of(path: Path) -> Literal["adapter", "model"]:
    """Whether a GGUF file is a whole model or an adapter, from its first bytes: a reader takes seconds for the
    vocabulary of a model.

    Raises:
        ModelError: there is no such file, or it is no GGUF file.
    """
    if not path.is_file():
        raise ModelError(f"There is no file '{path}'.")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.startswith(b"GGUF"):
        raise ModelError(f"{path} is not a GGUF file.")
    return "adapter" if _ADAPTER in head else "model"


def open_gguf(path: Path) -> gguf.GGUFReader:
    """The metadata of a GGUF file, and where its tensors are.

    Raises:
        ModelError: there is no such file, it is no GGUF file, or it is damaged.
    """
    kind_of(path)
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(f"{path} is damaged: {' '.join(str(error).split())}.") from error


def field_of(fields: Mapping[str, Any], name: str) -> Any:
    """What the metadata says; ``None`` where it does not."""
    return fields[name].contents() if name in fields else None


def refuse_existing_file(path: Path) -> None:
    """Refuse a path for a new file if something is there.

    Raises:
        StorageError: something is.
    """
    if path.exists() or path.is_symlink():
        raise StorageError(f"{path} is already there; give a file that does not exist yet.")
