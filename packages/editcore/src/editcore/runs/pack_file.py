"""The file of a pack, as far as it is read without torch: what it is, and its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from editcore.interfaces.errors import RunError
from editcore.interfaces.values import EditRequest, first_problem
from editcore.ledger.lines import BatchLine
from editcore.runs.record import RUN_NAME

__all__ = ["HASH", "MANIFEST", "Manifest", "manifest_of", "opened_pack", "read_manifest"]

MANIFEST, HASH = "editpack", "content_hash"


class Manifest(BaseModel):
    """The description of a pack, in its metadata."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    format: Literal[3] = 3
    model: str
    """The base model's name where the pack was made."""
    fingerprint: str
    """Of the unedited weights."""
    dtype: str
    """Type of the weights for which the edits were made."""
    chat_template: bool
    """Whether prompts were the user's turns of a chat."""
    editor: str
    settings: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    batches: tuple[BatchLine, ...]
    """As in a ledger, without files, and without the edits that were undone."""

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The facts that it writes, oldest first."""
        return tuple(request for batch in self.batches for request in batch.requests[: batch.num_new])


def read_manifest(path: Path | str) -> Manifest:
    """The description of a pack. Its tensors are neither read nor held against the hash.

    Raises:
        RunError: the file cannot be read, or is no pack.
    """
    path = Path(path)
    with opened_pack(path, framework="numpy") as file:
        return manifest_of(path, file.metadata())


@contextmanager
def opened_pack(path: Path, *, framework: Literal["numpy", "pt"]) -> Iterator[Any]:
    """A pack as safetensors opens it; its metadata has a manifest.

    Raises:
        RunError: the file cannot be read, or is no pack. The message says which command takes it.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise RunError(f"There is no file {path}; a pack is the one file that 'editctl pack' writes.")
    if path.is_dir():
        raise RunError(f"{path} is not an edit pack: {_what_it_may_be(path)}.")
    try:
        with safe_open(path, framework=framework) as file:
            if MANIFEST not in (file.metadata() or {}):
                raise RunError(f"{path} is not an edit pack: {_what_it_may_be(path)}.")
            yield file
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (SafetensorError, ValueError) as error:
        raise RunError(f"{path} is not an edit pack: {_what_it_may_be(path)} (reading it as one: {error}).") from error


def manifest_of(path: Path, metadata: Mapping[str, str]) -> Manifest:
    """The manifest in the metadata of a pack.

    Raises:
        RunError: this version of editcore does not read it.
    """
    try:
        return Manifest.model_validate_json(metadata[MANIFEST])
    except ValidationError as error:
        raise RunError(
            f"{path} has a manifest that this version of editcore does not read ({first_problem(error)})."
        ) from error


def _what_it_may_be(path: Path) -> str:
    """What a file or folder that is not a pack may be, and which command takes it."""
    if path.is_dir():
        if (path / RUN_NAME).exists():
            return f"it is a run directory; make a pack of it with: editctl pack {path} FILE.editpack"
        return "it is a folder; a pack is the one file that 'editctl pack' writes"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if {".jsonl", ".json", ".csv"} & set(suffixes[-2:]):
        return f"by its name it is a file of records; edit them with: editctl run --editor NAME --dataset {path}"
    if suffixes[-1:] == [".safetensors"]:
        return "by its name it has the weights of a model or an adapter; a pack is written by 'editctl pack'"
    return "a pack is the one file that 'editctl pack' writes"
