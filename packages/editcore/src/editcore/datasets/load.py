"""Files of records, read line by line so that every complaint has a line number.

What cannot be edited is left out and told, unless the reader is strict.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from editcore._util.words import counted
from editcore.datasets.formats import Unread, parse_record
from editcore.interfaces.errors import DatasetError, HParamsError, RequestError, UnknownNameError
from editcore.interfaces.specs import DatasetSpec
from editcore.interfaces.values import EditRequest, FactRecord, first_problem
from editcore.plugins.calls import boundary, resolve
from editcore.settings.hparams import HParams, build, describe, parse_assignment

__all__ = [
    "Loaded",
    "content_hash",
    "dataset_name",
    "dataset_settings",
    "is_path",
    "load",
    "load_records",
    "load_worldfacts",
    "missing_file",
    "read_each",
    "read_items",
    "short_name",
    "with_unique_ids",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BYTES = 1 << 30
"""Largest file that is read, after decompression. CounterFact has 45 MB."""
SUFFIXES = (".jsonl", ".json", ".csv")
_ELSEWHERE = ("counterfact", "multi_counterfact", "known_1000", "zsre_mend_eval")
_WITH_ARGUMENT = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*:.*")

_MOST_NAMED = 10
"""Records that are named in a sentence on what is wrong with them."""

Items = Iterator[tuple[int, Any]]
"""(line number, what stands there; a RequestError where it cannot be read)"""

Refuse = Callable[[EditRequest], str | None]
"""Why a request cannot be edited, such as by an editor that needs a subject; ``None`` if it can."""


class Registry(Protocol):
    """The part of :class:`editcore.Plugins` that names data sets."""

    def datasets(self) -> Mapping[str, DatasetSpec]:
        """What is registered, by name."""
        ...

    def dataset(self, name: str) -> DatasetSpec:
        """One of them; :class:`UnknownNameError` says what there is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Records with what there is to say of them."""

    records: Sequence[FactRecord]
    left_out: str
    """A sentence on the records that cannot be edited; empty if all can."""
    notes: Sequence[str]
    """That sentence, and those on subjects that are spelt otherwise and on fields that are not used."""


def load_worldfacts() -> list[FactRecord]:
    """The data set that comes with editcore: counterfactual edits of facts that small models know."""
    resource = resources.files("editcore.datasets") / "worldfacts.jsonl"
    items = _json_lines(resource.read_text(encoding="utf-8"), "worldfacts.jsonl")
    return list(_of_file(items, "worldfacts.jsonl", None, True, None).records)


def load_records(
    name_or_path: str | Path,
    *,
    plugins: Registry,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    notes: list[str] | None = None,
    first: int | None = None,
    strict: bool = False,
    refuse: Refuse | None = None,
) -> list[FactRecord]:
    """Read a registered data set (``NAME`` or ``NAME:ARGUMENT``), or a ``.jsonl``, ``.json`` (an array) or ``.csv``
    file, plain or ``.gz``.

    Formats are recognised by their fields (:mod:`editcore.datasets.formats`). Ids are unique in the result: an id that
    comes again gets ``-2``, ``-3``, ... behind it. Records that cannot be edited are left out, and a subject that
    differs from its prompt by case, Unicode form or spaces only is spelt as it is there; notes say so.

    Args:
        settings: hyperparameters by the name of what they set; the data set has its own from there.
        notes: gets the sentences for the user: records that are left out, subjects that are spelt otherwise, fields of
            a file that are not used. Without it they are logged.
        first: how many records to take, from the front; nothing behind them is looked at.
        strict: refuse a data set with a record among these that cannot be edited as it stands; the error lists them.
        refuse: why a request cannot be edited, or ``None`` if it can.

    Raises:
        UnknownNameError: there is no data set of that name.
        HParamsError: the data set does not take these settings or this argument.
        DatasetError: there is no such file, or it cannot be read, or nothing of it can be edited; the message names the
            file and the line. Or the data set returned something else than records.
        PluginError: the data set's own code failed.
    """
    loaded = load(name_or_path, plugins=plugins, settings=settings, first=first, strict=strict, refuse=refuse)
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
    first: int | None = None,
    strict: bool = False,
    refuse: Refuse | None = None,
) -> Loaded:
    """:func:`load_records`, with what there is to say apart."""
    name = str(name_or_path)
    if isinstance(name_or_path, str) and not is_path(name, plugins):
        return _registered(name, settings or {}, plugins, first, strict, refuse)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise DatasetError(missing_file(path, name, plugins))
    return _of_file(read_items(path), str(path), first, strict, refuse)


def is_path(name: str, plugins: Registry) -> bool:
    """Whether a file is meant: names of data sets have no dots and no slashes, but the argument behind the colon of a
    registered one may have them. A file in the way of a data set is not read."""
    if re.search(r"[./\\~]", name) is None:
        return False
    head, colon, _ = name.partition(":")
    return not colon or head not in plugins.datasets()


def dataset_name(dataset: str, plugins: Registry) -> str | None:
    """The data set that ``NAME`` or ``NAME:ARGUMENT`` asks for, whether there is one or not; ``None`` for a file."""
    return None if is_path(dataset, plugins) else dataset.partition(":")[0]


def short_name(dataset: str) -> str:
    """What a data set or a file of records is called in titles.

    >>> short_name("toy-facts:some/where"), short_name("some/where/facts.jsonl")
    ('toy-facts:some/where', 'facts.jsonl')
    """
    return dataset if _WITH_ARGUMENT.fullmatch(dataset) else Path(dataset).name


def dataset_settings(dataset: str, settings: Mapping[str, Mapping[str, Any]], *, plugins: Registry) -> HParams | None:
    """The hyperparameters of a data set: its section of ``settings``, and its argument. ``None`` if it has none, and
    for a file.

    Raises:
        UnknownNameError: there is no data set of that name.
        HParamsError: a setting is unknown or wrong, the data set takes no argument, or the argument and the setting
            that it stands for have different values.
    """
    name = dataset_name(dataset, plugins)
    if name is None:
        return None
    spec = plugins.dataset(name)
    _, colon, text = dataset.partition(":")
    if colon and not spec.argument:
        raise HParamsError(f"The data set '{name}' takes no argument; found '{dataset}'.")
    if spec.hparams is None:
        return None
    hparams: type[HParams] = resolve(spec.hparams)
    given = settings.get(name, {})
    if not colon:
        return build(hparams, [given], owner=name)
    own = build(hparams, [given, {spec.argument: _argument(hparams, spec.argument, text)}], owner=name)
    if spec.argument in given:
        alone = build(hparams, [given], owner=name)
        if getattr(alone, spec.argument) != getattr(own, spec.argument):
            raise HParamsError(
                f"The data set is '{dataset}', and {name}.{spec.argument} is set to {given[spec.argument]!r}; "
                "leave one of the two out."
            )
    return own


def _argument(hparams: type[HParams], name: str, text: str) -> object:
    """The value behind the colon: as it stands there for a text, otherwise read as ``--set`` reads it."""
    kinds = {setting.name: setting.type for setting in describe(hparams)}
    return text if kinds.get(name) in ("text", "text or none") else parse_assignment(f"{name}={text}")[1]


def content_hash(records: Iterable[FactRecord]) -> str:
    """SHA-256 of what the records hold, in their order. Records that a run has kept have the hash of those that it was
    given."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.model_dump(mode="json"), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _registered(
    dataset: str,
    settings: Mapping[str, Mapping[str, Any]],
    plugins: Registry,
    first: int | None,
    strict: bool,
    refuse: Refuse | None,
) -> Loaded:
    spec = plugins.dataset(dataset.partition(":")[0])
    own = dataset_settings(dataset, settings, plugins=plugins)
    target = resolve(spec.target)
    with boundary(f"The data set '{dataset}' cannot be loaded: "):
        records = list(target() if own is None else target(own))
    for record in records:
        if type(record) is not FactRecord:  # a subclass would not come back from requests.jsonl
            raise DatasetError(
                f"The data set '{dataset}' returned something else than a FactRecord ({type(record).__name__}); "
                "fields of its own belong in a FactRecord's 'extra'."
            )

    def parse(number: int, record: FactRecord) -> list[FactRecord]:
        return _taken([record], refuse)

    items = enumerate(records, start=1)
    found, left_out = read_each(items, parse, f"The data set '{dataset}'", first=first, strict=strict, unit="record")
    return Loaded(records=list(with_unique_ids(found)), left_out=left_out, notes=[left_out] if left_out else [])


def missing_file(path: Path, name: str, plugins: Registry) -> str:
    """What to say of a file that is not there."""
    if path.is_dir():
        return f"{path} is a folder; a data set is a file ({', '.join(SUFFIXES)}, each also .gz)."
    names = plugins.datasets()
    head, colon, _ = name.partition(":")
    asked = head if colon else path.name.split(".")[0]
    if asked in _ELSEWHERE:
        return (
            f"There is no file {name}. editcore does not bring that data along; where its authors give it away stands "
            f"in docs/reference/datasets.md, under Files. Available here: {', '.join(sorted(names))}."
        )
    hint = str(UnknownNameError("data set", asked, names)).partition(". ")[2]
    return f"There is no file {name}. {hint}" if hint else f"There is no file {name}."


def read_items(path: Path) -> Items:
    """The records of a file as they stand there, each with its line; a record that cannot be read is an error in its
    place, and the rest is read on.

    Raises:
        DatasetError: the file cannot be read, or not beyond a record, or is of another type.
    """
    suffix = path.suffix if path.suffix != ".gz" else path.with_suffix("").suffix
    readers: Mapping[str, Callable[[str, str], Items]] = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv}
    if suffix == ".editpack":
        raise DatasetError(f"{path} is no file of records: it has edits that were made; 'editctl apply' takes it.")
    if suffix not in readers:
        raise DatasetError(
            f"{path}: files of type '{suffix}' are not read. Use {', '.join(SUFFIXES)}, each also with .gz."
        )
    return readers[suffix](_read(path), str(path))


def _read(path: Path) -> str:
    """The text of a file of bounded size; a small ``.gz`` may hide a large one, so what comes out is counted."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DatasetError(f"{path}: this is no complete gzip file ({error}).") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if len(content) > MAX_BYTES:
        raise DatasetError(f"{path}: more than {MAX_BYTES >> 20} MiB of text; split the file.")
    # Bytes that are no UTF-8 become surrogates, which tell the record that they are in.
    return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


_NO_UTF8 = "This is not UTF-8 text."


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= one <= "\udcff" for one in text)


def _json_lines(text: str, name: str) -> Items:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.rstrip()) if _is_text(line) else RequestError(_NO_UTF8)
        except (ValueError, RecursionError) as error:
            yield number, RequestError(f"This is no JSON ({_reason(error)}).")


def _json_array(text: str, name: str) -> Items:
    """The elements of a JSON array with the lines they begin at."""
    decoder = json.JSONDecoder()
    gap = re.compile(r"\s*")
    line, counted = 1, 0

    def after_gap(position: int) -> int:
        nonlocal line, counted
        match = gap.match(text, position)
        end = match.end() if match else position
        line += text.count("\n", counted, end)
        counted = end
        return end

    position = after_gap(0)
    if not text.startswith("[", position):
        raise DatasetError(f"{name}, line {line}: a .json file must be an array of records; use .jsonl for one a line.")
    position = after_gap(position + 1)
    while not text.startswith("]", position):
        start, begin = line, position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else start
            raise DatasetError(f"{name}, line {where}: this is no JSON ({_reason(error)}).") from error
        yield start, value if _is_text(text[begin:position]) else RequestError(_NO_UTF8)
        position = after_gap(position)
        if text.startswith(",", position):
            position = after_gap(position + 1)
        elif not text.startswith("]", position):
            raise DatasetError(f"{name}, line {line}: this is no JSON (a comma or ] is missing after a record).")


def _csv(text: str, name: str) -> Items:
    """Rows by the names in the first line; empty cells count as absent."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                yield reader.line_num, RequestError("It has more cells than the first line has names.")
            elif not all(map(_is_text, filter(None, row.values()))):
                yield reader.line_num, RequestError(_NO_UTF8)
            else:
                yield reader.line_num, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        raise DatasetError(f"{name}, line {reader.reader.line_num}: this is no CSV ({error}).") from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)  # a number with too many digits


def read_each(
    items: Iterable[tuple[int, Any]],
    parse: Callable[[int, Any], list[T]],
    name: str,
    *,
    first: int | None = None,
    strict: bool = False,
    unit: str = "line",
) -> tuple[list[T], str]:
    """What can be made of each item, and a sentence on those of which nothing can; empty if there are none.

    Args:
        parse: called with place and item; a RequestError or ValidationError says why nothing can be made of it.
        name: of the file, for messages.
        first: how many results to take from the front; nothing behind them is looked at.
        strict: refuse items of which nothing can be made. Of ``first`` they count as one each.
        unit: what the numbers count.

    Raises:
        DatasetError: nothing can be made of any item, or of one in a strict reading; up to ten are named.
    """
    found: list[T] = []
    faults: list[tuple[int, str]] = []
    for place, item in items:
        try:
            if isinstance(item, RequestError):
                raise item
            found += parse(place, item)
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
        raise DatasetError(f"{name}: none of its {len(faults):,} records can be used. {_listed(faults, unit)}")
    if strict:
        raise DatasetError(f"{name}: {len(faults):,} records cannot be used. {_listed(faults, unit)}")
    be = "is" if len(faults) == 1 else "are"
    left_out = f"{name}: {counted(len(faults), 'record')} cannot be used and {be} left out. {_listed(faults, unit)}"
    return found[:first], left_out


def _listed(faults: Sequence[tuple[int, str]], unit: str) -> str:
    """Up to ten places with what is wrong there, equal faults together, and how many more there are."""
    places: dict[str, list[int]] = {}
    for place, why in faults[:_MOST_NAMED]:
        places.setdefault(why.removesuffix("."), []).append(place)
    parts = [f"{unit}{'s' * (len(at) > 1)} {', '.join(map(str, at))}: {why}" for why, at in places.items()]
    more = len(faults) - _MOST_NAMED
    text = "; ".join(parts) + (f"; and {more:,} more" if more > 0 else "")
    return f"{text[0].upper()}{text[1:]}."


def _taken(records: list[FactRecord], refuse: Refuse | None) -> list[FactRecord]:
    """Records that are all to be edited."""
    for record in records:
        if refuse is not None and (why := refuse(record.request)) is not None:
            raise RequestError(why)
    return records


def _of_file(items: Items, name: str, first: int | None, strict: bool, refuse: Refuse | None) -> Loaded:
    unread = Unread()
    respelt: list[tuple[int, str, str]] = []

    def parse(line: int, fields: Any) -> list[FactRecord]:
        if not isinstance(fields, dict):
            raise RequestError(f"A record must be an object, found {type(fields).__name__}.")
        mine, spelt = Unread(), None if strict else list[tuple[str, str]]()
        records = _taken(parse_record(fields, mine, respelt=spelt), refuse)
        unread.update(mine)
        respelt.extend((line, subject, there) for subject, there in spelt or ())
        return records

    found, left_out = read_each(items, parse, name, first=first, strict=strict)
    notes = [left_out] if left_out else []
    if respelt:
        named = ", ".join(f"line {line} ({_spelling(*pair)})" for line, *pair in respelt[:_MOST_NAMED])
        more = len(respelt) - _MOST_NAMED
        be = "subject is" if len(respelt) == 1 else "subjects are"
        notes.append(
            f"{name}: {len(respelt):,} {be} spelt otherwise than in the prompt, by case, Unicode form or spaces, and "
            f"taken as it stands there: {named}{f', and {more:,} more' if more > 0 else ''}."
        )
    if unread:
        fields = ", ".join(f"{field} (in {count})" for field, count in sorted(unread.items()))
        notes.append(f"{name}: fields that are not used: {fields}.")
    return Loaded(records=list(with_unique_ids(found)), left_out=left_out, notes=notes)


def _spelling(subject: str, there: str) -> str:
    if unicodedata.normalize("NFC", subject) == unicodedata.normalize("NFC", there):
        return f"{there!r} in another Unicode form"
    return f"{subject!r}, there {there!r}"


def with_unique_ids(records: Iterable[FactRecord]) -> Iterator[FactRecord]:
    """The records, of which no two have an id: one that comes again gets ``-2``, ``-3``, ... behind it."""
    taken: set[str] = set()
    for record in records:
        identity, count = record.request.id, 1
        while identity in taken:
            count += 1
            identity = f"{record.request.id}-{count}"
        taken.add(identity)
        if count > 1:
            record = record.model_copy(update={"request": record.request.model_copy(update={"id": identity})})
        yield record
