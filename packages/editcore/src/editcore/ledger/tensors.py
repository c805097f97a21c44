"""The tensors of a batch: their names in a safetensors file, and reading them on first use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from editcore.interfaces.changes import Attachment, WeightChange, Written, as_change
from editcore.interfaces.errors import RunError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.values import KnownTarget
from editcore.ledger.lines import AttachmentLine, TensorFile

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Lazy", "StoredTensors", "entry_tensors", "written_from", "written_tensors"]

V = TypeVar("V")


class Lazy(Mapping[str, V]):
    """A mapping that is made on first use."""

    def __init__(self, make: Callable[[], Mapping[str, V]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, V]:
        return self._make()

    def __getitem__(self, name: str) -> V:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of one line, read and checked on first use."""

    folder: Path
    file: TensorFile | None
    where: str
    ids: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file, for messages."""
        return self.folder / (self.file.name if self.file is not None else "")

    def written(self, attachment: AttachmentLine | None) -> Written:
        """What the batch put into the model."""
        return Written(
            changes=self._lazy(_changes),
            attachment=None
            if attachment is None
            else Attachment(
                kind=attachment.kind,
                fields=attachment.fields,
                tensors=self._lazy(lambda tensors: _named(tensors, "attachment")),
            ),
            memory=self._lazy(lambda tensors: _named(tensors, "memory")),
        )

    @property
    def known(self) -> Mapping[str, KnownTarget]:
        """Keys and values by request id."""
        return self._lazy(lambda tensors: _known(tensors, self.ids))

    def _lazy(self, pick: Callable[[Mapping[str, Tensor]], Mapping[str, V]]) -> Mapping[str, V]:
        return {} if self.file is None else Lazy(lambda: self._checked(pick))

    def _checked(self, pick: Callable[[Mapping[str, Tensor]], Mapping[str, V]]) -> Mapping[str, V]:
        try:
            return pick(self._tensors)
        except (KeyError, ValueError, IndexError) as error:
            raise RunError(f"{self.where}: {self.path} does not hold the tensors of a batch ({error}).") from error

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        assert self.file is not None
        try:
            size = self.path.stat().st_size
            if size != self.file.size:
                raise RunError(
                    f"{self.where}: {self.path} has {size} bytes, {self.file.size} were written; it was cut off or "
                    "changed."
                )
            raw = self.path.read_bytes()
        except OSError as error:
            raise RunError(f"{self.where}: {self.path} cannot be read ({error.strerror}).") from error
        if hashlib.sha256(raw).hexdigest() != self.file.sha256:
            raise RunError(f"{self.where}: {self.path} is not the file that was written; its sha256 differs.")
        try:
            return load(raw)
        except SafetensorError as error:
            raise RunError(f"{self.where}: {self.path} is not a safetensors file ({error}).") from error


def entry_tensors(entry: LedgerEntry) -> dict[str, Tensor]:
    """Every tensor of a batch: what it writes, and the keys and values of its requests."""
    tensors = written_tensors(entry.written)
    for row, request in enumerate(entry.requests):
        known = entry.known.get(request.id)
        if known is not None:
            tensors |= {f"key/{row}/{name}": key.clone() for name, key in known.keys.items()}
            tensors |= {f"value/{row}/{name}": value.clone() for name, value in known.values.items()}
    return tensors


def written_tensors(written: Written) -> dict[str, Tensor]:
    """Every tensor that a batch writes, by its name in a file. :func:`written_from` reads them."""
    # Copies, because safetensors refuses tensors that share memory, such as one key under two names.
    found = {
        f"{part}/{address}": tensor.contiguous().clone()
        for address, change in written.changes.items()
        for part, tensor in change.tensors().items()
    }
    beside = {} if written.attachment is None else written.attachment.tensors
    for kind, tensors in (("attachment", beside), ("memory", written.memory)):
        found |= {f"{kind}/{name}": tensor.contiguous().clone() for name, tensor in tensors.items()}
    return found


_BESIDE = {"key", "value", "attachment", "memory"}
"""First parts of the names of tensors that do not belong to a change."""


def _changes(tensors: Mapping[str, Tensor]) -> dict[str, WeightChange]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        part, _, address = key.partition("/")
        if part not in _BESIDE:
            parts.setdefault(address, {})[part] = tensors[key]
    return {address: as_change(parts[address]) for address in sorted(parts)}


def written_from(tensors: Mapping[str, Tensor], attachment: AttachmentLine | None) -> Written:
    """What a batch writes, from its tensors.

    Raises:
        ValueError: the tensors are not those of changes.
    """
    beside = None
    if attachment is not None:
        beside = Attachment(kind=attachment.kind, fields=attachment.fields, tensors=_named(tensors, "attachment"))
    return Written(changes=_changes(tensors), attachment=beside, memory=_named(tensors, "memory"))


def _named(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{kind}/"): tensors[key] for key in sorted(tensors) if key.startswith(f"{kind}/")}


def _known(tensors: Mapping[str, Tensor], ids: Sequence[str]) -> dict[str, KnownTarget]:
    parts: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    rows: dict[int, str] = dict(enumerate(ids))
    for key in sorted(tensors):
        kind, _, rest = key.partition("/")
        if kind in ("key", "value"):
            row, _, name = rest.partition("/")
            found = parts.setdefault(rows[int(row)], ({}, {}))
            found[kind == "value"][name] = tensors[key]
    return {name: KnownTarget(keys=parts[name][0], values=parts[name][1]) for name in ids if name in parts}
