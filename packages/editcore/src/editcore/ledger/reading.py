"""Reads tensor files of a ledger: their names at once, and their tensors when they are needed.

Only the tensors of the files that were read last stay in memory, so a ledger may be larger than the memory. The names
of a file's tensors are read from its head. Its hash is compared whenever its tensors are read.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from editcore.interfaces.changes import Attachment, WeightChange, Written
from editcore.interfaces.errors import RunError
from editcore.interfaces.values import KnownTarget
from editcore.ledger.lines import AttachmentLine, TensorFile
from editcore.ledger.tensors import TensorNames, change_at

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StoredTensors", "TensorReader"]

_MAX_BYTES = 64 << 20
"""The tensors that were read last take at most so many bytes, or those of one file."""

V = TypeVar("V")


class TensorReader:
    """The tensor files of one ledger.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.check: Callable[[StoredTensors, Mapping[str, Tensor]], None] | None = None
        """Called with the tensors of a file whenever they are read. It raises an error if they cannot be used."""
        self._recent: OrderedDict[str, tuple[int, Mapping[str, Tensor]]] = OrderedDict()
        """By name, the size of a file and its tensors; the ones looked at last come last."""
        self._bytes = 0
        self._same: dict[tuple[str, ...], tuple[str, ...]] = {}

    def names(self, stored: StoredTensors) -> TensorNames:
        """The names of the tensors in a file.

        Raises:
            RunError: the file cannot be read, is damaged, or is not the file of a batch.
        """
        with stored.problems():
            return TensorNames.of(self._names(stored), stored.ids, self._same)

    def tensors(self, stored: StoredTensors) -> Mapping[str, Tensor]:
        """The tensors of a file, by their names in it.

        Raises:
            RunError: the file cannot be read, is damaged, or does not fit (:attr:`check`).
        """
        assert stored.file is not None
        name = stored.file.name
        if name in self._recent:
            self._recent.move_to_end(name)
            return self._recent[name][1]
        tensors = _load(stored)
        if self.check is not None:
            self.check(stored, tensors)
        self._recent[name] = stored.file.size, tensors
        self._bytes += stored.file.size
        while len(self._recent) > 1 and self._bytes > _MAX_BYTES:
            _, (size, _) = self._recent.popitem(last=False)
            self._bytes -= size
        return tensors

    def _names(self, stored: StoredTensors) -> Iterable[str]:
        assert stored.file is not None
        try:
            with stored.path.open("rb") as stream:
                head = stream.read(8)
                header = json.loads(stream.read(min(int.from_bytes(head, "little"), stored.file.size)))
                if stream.seek(0, 2) != stored.file.size or not isinstance(header, dict):
                    raise ValueError
            return [name for name in header if name != "__metadata__"]
        except (OSError, ValueError, RecursionError):
            return self.tensors(stored)  # says what is wrong with the file


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of one line."""

    reader: TensorReader
    file: TensorFile | None
    where: str
    """The line, for messages."""
    ids: tuple[str, ...]
    """Of the requests whose keys and values they are."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.reader.folder / (self.file.name if self.file is not None else "")

    def written(self, attachment: AttachmentLine | None) -> Written:
        """What the batch put into the model."""
        return Written(
            changes=self._mapping(lambda: self.names.changes, self._change),
            attachment=None
            if attachment is None
            else Attachment(kind=attachment.kind, fields=attachment.fields, tensors=self._named("attachment")),
            memory=self._named("memory"),
        )

    @property
    def known(self) -> Mapping[str, KnownTarget]:
        """Keys and values by request id."""
        return self._mapping(lambda: tuple(self.names.known), self._known)

    @cached_property
    def names(self) -> TensorNames:
        """The names of the tensors."""
        return self.reader.names(self)

    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor, by its name in the file."""
        return {} if self.file is None else self.reader.tensors(self)

    @contextmanager
    def problems(self) -> Iterator[None]:
        """Inside the block, an error in the names becomes a sentence about the file."""
        try:
            yield
        except (KeyError, ValueError, IndexError) as error:
            raise RunError(f"{self.where}: {self.path} does not hold the tensors of a batch ({error}).") from error

    def _change(self, address: str) -> WeightChange:
        with self.problems():
            return change_at(address, self.tensors())

    def _known(self, request_id: str) -> KnownTarget:
        row, keys, values = self.names.known[request_id]
        return KnownTarget(
            keys=self._mapping(lambda: keys, lambda name: self.tensors()[f"key/{row}/{name}"]),
            values=self._mapping(lambda: values, lambda name: self.tensors()[f"value/{row}/{name}"]),
        )

    def _named(self, kind: str) -> Mapping[str, Tensor]:
        return self._mapping(lambda: getattr(self.names, kind), lambda name: self.tensors()[f"{kind}/{name}"])

    def _mapping(self, names: Callable[[], Sequence[str]], get: Callable[[str], V]) -> Mapping[str, V]:
        return {} if self.file is None else _Stored(names, get)


class _Stored(Mapping[str, V]):
    """A mapping whose values are read when they are looked up, and not kept."""

    def __init__(self, names: Callable[[], Sequence[str]], get: Callable[[str], V]) -> None:
        self._names, self._get = names, get

    def __getitem__(self, name: str) -> V:
        if name not in self._names():
            raise KeyError(name)
        return self._get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


def _load(stored: StoredTensors) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path, file, where = stored.path, stored.file, stored.where
    assert file is not None
    try:
        size = path.stat().st_size
        if size != file.size:
            raise RunError(f"{where}: {path} has {size} bytes, {file.size} were written; it was cut off or changed.")
        raw = path.read_bytes()
    except OSError as error:
        raise RunError(f"{where}: {path} cannot be read ({error.strerror}).") from error
    if hashlib.sha256(raw).hexdigest() != file.sha256:
        raise RunError(f"{where}: {path} is not the file that was written; its sha256 differs.")
    try:
        return load(raw)
    except SafetensorError as error:
        raise RunError(f"{where}: {path} is not a safetensors file ({error}).") from error
