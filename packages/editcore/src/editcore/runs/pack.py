"""The active edits of a run as one file, to be applied to the same base model elsewhere.

An ``.editpack`` is a safetensors file with the changes and attachments of every batch. Its metadata holds a manifest
(base model, editor, settings, versions, and the batches with their requests and evidence) and a hash over manifest and
tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from editcore._util.files import tensors_hash, write_tensors
from editcore.interfaces.changes import Written
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.values import EditRequest
from editcore.ledger.entries import batch_line
from editcore.ledger.ledger import Ledger
from editcore.ledger.tensors import written_from, written_tensors
from editcore.models.edited import EditedModel
from editcore.models.writing import misfits
from editcore.plugins.registry import Plugins
from editcore.runs.backends import RawBackend, shape_in_words
from editcore.runs.pack_file import HASH, MANIFEST, Manifest, manifest_of, opened_pack
from editcore.runs.record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.models import LanguageModel

__all__ = ["EditPack", "read_pack", "write_pack"]


@documented
@dataclass(frozen=True, slots=True)
class EditPack:
    """A pack that was read and checked."""

    path: Path
    """The file."""
    manifest: Manifest
    """Its description."""
    written: tuple[Written, ...]
    """What each batch writes."""

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The facts that it writes, oldest first."""
        return self.manifest.requests

    def apply(self, model: LanguageModel, plugins: Plugins, *, force: bool = False) -> EditedModel:
        """Put the edits into an unedited model. Its weights then have the bits of the packed run.

        Args:
            plugins: the installed plugins, which announce the kinds of attachments.
            force: whether to apply the edits even if the model has other weights than the pack was made for. The shapes
                must fit.

        Raises:
            RunError: the model is another one, or a change does not fit its weight; the model is as it was.
            EditcoreError: an attachment cannot be installed; the model is as it was.
        """
        if not force and model.base_fingerprint != self.manifest.fingerprint:
            raise RunError(
                f"{self.path} was made for '{self.manifest.model}' with the fingerprint "
                f"{self.manifest.fingerprint[:12]}; '{model.name}' has {model.base_fingerprint[:12]}. With other "
                "weights its edits may have any effect; --force applies them anyway."
            )
        for written in self.written:
            for address, found, expected in misfits(model, written.changes):
                raise RunError(
                    f"{self.path}: the change of {address} is {shape_in_words(found)}, in '{model.name}' the weight is "
                    f"{shape_in_words(expected)}."
                )
        backend = RawBackend()
        backend.open(model)
        edited = EditedModel(model, backend, spec=plugins.backend("raw"), plugins=plugins)
        edited.rebuild(self.written)
        return edited


def write_pack(directory: Path | str, path: Path | str, plugins: Plugins) -> EditPack:
    """Pack what is active in a run.

    Raises:
        RunError: there is no run or no active edit, ``path`` is there already, or the run's backend does not keep its
            edits in weights.
        StorageError: the file cannot be written.
    """
    directory = Path(directory)
    path = Path(path)
    if path.exists():
        raise RunError(f"{path} is already there; give a name that does not exist yet.")
    record, ledger = RunRecord.read(directory), Ledger.read(directory)
    history = ledger.history()
    if not plugins.backend(record.config.backend).writes_weights:
        raise RunError(
            f"The edits in {directory} cannot be packed: the backend '{record.config.backend}' does not keep them in "
            "weights, and a pack is applied to weights."
        )
    if not history:
        raise RunError(f"No edit is active in {directory}, so there is nothing to pack.")
    manifest = Manifest(
        model=_portable_name(record),
        fingerprint=record.model.fingerprint,
        dtype=record.config.dtype,
        chat_template=record.config.chat_template,
        editor=record.config.editor,
        settings=record.settings,
        versions=record.versions,
        batches=tuple(batch_line(entry, None) for entry in history),
    )
    tensors = {
        f"{entry.batch}/{name}": tensor
        for entry in history
        # An editor's memory is for its next batch, and no batch follows a pack.
        for name, tensor in written_tensors(replace(entry.written, memory={})).items()
    }
    text = manifest.model_dump_json()
    write_tensors(path, tensors, {MANIFEST: text, HASH: tensors_hash(text, tensors)})
    return EditPack(path, manifest, tuple(entry.written for entry in history))


def _portable_name(record: RunRecord) -> str:
    """The name of a run's base model that is valid on other machines."""
    if record.model.folder is None:
        return record.config.model
    hub = record.model.hub
    return hub.id if hub is not None else Path(record.config.model).name


def read_pack(path: Path | str) -> EditPack:
    """Read a pack, and check it by its hash.

    Raises:
        RunError: the file cannot be read, is not a pack, was changed or damaged, or holds NaN or Inf.
    """
    path = Path(path)
    with opened_pack(path, framework="pt") as file:
        # safetensors has compared the file's table with its length, so no tensor claims more bytes than there are.
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        metadata = file.metadata()
    if metadata.get(HASH) != tensors_hash(metadata[MANIFEST], tensors):
        raise RunError(f"{path} was changed or damaged after it was written: its content hash differs.")
    manifest = manifest_of(path, metadata)
    try:
        return EditPack(path, manifest, tuple(_written(manifest, tensors)))
    except (KeyError, ValueError) as error:
        raise RunError(f"{path} does not hold the tensors that its manifest lists ({error}).") from error


def _written(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Iterator[Written]:
    """What each batch writes.

    Raises:
        ValueError: tensors are missing, belong to no batch, or hold NaN or Inf.
    """
    parts: dict[int, dict[str, Tensor]] = {batch.batch: {} for batch in manifest.batches}
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"'{name}' of batch {index} is not made of finite numbers")
        parts[int(index)][name] = tensor
    for batch in manifest.batches:
        written = written_from(parts[batch.batch], batch.attachment)
        for address, change in written.changes.items():
            if not all(tensor.is_floating_point() for tensor in change.tensors().values()):
                raise ValueError(f"the change of {address} is not made of finite numbers")
        if not written.changes and written.attachment is None:
            raise ValueError(f"batch {batch.batch} writes nothing")
        yield written
