"""Data sets: one that keeps the contract, and ones that each break a clause."""

from __future__ import annotations

import random
from collections.abc import Iterator

from editcore import FactRecord
from editcore.testing import tiny_records

from edit_broken.hparams import FactsHParams


def honest(hparams: FactsHParams) -> list[FactRecord]:
    return list(tiny_records(hparams.count))


def without_settings() -> tuple[FactRecord, ...]:
    return tiny_records(2)


class Labelled(FactRecord):
    """A record with a field of its own."""

    label: str = "mine"


def subclassed(hparams: FactsHParams) -> list[Labelled]:
    return [Labelled.model_validate(record.model_dump()) for record in honest(hparams)]


def passing(hparams: FactsHParams) -> Iterator[FactRecord]:
    """Can be read once."""
    yield from honest(hparams)


def empty(_hparams: FactsHParams) -> list[FactRecord]:
    return []


def repeated(hparams: FactsHParams) -> list[FactRecord]:
    """Has an id twice."""
    records = honest(hparams)
    request = records[1].request.model_copy(update={"id": records[0].request.id})
    return [records[0], records[1].model_copy(update={"request": request}), *records[2:]]


def tuples(hparams: FactsHParams) -> list[FactRecord]:
    """Has in ``extra`` what JSON does not."""
    return [record.model_copy(update={"extra": {"pair": (1, 2)}}) for record in honest(hparams)]


def shuffled(hparams: FactsHParams) -> list[FactRecord]:
    """In the order of a set, which is another one in each process."""
    records = {record.request.id: record for record in honest(hparams)}
    return [records[name] for name in set(records)]


def drawn(hparams: FactsHParams) -> list[FactRecord]:
    """In another order each time."""
    return random.sample(honest(hparams), hparams.count)


def open_places(hparams: FactsHParams) -> list[FactRecord]:
    """Has a probe without its subject."""
    [first, *others] = honest(hparams)
    probe = first.probes[0].model_copy(update={"prompt": first.request.prompt})
    return [first.model_copy(update={"probes": (probe,)}), *others]


def blank(hparams: FactsHParams) -> list[FactRecord]:
    """Has an answer without a word."""
    [first, *others] = honest(hparams)
    probe = first.probes[0].model_copy(update={"answers": (" ",)})
    return [first.model_copy(update={"probes": (probe,)}), *others]
