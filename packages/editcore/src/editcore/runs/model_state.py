"""Which state a model is in: a hash of everything that its answers depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from editcore._util.files import file_sha256, json_text, tensors_hash
from editcore.interfaces.changes import Written
from editcore.ledger.tensors import written_tensors
from editcore.models.edited import EditedModel
from editcore.plugins.versions import code_versions
from editcore.runs.backends import RawBackend

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["edited_state", "model_state"]

_LIBRARIES = ("torch", "transformers", "tokenizers")


def model_state(model: LanguageModel) -> str:
    """The state of a model without edits: its weights, their type, the device, and the libraries that compute."""
    libraries = {name: version(name) for name in _LIBRARIES}
    computed = [model.base_fingerprint, str(model.dtype), str(model.compute_dtype), model.device.type]
    return _digest([*computed, libraries])


def edited_state(edited: EditedModel, active: Sequence[Written], *, directory: Path | None = None) -> str:
    """The state of a model with its edits.

    Args:
        active: what the edits write, oldest first.
        directory: of the run, if there is one. A backend of a plugin may keep more there than the edits, so all files
            of the directory are a part of the state then.
    """
    parts: list[object] = [model_state(edited.model)]
    for written in active:
        attachment = written.attachment
        described = None if attachment is None else [attachment.kind, dict(attachment.fields)]
        parts.append(tensors_hash(json_text(described), written_tensors(replace(written, memory={}))))
    if any(written.attachment is not None for written in active):  # what an attachment does is its package's code
        parts.append(dict(code_versions(edited.plugins)))
    if directory is not None and not isinstance(edited.backend, RawBackend):
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        parts += [edited.spec.name, *([str(path.relative_to(directory)), file_sha256(path)] for path in files)]
    return _digest(parts)


def _digest(parts: object) -> str:
    return hashlib.sha256(json_text(parts).encode()).hexdigest()
