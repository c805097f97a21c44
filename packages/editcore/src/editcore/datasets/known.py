"""True facts that a model may know, for causal tracing. This module imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editcore.datasets.fields import join_of, without_last_space
from editcore.datasets.files import read_entries
from editcore.datasets.formats import parse_record
from editcore.datasets.load import Selection, load_records, read_each
from editcore.datasets.names import Registry, is_path, missing_file
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import DatasetError, RequestError
from editcore.interfaces.values import FactRecord

__all__ = ["KnownFact", "load_known_facts"]

_log = logging.getLogger(__name__)


@documented
@dataclass(frozen=True, slots=True)
class KnownFact:
    """A true statement: ``prompt`` is continued by ``attribute``."""

    subject: str
    """What the statement is about."""
    prompt: str
    """The text up to the attribute. It contains the subject."""
    attribute: str
    """The continuation, without a leading space."""
    join: str | None = None
    """The text between prompt and attribute; see :attr:`editcore.EditRequest.join`."""


def load_known_facts(
    name_or_path: str | Path, *, plugins: Registry, notes: list[str] | None = None, strict: bool = False
) -> list[KnownFact]:
    """The true facts of a data set (``NAME`` or ``NAME:ARGUMENT``) or a file.

    A file may be in ROME's ``known_1000`` format (``subject``, ``prompt``, ``attribute``) or in any format that
    :func:`load_records` reads. The true fact of a record is the one before the edit (``target_true``). Records that
    have none, or cannot be read, are left out, and a note says so.

    Args:
        notes: a list to which sentences for the user are added; without it they are logged.
        strict: refuse a file with a record that has no true fact or cannot be read; the error lists them.

    Raises:
        UnknownNameError: there is no data set of that name.
        HParamsError: the data set does not take this argument.
        DatasetError: the file cannot be read, or has no true fact.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and not is_path(name, plugins):
        records = load_records(name, plugins=plugins, notes=notes, selection=Selection(strict=strict))
        facts, left_out = read_each(
            enumerate(records, start=1),
            lambda _, record: _true_facts([record]),
            f"The data set '{name}'",
            strict=strict,
            unit="record",
        )
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise DatasetError(missing_file(path, name, plugins))
        facts, left_out = read_each(read_entries(path), _facts_of, str(path), strict=strict)
    if left_out and notes is None:
        _log.warning("%s", left_out)
    elif left_out and notes is not None:
        notes.append(left_out)
    return facts


def _facts_of(_line: int, fields: Any) -> list[KnownFact]:
    if not isinstance(fields, dict):
        raise RequestError(f"A record must be an object, found {type(fields).__name__}.")
    return [_known_1000_fact(fields)] if "attribute" in fields else _true_facts(parse_record(fields))


def _known_1000_fact(fields: Mapping[str, Any]) -> KnownFact:
    texts = {}
    for name in ("subject", "prompt", "attribute"):
        value = fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise RequestError(f"The field '{name}' must be a text, found {value!r}.")
        texts[name] = without_last_space(value) if name == "prompt" else value.strip()
    if texts["subject"] not in texts["prompt"]:
        raise RequestError(f"The subject '{texts['subject']}' is not in the prompt '{texts['prompt']}'.")
    return KnownFact(**texts, join=join_of(fields))


def _true_facts(records: list[FactRecord]) -> list[KnownFact]:
    requests = [record.request for record in records]
    facts = [
        KnownFact(request.subject, request.text, request.target_true, request.join)
        for request in requests
        if request.target_true is not None and request.subject  # tracing disturbs the subject's tokens
    ]
    if not facts:
        raise RequestError("There is no true fact in it; a record needs attribute or target_true, and a subject.")
    return facts
