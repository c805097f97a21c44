"""The lines of ``ledger.jsonl``: the fields of each kind, and how a line is written and read.

A line is a checksum, a space, a JSON object and a line end. Numbers that JSON does not have are written as the texts
``"Infinity"``, ``"-Infinity"`` and ``"NaN"``; every other number reads back to the bit. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.history import Signature
from editcore.interfaces.values import EditEvidence, EditRequest, RejectedRequest, Verdict, first_problem

__all__ = [
    "FORMAT",
    "AttachmentLine",
    "BatchLine",
    "HeaderLine",
    "HeldGroup",
    "HeldLine",
    "Line",
    "RevisionLine",
    "TensorFile",
    "UndoLine",
    "decode",
    "encode",
    "is_whole",
]

FORMAT = 4
"""It is increased when the meaning of a line or of a tensor file changes."""

BatchIndex = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", use_attribute_docstrings=True)


class TensorFile(_Model):
    """The name, size and hash of a safetensors file in ``deltas/``, from when its line was written."""

    name: Annotated[str, Field(pattern=r"^batch-[0-9]{5,12}(-[0-9]{1,12})?\.safetensors$")]
    size: Annotated[int, Field(ge=0)]
    """In bytes; a file of another size is not read at all."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@documented
class HeaderLine(_Model):
    """The first line: what the edits were made for."""

    kind: Literal["header"] = "header"
    """The kind of line."""
    format: int = FORMAT
    """Format of the files; other formats are not read."""
    model: str
    """Name of the model."""
    fingerprint: str
    """Fingerprint of the unedited weights; see :meth:`editcore.LanguageModel.fingerprint`."""
    editor: str
    """Name of the editor."""


class HeldGroup(_Model):
    """References to facts of earlier batches whose keys a batch left alone, with one weight."""

    weight: Annotated[float, Field(ge=0)]
    rows: Annotated[tuple[Annotated[tuple[BatchIndex, ...], Field(min_length=2)], ...], Field(min_length=1)]
    """For each earlier batch, its index, and then the indices of the facts among its requests."""


class HeldLine(_Model):
    """The facts of earlier batches whose keys a batch left alone, as a difference from those of another batch."""

    like: BatchIndex | None = None
    """The earlier batch that left almost the same keys alone; ``None`` if ``added`` are all."""
    removed: tuple[HeldGroup, ...] = ()
    """Left alone by that batch and not by this one."""
    added: tuple[HeldGroup, ...] = ()
    """Left alone by this batch and not by that one."""


class AttachmentLine(_Model):
    """An attachment without its tensors, which are in the file of the batch."""

    kind: Annotated[str, Field(min_length=1)]
    fields: Mapping[str, Any]


class BatchLine(_Model):
    """One batch that was applied, or rejected (its ``scale`` is 0)."""

    kind: Literal["batch"] = "batch"
    batch: BatchIndex
    file: TensorFile | None
    """The file with the tensors of an applied batch; ``None`` if it has none."""
    attachment: AttachmentLine | None = None
    scale: Annotated[float, Field(ge=0, le=1)]
    num_new: Annotated[int, Field(ge=0)]
    requests: tuple[EditRequest, ...]
    weights: tuple[float, ...]
    held: HeldLine | None = None
    """``None`` if it left no key alone."""
    diagnostics: Mapping[str, float]
    evidence: tuple[EditEvidence, ...]
    notes: tuple[str, ...]
    reason: str
    verdicts: Mapping[str, Verdict]
    builds_on: tuple[tuple[BatchIndex, str], ...] = ()
    rejected: tuple[RejectedRequest, ...] = ()
    signature: Signature | None = None


class RevisionLine(_Model):
    """A batch solved again without some edits. It changes nothing until a line says that they are undone."""

    kind: Literal["revision"] = "revision"
    batch: BatchIndex
    without: tuple[tuple[BatchIndex, str], ...] = ()
    """Batch and id of each edit that is otherwise than when the batch came: its own that are left out, and earlier ones
    that it builds on and that were undone or redone since."""
    never: tuple[tuple[BatchIndex, str], ...] = ()
    """Batch and id of each edit, of this batch or of an earlier one, that is left out as if it had never been
    solved."""
    requests: tuple[EditRequest, ...] = ()
    """The requests that were solved, if their values were found anew or replayed ones were left out; their values are
    then in ``file``. Left out, they are the remaining ones of the batch, with the values that it has."""
    weights: tuple[float, ...] = ()
    """One per request of ``requests``."""
    file: TensorFile | None
    attachment: AttachmentLine | None = None


class UndoLine(_Model):
    """Edits that are out of the model from here on, or back in it."""

    kind: Literal["undo", "redo"]
    edits: Annotated[tuple[tuple[BatchIndex, str], ...], Field(min_length=1)]
    """Batch and id of each edit."""
    as_if_never: bool = False
    """Whether they are undone as if they had never been solved."""
    signature: Signature | None = None
    """Who changed it."""


Line = HeaderLine | BatchLine | RevisionLine | UndoLine

_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def encode(line: Line) -> bytes:
    """A line of the file, with its end."""
    body = line.model_dump_json()
    return f"{_checksum(body.encode())} {body}\n".encode()


def decode(raw: bytes, where: str) -> Line:
    """A line read from the file, without its end.

    Raises:
        RunError: the line was changed or damaged, or another version of editcore wrote it.
    """
    if not is_whole(raw):
        raise RunError(f"{where}: the checksum does not fit; the line was changed or damaged.")
    body = raw.partition(b" ")[2]
    try:
        line = _LINE.validate_json(body)
    except ValidationError as error:
        written = _format_of(body)
        if written not in (None, FORMAT):
            raise _unknown_format(written, where) from error
        raise RunError(f"{where}: this is not a line of a ledger ({first_problem(error)}).") from error
    if isinstance(line, HeaderLine) and line.format != FORMAT:
        raise _unknown_format(line.format, where)
    return line


def is_whole(raw: bytes) -> bool:
    """Whether the checksum of a line (without its line end) fits its content."""
    checksum, _, body = raw.partition(b" ")
    return checksum == _checksum(body).encode()


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _format_of(body: bytes) -> object:
    """The format in the header of another version; ``None`` for anything else."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return fields.get("format") if isinstance(fields, dict) and fields.get("kind") == "header" else None


def _unknown_format(found: object, where: str) -> RunError:
    return RunError(
        f"{where}: the ledger has format {found!r}, this version of editcore reads format {FORMAT}. "
        "Open it with the version that wrote it."
    )
