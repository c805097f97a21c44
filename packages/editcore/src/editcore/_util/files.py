"""Writes files whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore.interfaces.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "file_sha256",
    "json_text",
    "make_readable",
    "remove_leftovers",
    "replacing",
    "sync_directory",
    "tensors_hash",
    "uninterrupted",
    "write_tensors",
    "write_text",
]


_LEFTOVER = re.compile(r"\..+(\.\w+)\.[a-z0-9_]{8}\1|\.tmp[A-Za-z0-9]{6}")
"""Names of temporary files, those of editcore and those of safetensors."""


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to. When the block ends, it is flushed to disk and renamed to ``path``.

    Raises:
        StorageError: the disk is full, the folder read-only, ...; ``path`` is as it was and nothing is left behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            make_readable(temporary)  # mkstemp makes it private, but others read a run directory
            temporary.replace(path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error


def make_readable(path: Path) -> None:
    """Give a file, or a folder and everything in it, the usual mode: 0644, or 0755 for folders, minus the umask.

    Files that are written through a temporary name are private at first.
    """
    mask = os.umask(0o077)  # the only way to read the umask is to set it
    os.umask(mask)
    for found in (path, *path.rglob("*")):
        if not found.is_symlink():
            found.chmod((0o755 if found.is_dir() else 0o644) & ~mask)


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files of :func:`replacing` that a killed process left. No other process may write there now."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make a new or renamed file's name durable, on systems that can open a directory."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is None:
        yield  # signals go to the main thread, and a handler that is not Python's cannot be restored
        return
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if asked:
        signal.raise_signal(signal.SIGINT)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON that every reader accepts. NaN and infinities become ``null``, because the standard does not have them.

    >>> json_text({"score": float("nan")})
    '{"score": null}'
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file."""
    path = Path(path)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as error:  # such as for a full disk
            raise StorageError(f"Cannot write {path}: {error}.") from error


def tensors_hash(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a text and tensors: the name, type, shape and bytes of each."""
    import torch

    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
