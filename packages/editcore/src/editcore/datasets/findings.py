"""Looks for what is wrong with a data set: records that cannot be used, contradictions, repetitions, leaks.

| kind | meaning |
|---|---|
| ``unusable`` | the record cannot be read, or is no edit |
| ``contradiction`` | another record asks for another object after the same prompt |
| ``duplicate`` | another record asks for the same object after the same prompt |
| ``target in prompt`` | the new object stands in the edited prompt already |
| ``true object in prompt`` | the true object stands in the edited prompt already |
| ``target is true`` | the new object is the true one |
| ``subject in neighborhood`` | a question about other subjects names the edited one |
| ``edited fact in locality`` | a question about other things has the true object as its answer, and names the subject |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from editcore._util.words import quoted
from editcore.datasets.files import Entries, read_entries
from editcore.datasets.form import Format
from editcore.datasets.formats import formats_of, parse_record
from editcore.datasets.load import load
from editcore.datasets.names import Registry, is_path, missing_file
from editcore.datasets.subjects import mentions
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import DatasetError, RequestError
from editcore.interfaces.values import FactRecord, first_problem

__all__ = ["FAULTS", "Finding", "Findings", "findings_in"]

FAULTS = frozenset({"unusable", "contradiction"})
"""The kinds that make a data set wrong. The others are known flaws of published data, which change what scores mean."""

Placed = tuple[int, FactRecord]
"""A record and its line."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a record."""

    kind: str
    """What it is, as the table of :mod:`editcore.datasets.findings` says."""
    line: int
    """Line of the record in its file; for a data set by name, its number."""
    about: str
    """The text that it is about, or the reason."""
    others: tuple[int, ...] = ()
    """Lines of the other records that it concerns."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found in a data set."""

    name: str
    """The data set, or the path of the file."""
    records: int
    """Facts that can be edited."""
    formats: tuple[tuple[str, int], ...]
    """Titles of the formats with their numbers of records; empty for a data set by name."""
    probes: tuple[tuple[str, int], ...]
    """Kinds of probes with their numbers, the most frequent first."""
    findings: tuple[Finding, ...]
    """Everything that was found, kind by kind and line by line."""
    cautions: tuple[str, ...] = ()
    """Sentences on conventions of the formats."""

    @property
    def faults(self) -> int:
        """How many findings make the data set wrong."""
        return sum(finding.kind in FAULTS for finding in self.findings)


def findings_in(name_or_path: str, *, plugins: Registry) -> Findings:
    """Read everything, and say what is wrong with it. Nothing is left out, and nothing is changed.

    Raises:
        UnknownNameError: there is no data set of that name.
        DatasetError: the file cannot be read at all.
    """
    if not is_path(name_or_path, plugins):
        placed = list(enumerate(load(name_or_path, plugins=plugins).records, start=1))
        return _found(name_or_path, placed, [], Counter())
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise DatasetError(missing_file(path, name_or_path, plugins))
    seen: Counter[Format] = Counter()
    placed, unusable = _parsed(read_entries(path), formats_of(plugins), seen)
    if not placed and not unusable:
        raise DatasetError(f"{path}: there are no records in it.")
    return _found(str(path), placed, unusable, seen)


def _parsed(entries: Entries, formats: Sequence[Format], seen: Counter[Format]) -> tuple[list[Placed], list[Finding]]:
    placed: list[Placed] = []
    unusable: list[Finding] = []
    for line, entry in entries:
        try:
            if isinstance(entry, RequestError):
                raise entry
            if not isinstance(entry, dict):
                raise RequestError(f"A record must be an object, found {type(entry).__name__}.")
            placed += [(line, record) for record in parse_record(entry, respelt=[], formats=formats, seen=seen)]
        except RequestError as error:
            unusable.append(Finding(kind="unusable", line=line, about=str(error)))
        except ValidationError as error:
            unusable.append(Finding(kind="unusable", line=line, about=f"{first_problem(error)}."))
    return placed, unusable


def _found(name: str, placed: Sequence[Placed], unusable: list[Finding], seen: Counter[Format]) -> Findings:
    found = [*unusable, *_repeated(placed)]
    found += (finding for line, record in placed for finding in _leaks(line, record))
    order = list(dict.fromkeys(finding.kind for finding in found))
    kinds = Counter(probe.kind for _, record in placed for probe in record.probes)
    return Findings(
        name=name,
        records=len(placed),
        formats=tuple((form.title, count) for form, count in seen.most_common()),
        probes=tuple(kinds.most_common()),
        findings=tuple(sorted(found, key=lambda finding: (order.index(finding.kind), finding.line))),
        cautions=tuple(form.caution for form in seen if form.caution),
    )


def _repeated(placed: Iterable[Placed]) -> Iterator[Finding]:
    """A finding for each fact that several records ask for."""
    facts: dict[tuple[str, str], list[Placed]] = {}
    for line, record in placed:
        facts.setdefault(record.request.fact_key, []).append((line, record))
    for group in facts.values():
        if len(group) == 1:
            continue
        targets = list(dict.fromkeys(record.request.target_new for _, record in group))
        same = len({record.request.continuation for _, record in group}) == 1
        asked = " or ".join(quoted(target, 40) for target in targets)
        yield Finding(
            kind="duplicate" if same else "contradiction",
            line=group[0][0],
            about=f"{quoted(group[0][1].request.text)}: {asked}",
            others=tuple(line for line, _ in group[1:]),
        )


def _leaks(line: int, record: FactRecord) -> Iterator[Finding]:
    """What the questions of one record give away."""
    request = record.request
    true = request.target_true or ""
    if true and mentions(true, request.target_new) and mentions(request.target_new, true):
        yield Finding(kind="target is true", line=line, about=f"{request.text!r}: {request.target_new!r}")
    if mentions(request.text, request.target_new):
        yield Finding(kind="target in prompt", line=line, about=f"{request.text!r}: {request.target_new!r}")
    if true and mentions(request.text, true):
        yield Finding(kind="true object in prompt", line=line, about=f"{request.text!r}: {true!r}")
    if not request.subject:
        return
    for probe in record.of_kind("neighborhood"):
        if mentions(probe.prompt, request.subject):
            yield Finding(kind="subject in neighborhood", line=line, about=f"{probe.prompt!r}: {request.subject!r}")
    for probe in record.of_kind("locality"):
        if true and true in probe.answers and mentions(probe.prompt, request.subject):
            yield Finding(kind="edited fact in locality", line=line, about=f"{probe.prompt!r}: {true!r}")
