"""Loads data sets and files of records as fact records.

Records that cannot be edited are left out, and a note names them. A strict reading refuses them instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from editcore._util.words import counted
from editcore.datasets.check import with_unique_ids
from editcore.datasets.fields import Unread
from editcore.datasets.files import STANDARD_INPUT, Entries, json_lines, read_entries, read_standard_input
from editcore.datasets.form import Format
from editcore.datasets.formats import BUILT_IN, formats_of, parse_record
from editcore.datasets.names import Registry, dataset_settings, is_path, missing_file
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import DatasetError, RequestError
from editcore.interfaces.values import EditRequest, FactRecord, first_problem
from editcore.plugins.calls import boundary, resolve

__all__ = [
    "Loaded",
    "Selection",
    "content_hash",
    "load",
    "load_records",
    "load_worldfacts",
    "read_each",
    "records_of_editcore",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_NAMED = 10
"""Most records that a sentence names."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which records of a data set are taken."""

    first: int | None = None
    """How many records to take, from the front; later ones are not read. ``None`` takes all."""
    strict: bool = False
    """Whether it is an error if one of these records cannot be edited as it is. Otherwise such records are left out."""
    refuse: Callable[[EditRequest], str | None] | None = None
    """A function that says why a request cannot be edited, such as by an editor that needs a subject; it returns
    ``None`` if the request can be edited."""

    def checked(self, records: list[FactRecord]) -> list[FactRecord]:
        """The records, if none is refused.

        Raises:
            RequestError: a record is refused.
        """
        for record in records:
            if self.refuse is not None and (reason := self.refuse(record.request)) is not None:
                raise RequestError(reason)
        return records


EVERYTHING = Selection()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Records, and sentences about them."""

    records: Sequence[FactRecord]
    left_out: str
    """A sentence on the records that cannot be edited; empty if all can."""
    notes: Sequence[str]
    """That sentence, and sentences on respelt subjects, on fields that are not used, and on conventions of the
    format."""


def load_worldfacts() -> list[FactRecord]:
    """The data set that comes with editcore: counterfactual edits of facts that small models know."""
    return records_of_editcore("worldfacts.jsonl")


def records_of_editcore(name: str) -> list[FactRecord]:
    """All records of a file that comes with editcore."""
    resource = resources.files("editcore.datasets") / name
    entries = json_lines(resource.read_text(encoding="utf-8"), name)
    return list(_from_file(entries, name, Selection(strict=True)).records)


def load_records(
    name_or_path: str | Path,
    *,
    plugins: Registry,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    notes: list[str] | None = None,
    selection: Selection = EVERYTHING,
) -> list[FactRecord]:
    """Read a registered data set (``NAME`` or ``NAME:ARGUMENT``), or a ``.jsonl``, ``.json`` (an array), ``.csv``,
    ``.tsv`` or ``.md`` file, plain or ``.gz``. ``Path("-")`` reads standard input.

    Formats are recognised by their fields (:mod:`editcore.datasets.formats`). Ids are unique in the result: an id that
    comes again gets the suffix ``-2``, ``-3``, .... Records that cannot be edited are left out. A subject that differs
    from its spelling in the prompt only by case, Unicode form or spaces gets that spelling. Notes say so.

    Args:
        settings: hyperparameters by the name of their owner; those of the data set are used.
        notes: a list to which sentences for the user are added: on records that are left out, respelt subjects, and
            fields of a file that are not used, and on conventions of its format. Without it they are logged.
        selection: which records to take.

    Raises:
        UnknownNameError: there is no data set of that name.
        HParamsError: the data set does not take these settings or this argument.
        DatasetError: there is no such file, it cannot be read, or no record in it can be edited; the message names the
            file and the line. Also if the data set returned something other than records.
        PluginError: the data set's own code failed.
    """
    loaded = load(name_or_path, plugins=plugins, settings=settings, selection=selection)
    for note in loaded.notes:
        if notes is None:
            _log.warning("%s", note)
        else:
            notes.append(note)
    return list(loaded.records)


def load(
    name_or_path: str | Path,
    *,
    plugins: Registry,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    selection: Selection = EVERYTHING,
) -> Loaded:
    """Like :func:`load_records`, but the notes are in the result."""
    name = str(name_or_path)
    if isinstance(name_or_path, str) and not is_path(name, plugins):
        return _from_plugin(name, plugins, settings or {}, selection)
    if name == STANDARD_INPUT:  # a Path; a text would be the name of a data set
        return _from_file(*read_standard_input(), selection, formats_of(plugins))
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise DatasetError(missing_file(path, name, plugins))
    return _from_file(read_entries(path), str(path), selection, formats_of(plugins))


def content_hash(records: Iterable[FactRecord]) -> str:
    """SHA-256 of the content of the records, in their order. Records that are read back from a run have the same hash
    as those that the run was given."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.model_dump(mode="json"), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _from_plugin(
    dataset: str, plugins: Registry, settings: Mapping[str, Mapping[str, Any]], selection: Selection
) -> Loaded:
    spec = plugins.dataset(dataset.partition(":")[0])
    own = dataset_settings(dataset, settings, plugins=plugins)
    target = resolve(spec.target)
    with boundary(f"The data set '{dataset}' cannot be loaded: "):
        records = list(target() if own is None else target(own))
    for record in records:
        if type(record) is not FactRecord:  # a subclass could not be read back from requests.jsonl
            raise DatasetError(
                f"The data set '{dataset}' returned something other than a FactRecord ({type(record).__name__}); "
                "fields of its own belong in a FactRecord's 'extra'."
            )
    found, left_out = read_each(
        enumerate(records, start=1),
        lambda _, record: selection.checked([record]),
        f"The data set '{dataset}'",
        first=selection.first,
        strict=selection.strict,
        unit="record",
    )
    return Loaded(records=list(with_unique_ids(found)), left_out=left_out, notes=[left_out] if left_out else [])


def _from_file(entries: Entries, name: str, selection: Selection, formats: Sequence[Format] = BUILT_IN) -> Loaded:
    unread = Unread()
    seen: Counter[Format] = Counter()
    respelt: list[tuple[int, str, str]] = []

    def parse(line: int, fields: Any) -> list[FactRecord]:
        if not isinstance(fields, dict):
            raise RequestError(f"A record must be an object, found {type(fields).__name__}.")
        unread_here, respelt_here = Unread(), None if selection.strict else list[tuple[str, str]]()
        records = parse_record(fields, unread_here, respelt=respelt_here, formats=formats, seen=seen)
        records = selection.checked(records)
        unread.update(unread_here)
        respelt.extend((line, subject, spelling) for subject, spelling in respelt_here or ())
        return records

    found, left_out = read_each(entries, parse, name, first=selection.first, strict=selection.strict)
    notes = [left_out] if left_out else []
    if respelt:
        named = ", ".join(f"line {line} ({_spelling(*pair)})" for line, *pair in respelt[:_MAX_NAMED])
        more = len(respelt) - _MAX_NAMED
        be = "subject is" if len(respelt) == 1 else "subjects are"
        notes.append(
            f"{name}: {len(respelt):,} {be} spelt otherwise than in the prompt, by case, Unicode form or spaces; the "
            f"prompt's spelling is used: {named}{f', and {more:,} more' if more > 0 else ''}."
        )
    if unread:
        fields = ", ".join(f"{field} (in {count})" for field, count in sorted(unread.items()))
        notes.append(f"{name}: fields that are not used: {fields}.")
    notes += [f"{name}: {form.caution}" for form in formats if seen[form] and form.caution]
    return Loaded(records=list(with_unique_ids(found)), left_out=left_out, notes=notes)


def _spelling(subject: str, in_prompt: str) -> str:
    if unicodedata.normalize("NFC", subject) == unicodedata.normalize("NFC", in_prompt):
        return f"{in_prompt!r} in another Unicode form"
    return f"{subject!r}, there {in_prompt!r}"


def read_each(
    entries: Iterable[tuple[int, Any]],
    parse: Callable[[int, Any], list[T]],
    name: str,
    *,
    first: int | None = None,
    strict: bool = False,
    unit: str = "line",
) -> tuple[list[T], str]:
    """The results of parsing each entry, and a sentence on the entries that cannot be parsed (empty if all can).

    Args:
        parse: called with an entry's number and the entry. It raises RequestError or ValidationError if the entry
            cannot be used.
        name: name of the file, for messages.
        first: how many results to take, from the front; later entries are not parsed.
        strict: whether entries that cannot be used are an error. Each counts as one of ``first``.
        unit: what the numbers count.

    Raises:
        DatasetError: no entry can be used, or with ``strict``, one cannot. Up to ten are named.
    """
    found: list[T] = []
    faults: list[tuple[int, str]] = []
    for place, entry in entries:
        try:
            if isinstance(entry, RequestError):
                raise entry
            found += parse(place, entry)
        except RequestError as error:
            faults.append((place, str(error)))
        except ValidationError as error:
            faults.append((place, f"{first_problem(error)}."))
        if first is not None and len(found) + (len(faults) if strict else 0) >= first:
            break
    if not faults:
        if not found:
            raise DatasetError(f"{name}: there are no records in it.")
        return found[:first], ""
    if len(faults) == 1 and (strict or not found):
        raise DatasetError(f"{name}, {unit} {faults[0][0]}: {faults[0][1]}")
    if not found:
        raise DatasetError(f"{name}: none of its {len(faults):,} records can be used. {_named(faults, unit)}")
    if strict:
        raise DatasetError(f"{name}: {len(faults):,} records cannot be used. {_named(faults, unit)}")
    be = "is" if len(faults) == 1 else "are"
    left_out = f"{name}: {counted(len(faults), 'record')} cannot be used and {be} left out. {_named(faults, unit)}"
    return found[:first], left_out


def _named(faults: Sequence[tuple[int, str]], unit: str) -> str:
    """A sentence on up to ten faulty places, with equal faults together, and on how many more there are."""
    places: dict[str, list[int]] = {}
    for place, why in faults[:_MAX_NAMED]:
        places.setdefault(why.removesuffix("."), []).append(place)
    parts = [f"{unit}{'s' * (len(at) > 1)} {', '.join(map(str, at))}: {why}" for why, at in places.items()]
    more = len(faults) - _MAX_NAMED
    text = "; ".join(parts) + (f"; and {more:,} more" if more > 0 else "")
    return f"{text[0].upper()}{text[1:]}."
