"""Data sets: one that reads a file, and others that return what they should not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from editcore import EditRequest, FactRecord
from editcore.datasets import parse_record

from edit_toy.hparams import FactsHParams

__all__ = ["broken", "dicts", "facts", "nothing", "subclassed"]


def facts(hparams: FactsHParams) -> list[FactRecord]:
    """The facts of a file, each with what the hyperparameters say in ``extra``."""
    lines = Path(hparams.file).read_text(encoding="utf-8").splitlines()
    records = [record for line in lines for record in parse_record(json.loads(line))]
    return [
        record.model_copy(update={"extra": {"hops": [number, {"weight": 0.5}], "label": hparams.label}})
        for number, record in enumerate(records[: hparams.most])
    ]


class Labelled(FactRecord):
    """A record with a field of its own."""

    label: str = ""


_REQUEST = EditRequest(subject="Rome", prompt="{} is in", target_new="France")


def subclassed() -> list[Labelled]:
    """Records that would not come back from a run."""
    return [Labelled(request=_REQUEST, label="a")]


def dicts() -> list[dict[str, Any]]:
    """Records that are none yet."""
    return [{"request": _REQUEST}]


def nothing() -> list[FactRecord]:
    """No records."""
    return []


def broken() -> list[FactRecord]:
    """Fails."""
    raise ZeroDivisionError("no luck")
