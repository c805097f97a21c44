"""The tensors of a batch: their names in a safetensors file, and what the names mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from editcore.interfaces.changes import Attachment, WeightChange, Written, as_change
from editcore.interfaces.history import LedgerEntry
from editcore.ledger.lines import AttachmentLine

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Lazy", "TensorNames", "change_at", "entry_tensors", "written_from", "written_tensors"]

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


@dataclass(frozen=True, slots=True)
class TensorNames:
    """What the names of a file's tensors say."""

    changes: tuple[str, ...]
    """Addresses of the weights that it changes."""
    known: Mapping[str, tuple[int, tuple[str, ...], tuple[str, ...]]]
    """By request id, its row, and the addresses at which it has a key and a value."""
    attachment: tuple[str, ...]
    memory: tuple[str, ...]

    @classmethod
    def of(
        cls, names: Iterable[str], ids: Sequence[str], same: dict[tuple[str, ...], tuple[str, ...]] | None = None
    ) -> TensorNames:
        """Sort the names of a file.

        Args:
            ids: of the requests, by row.
            same: equal tuples become one object in it, because the files of a ledger have mostly the same.

        Raises:
            ValueError, IndexError: a name is not that of a tensor of a batch.
        """
        sorted_names: dict[str, dict[str, None]] = {}
        known: dict[int, tuple[list[str], list[str]]] = {}
        for name in sorted(names):
            kind, _, rest = name.partition("/")
            if kind in ("key", "value"):
                row, _, address = rest.partition("/")
                known.setdefault(int(row), ([], []))[kind == "value"].append(address)
            else:
                sorted_names.setdefault(kind if kind in _BESIDE else "change", {})[rest] = None

        def shared(found: Iterable[str]) -> tuple[str, ...]:
            made = tuple(found)
            return made if same is None else same.setdefault(made, made)

        return cls(
            changes=shared(sorted(sorted_names.get("change", ()))),
            known={ids[row]: (row, shared(keys), shared(values)) for row, (keys, values) in sorted(known.items())},
            attachment=shared(sorted_names.get("attachment", ())),
            memory=shared(sorted_names.get("memory", ())),
        )


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
    addresses = {key.partition("/")[2] for key in tensors if key.partition("/")[0] not in _BESIDE}
    return {address: change_at(address, tensors) for address in sorted(addresses)}


def change_at(address: str, tensors: Mapping[str, Tensor]) -> WeightChange:
    """The change of one weight, from the tensors of a file.

    Raises:
        ValueError: they are not those of a change.
    """
    parts = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition("/")
        if rest == address and part not in _BESIDE:
            parts[part] = tensor
    return as_change(parts)


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
