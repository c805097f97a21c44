"""The record of every batch that was applied: what was asked, what was solved, what was written.

On disk it is one JSON line per batch in ``ledger.jsonl``, each with a checksum, and one safetensors file per batch in
``deltas/``. The tensors are on the disk before the line is; a batch counts once its line is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._errors import RunError, StorageError
from editcore._files import sync_directory, write_tensors
from editcore._values import EditRequest, FactoredDelta, KnownTarget

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ledger", "LedgerEntry"]

LEDGER_NAME = "ledger.jsonl"
DELTAS_NAME = "deltas"


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One applied batch."""

    batch: int
    """Its index in the run. Rejected batches have one too, so there may be gaps."""
    requests: tuple[EditRequest, ...]
    """New requests first, replayed ones behind."""
    weights: tuple[float, ...]
    num_new: int
    deltas: Mapping[str, FactoredDelta]
    known: Mapping[str, KnownTarget]
    """By request id: the key and value each fact was solved with."""
    diagnostics: Mapping[str, float]
    scale: float = 1.0
    """What a gate scaled the proposal by."""


class Ledger:
    """Applied batches, oldest first; durable if it has a directory."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.entries: list[LedgerEntry] = []
        self._size = 0  # of the complete lines on disk, in bytes

    @classmethod
    def open(cls, directory: Path) -> Ledger:
        """The ledger of a directory; an empty one if it has none yet."""
        return cls.read(directory) if (directory / LEDGER_NAME).exists() else cls(directory)

    @classmethod
    def read(cls, directory: Path) -> Ledger:
        """The ledger of a run directory. A last line that was cut off by a crash is left out.

        Raises:
            RunError: a file is missing or damaged; the message names it and the line.
        """
        ledger = cls(directory)
        path = directory / LEDGER_NAME
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise RunError(
                f"{directory} is not a run directory: {path.name} cannot be read ({error.strerror})."
            ) from error
        *complete, rest = raw.split(b"\n")  # what follows the last line end was never finished
        for number, line in enumerate(complete, start=1):
            ledger.entries.append(_read_entry(directory, line, f"{path}, line {number}"))
        if _is_whole(rest[:-1]):
            raise RunError(f"{path}, line {len(complete) + 1}: the line end is damaged.")
        ledger._size = len(raw) - len(rest)
        return ledger

    def append(self, entry: LedgerEntry) -> None:
        """Keep an entry; with a directory, make it durable first.

        Raises:
            StorageError: it cannot be written; the ledger is as it was.
            RunError: another process has changed the ledger meanwhile.
        """
        if self.entries and entry.batch <= self.entries[-1].batch:
            raise ValueError(f"batch {entry.batch} cannot follow batch {self.entries[-1].batch}")
        if self.directory is not None:
            self._write(self.directory, entry)
        self.entries.append(entry)

    def active(self) -> list[Mapping[str, FactoredDelta]]:
        """The deltas that make up the model's state, in order."""
        return [entry.deltas for entry in self.entries]

    def _write(self, directory: Path, entry: LedgerEntry) -> None:
        name = f"batch-{entry.batch:05d}.safetensors"
        path = directory / DELTAS_NAME / name
        self._refuse_foreign(directory / LEDGER_NAME)
        write_tensors(path, _tensors(entry), {"batch": str(entry.batch)})
        record = {
            "batch": entry.batch,
            "file": name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "num_new": entry.num_new,
            "scale": entry.scale,
            "weights": list(entry.weights),
            "requests": [request.model_dump(mode="json") for request in entry.requests],
            "diagnostics": dict(entry.diagnostics),
        }
        body = json.dumps(record, ensure_ascii=False, sort_keys=True)
        try:
            self._append_line(directory, f"{_checksum(body)} {body}\n".encode())
        except OSError as error:
            path.unlink(missing_ok=True)  # no line speaks of it
            raise StorageError(
                f"Cannot write {directory / LEDGER_NAME}: {error.strerror}. The batch was not kept."
            ) from error

    def _refuse_foreign(self, path: Path) -> None:
        """Refuse to write behind lines that this process does not know, or without those that it does."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(self._size)
                rest = file.read()
        except FileNotFoundError:
            size, rest = 0, b""
        if size < self._size or b"\n" in rest:
            raise RunError(f"{path} was changed by another process. The batch was not kept.")

    def _append_line(self, directory: Path, line: bytes) -> None:
        path = directory / LEDGER_NAME
        # Unbuffered: a buffer that could not be written would be written again before the file is cut.
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb+", buffering=0) as file:
            try:
                file.truncate(self._size)  # what a crash left of a line
                file.seek(self._size)
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
                sync_directory(directory)
            except BaseException:
                file.truncate(self._size)  # half a line would damage the next one
                raise
        self._size += len(line)


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _is_whole(line: bytes) -> bool:
    checksum, _, body = line.decode("utf-8", errors="replace").partition(" ")
    return checksum == _checksum(body)


def _tensors(entry: LedgerEntry) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, delta in entry.deltas.items():
        tensors[f"left/{name}"] = delta.left
        tensors[f"right/{name}"] = delta.right
    for request_id, known in entry.known.items():
        tensors |= {f"key/{request_id}/{name}": key for name, key in known.keys.items()}
        tensors |= {f"value/{request_id}/{name}": value for name, value in known.values.items()}
    # A copy each: safetensors refuses tensors that share memory, as one key under two names does.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _read_entry(directory: Path, line: bytes, where: str) -> LedgerEntry:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not _is_whole(line):
        raise RunError(f"{where}: the checksum does not fit; the line was changed or damaged.")
    record: dict[str, Any] = json.loads(line.partition(b" ")[2])
    path = directory / DELTAS_NAME / Path(record["file"]).name
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RunError(f"{where}: {path} cannot be read ({error.strerror}).") from error
    if hashlib.sha256(raw).hexdigest() != record["sha256"]:
        raise RunError(f"{where}: {path} is not the file that was written; its sha256 differs.")
    try:
        tensors = load(raw)
    except SafetensorError as error:
        raise RunError(f"{where}: {path} is not a safetensors file ({error}).") from error
    requests = tuple(EditRequest.create(**request) for request in record["requests"])
    return LedgerEntry(
        batch=record["batch"],
        requests=requests,
        weights=tuple(record["weights"]),
        num_new=record["num_new"],
        deltas=_deltas(tensors),
        known={request.id: _known(tensors, request.id) for request in requests},
        diagnostics=record["diagnostics"],
        scale=record["scale"],
    )


def _deltas(tensors: Mapping[str, Tensor]) -> dict[str, FactoredDelta]:
    names = [key.removeprefix("left/") for key in tensors if key.startswith("left/")]
    return {name: FactoredDelta(tensors[f"left/{name}"], tensors[f"right/{name}"]) for name in names}


def _known(tensors: Mapping[str, Tensor], request_id: str) -> KnownTarget:
    def named(kind: str) -> dict[str, Tensor]:
        owner = f"{kind}/{request_id}"  # an id may have slashes, a weight's name has none
        return {key.rpartition("/")[2]: tensor for key, tensor in tensors.items() if key.rpartition("/")[0] == owner}

    return KnownTarget(keys=named("key"), values=named("value"))
