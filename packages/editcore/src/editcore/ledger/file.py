"""The files of a ledger. Lines are only ever added, and the tensors of a line are on the disk before the line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from editcore._util.files import sync_directory, write_tensors
from editcore.interfaces.errors import RunError, StorageError
from editcore.ledger.lines import HeaderLine, Line, TensorFile, decode, encode, is_whole

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DELTAS_NAME", "LEDGER_NAME", "LedgerFile"]

L = TypeVar("L", bound=Line)

LEDGER_NAME = "ledger.jsonl"
DELTAS_NAME = "deltas"
MAX_BYTES = 1 << 30
"""Largest ``ledger.jsonl`` that is read. 10,000 single edits with replay take 13 MB."""


class LedgerFile:
    """``ledger.jsonl`` and ``deltas/`` of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.note = ""
        """A sentence on what could not be read; empty if the file was whole."""
        self._size = 0  # of the complete lines, in bytes

    def lines(self) -> Iterator[tuple[Line | RunError, str]]:
        """Every line, or the error in it, and its place in the file. Sets :attr:`note`.

        Raises:
            RunError: the file cannot be read.
        """
        path = self.directory / LEDGER_NAME
        *complete, rest = _read_lines(path)  # the rest after the last line end was never finished
        for number, raw in enumerate(complete, start=1):
            where = f"{path}, line {number}"
            try:
                line: Line | RunError = decode(raw, where)
            except RunError as error:
                line = error
            self._size += len(raw) + 1
            yield line, where
        where = f"{path}, line {len(complete) + 1}"
        if is_whole(rest[:-1]):
            yield RunError(f"{where}: the line end is damaged."), where
        elif rest:
            self.note = f"{where}: the line was cut off while it was written, and is left out."

    def write(
        self,
        header: HeaderLine,
        line_of: Callable[[TensorFile | None], L],
        name: str = "",
        tensors: Mapping[str, Tensor] | None = None,
    ) -> L:
        """Write a line, and before it its tensors, if there are any. Returns the line.

        Args:
            header: the first line of a new file.
            line_of: makes the line, given the file of tensors.
            name: name of the file of tensors.

        Raises:
            StorageError: a file cannot be written; the files are as they were.
            RunError: another process has changed them meanwhile.
        """
        self._refuse_foreign(self.directory / LEDGER_NAME)
        first = [header] if self._size == 0 else []
        if not tensors:
            line = line_of(None)
            self._append(*first, line)
            return line
        path = self.directory / DELTAS_NAME / name
        write_tensors(path, tensors, {})
        try:
            raw = path.read_bytes()
            file = TensorFile(name=name, size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
            line = line_of(file)
            self._append(*first, line)
        except Exception:
            path.unlink(missing_ok=True)  # no line names the file
            raise
        return line

    def begin(self, header: HeaderLine) -> None:
        """Write the first line of a new file.

        Raises:
            StorageError: it cannot be written.
        """
        self._append(header)

    def _append(self, *lines: Line) -> None:
        try:
            self._append_bytes(b"".join(map(encode, lines)))
        except OSError as error:
            raise StorageError(
                f"Cannot write {self.directory / LEDGER_NAME}: {error.strerror}. The ledger is as it was."
            ) from error

    def _refuse_foreign(self, path: Path) -> None:
        """Refuse to write if another process has added or removed lines."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(self._size)
                rest = file.read()
        except FileNotFoundError:
            size, rest = 0, b""
        if size < self._size or b"\n" in rest:
            raise RunError(f"{path} was changed by another process. The ledger is as that one left it.")

    def _append_bytes(self, content: bytes) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / LEDGER_NAME
        # Unbuffered: a failed buffer would be written again when the file is closed, after it was truncated.
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb+", buffering=0) as file:
            try:
                file.truncate(self._size)  # removes what a crash left of a line
                file.seek(self._size)
                written = 0
                while written < len(content):
                    written += file.write(content[written:])
                os.fsync(file.fileno())
                sync_directory(self.directory)
            except BaseException:
                file.truncate(self._size)  # half a line would damage the next one
                raise
        self._size += len(content)


def _read_lines(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RunError(
            f"{path.parent} is not a run directory: {path.name} cannot be read ({error.strerror})."
        ) from error
    if len(raw) > MAX_BYTES:
        raise RunError(f"{path} has more than {MAX_BYTES >> 20} MiB, which no ledger of a run has.")
    return raw.split(b"\n")
