"""Converts between the ledger entry of a batch and its line, and makes an entry without some of its edits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from typing import Any

from pydantic import ValidationError

from editcore.interfaces.changes import Written
from editcore.interfaces.errors import PluginError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.values import EditBatch, HeldKey, first_problem
from editcore.ledger.lines import AttachmentLine, BatchLine, HeldLine, TensorFile
from editcore.ledger.reading import StoredTensors
from editcore.ledger.tensors import Lazy

__all__ = ["attachment_line", "batch_line", "entry_composed_anew", "entry_of", "entry_without"]

_IN_OTHER_FORM = {"attachment", "held"}
_ALIKE = tuple(
    field.name
    for field in fields(LedgerEntry)
    if field.name in BatchLine.model_fields and field.name not in _IN_OTHER_FORM
)
"""Fields that have the same form in an entry and in a line."""


def batch_line(entry: LedgerEntry, file: TensorFile | None, held: HeldLine | None = None) -> BatchLine:
    """The entry without its tensors, which are in ``file``.

    Args:
        held: references to the keys that the batch left alone.

    Raises:
        PluginError: a plugin's diagnostics or verdicts are not what they should be.
    """
    try:
        return BatchLine(file=file, attachment=attachment_line(entry.written), held=held, **_fields_alike(entry))
    except ValidationError as error:
        raise PluginError(f"Batch {entry.batch} cannot be kept: {first_problem(error)}.") from error


def entry_of(line: BatchLine, stored: StoredTensors, held: Sequence[HeldKey]) -> LedgerEntry:
    """The entry of a line.

    Args:
        stored: the tensors of the line.
        held: the keys that the batch left alone.
    """
    written = stored.written(line.attachment)
    return LedgerEntry(
        changes=written.changes,
        attachment=written.attachment,
        known=stored.known,
        memory=written.memory,
        held=held,
        **_fields_alike(line),
    )


def _fields_alike(batch: LedgerEntry | BatchLine) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in _ALIKE}


def entry_composed_anew(entry: LedgerEntry, batch: EditBatch, written: Written) -> LedgerEntry:
    """The entry with the requests and known targets of ``batch``. ``written`` is its solution."""
    rest = entry_without(entry, {name for name in entry.new_ids if name not in _ids(batch)}, written)
    return replace(rest, requests=batch.requests, weights=batch.weights, num_new=batch.num_new, known=batch.known)


def _ids(batch: EditBatch) -> set[str]:
    return {request.id for request in batch.requests}


def entry_without(entry: LedgerEntry, undone: Collection[str], written: Written) -> LedgerEntry:
    """The entry without the new requests in ``undone``. ``written`` is the solution of the rest."""
    # Without known targets and held keys, which are read from the disk when they are first looked at.
    whole = EditBatch(index=entry.batch, requests=entry.requests, weights=entry.weights, num_new=entry.num_new)
    rest = whole.keep(entry.kept_rows(undone))
    kept = {request.id for request in rest.requests}
    return replace(
        entry,
        requests=rest.requests,
        weights=rest.weights,
        num_new=rest.num_new,
        changes=written.changes,
        attachment=written.attachment,
        known=Lazy(lambda: {name: known for name, known in entry.known.items() if name in kept}),
        memory=written.memory,
        evidence=tuple(fact for fact in entry.evidence if fact.request_id in kept),
    )


def attachment_line(written: Written) -> AttachmentLine | None:
    """An attachment without its tensors; ``None`` if there is none."""
    attachment = written.attachment
    return None if attachment is None else AttachmentLine(kind=attachment.kind, fields=attachment.fields)
