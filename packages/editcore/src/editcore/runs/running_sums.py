"""``sums.safetensors``: the weights of a directory's model after many batches, so that opening it need not read all.

A model with edits is ``((base + first) + second) + …``, in float64, rounded once. The file has such a sum of every
changed weight, over the batches up to one. The next batches are added to it, so a model has the same bits with the file
and without it. The file can be made again from the ledger at any time. It is used only for the batches, the base model
and the arithmetic that it was made for.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from editcore._util.files import tensors_hash, write_tensors
from editcore.interfaces.changes import Changes
from editcore.interfaces.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.ledger.ledger import Ledger
    from editcore.models.edited import EditedModel
    from editcore.models.language_model import LanguageModel

__all__ = ["SUMS_NAME", "KeepsSums", "keep_sums", "use_sums"]

_log = logging.getLogger(__name__)

SUMS_NAME = "sums.safetensors"
_EVERY = 64
"""The file is written when it lacks so many of the active batches. It holds whole matrices, while a batch holds thin
factors, so it is not written with each of them."""


@runtime_checkable
class KeepsSums(Protocol):
    """A backend that keeps base + active changes of each changed weight, in float64, summed in their order."""

    def take_sums(self, summed: Sequence[Changes], sums: Mapping[str, Tensor]) -> None:
        """Use sums that are known already; see :meth:`RawBackend.take_sums`."""
        ...

    def sums(self) -> Mapping[str, Tensor] | None:
        """The sums; ``None`` if some are not kept."""
        ...

    def change_of(self, address: str) -> Tensor | None:
        """The sum of the active changes of a weight, float64; ``None`` if it is not kept."""
        ...


def use_sums(edited: EditedModel, ledger: Ledger) -> None:
    """Give a backend the sums of a directory, if there are any and they are those of its first active batches. The
    model is unedited."""
    if not isinstance(edited.backend, KeepsSums) or ledger.directory is None:
        return
    path, hashes = ledger.directory / SUMS_NAME, list(ledger.active_hashes().values())
    count = _fitting(path, edited.model, hashes)
    if not count:
        return
    sums = _read(path)
    if sums is None:
        return
    first = [written.changes for written in ledger.active()[:count]]
    edited.backend.take_sums([changes for changes in first if changes], sums)


def keep_sums(edited: EditedModel, ledger: Ledger) -> None:
    """Write the sums of a directory, if many of its batches are not in the file yet. No other process may write there
    now. A file that cannot be written is left out, with a warning."""
    if not isinstance(edited.backend, KeepsSums) or ledger.directory is None:
        return
    path, hashes = ledger.directory / SUMS_NAME, list(ledger.active_hashes().values())
    if len(hashes) - _fitting(path, edited.model, hashes) < _EVERY:
        return
    sums = edited.backend.sums()
    if not sums:
        return
    sums = {address: total.cpu() for address, total in sums.items()}
    metadata = {"batches": str(len(hashes)), "sum_of": _identity(edited.model, hashes)}
    try:
        write_tensors(path, sums, {**metadata, "content": tensors_hash(metadata["sum_of"], sums)})
    except StorageError as error:
        _log.warning("%s The edits are kept; opening the directory takes longer without this file.", error)


def _fitting(path: Path, model: LanguageModel, hashes: Sequence[str]) -> int:
    """How many of the active batches are in the file; 0 if it is not a sum over the first of them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        count = int(metadata["batches"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return 0
    fits = 0 < count <= len(hashes) and metadata.get("sum_of") == _identity(model, hashes[:count])
    return count if fits else 0


def _read(path: Path) -> dict[str, Tensor] | None:
    """The sums, if the file is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError):
        sums, metadata = {}, {}
    if not sums or metadata.get("content") != tensors_hash(metadata.get("sum_of", ""), sums):
        _log.warning("%s was changed or damaged; it is not used, and all batches are read.", path)
        return None
    return sums


def _identity(model: LanguageModel, hashes: Sequence[str]) -> str:
    """A hash of all that a sum depends on: the base, the batches in their order, and what does the arithmetic."""
    arithmetic = f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {model.device.type}"
    of = [model.base_fingerprint, str(model.dtype), arithmetic, *hashes]
    return hashlib.sha256("\n".join(of).encode()).hexdigest()
