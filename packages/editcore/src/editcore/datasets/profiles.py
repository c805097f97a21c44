"""The data set ``profiles``: several facts about each subject."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from editcore.datasets.load import records_of_editcore
from editcore.interfaces.values import FactRecord
from editcore.settings.hparams import HParams

__all__ = ["ProfilesHParams", "load_profiles"]


class ProfilesHParams(HParams):
    """How many facts of each subject are edited, and in which order."""

    facts_per_subject: Annotated[int, Field(ge=1, le=5)] = 3
    """Facts about each subject. The first fact is of another relation from subject to subject, so that a small number
    has facts of many relations, too."""
    order: Literal["subjects", "shuffled", "rounds"] = "subjects"
    """``subjects``: the facts of one subject follow each other. ``rounds``: the first fact of every subject, then the
    second of every subject, and so on. ``shuffled``: a fixed random order, in which the facts of one subject are far
    apart."""


def load_profiles(hparams: ProfilesHParams | None = None) -> list[FactRecord]:
    """Facts about 40 subjects, invented ones and known ones, up to five about each."""
    hparams = hparams or ProfilesHParams()
    records = records_of_editcore("profiles.jsonl")  # subject after subject
    chosen = [record for record in records if _number(record, "fact") <= hparams.facts_per_subject]
    match hparams.order:
        case "rounds":
            chosen.sort(key=lambda record: _number(record, "fact"))
        case "shuffled":
            chosen.sort(key=lambda record: _number(record, "shuffled"))
    return chosen


def _number(record: FactRecord, name: str) -> int:
    value = record.extra[name]
    assert isinstance(value, int)
    return value
