"""The data set."""

from __future__ import annotations

import json
from pathlib import Path

from editcore import EditRequest, FactRecord, Probe

from third_questions.hparams import QuestionsHParams


def load(hparams: QuestionsHParams) -> list[FactRecord]:
    """Every line of the file."""
    lines = Path(hparams.file).read_text(encoding="utf-8").splitlines()
    return [_record(json.loads(line), number) for number, line in enumerate(lines)]


def _record(fields: dict[str, object], number: int) -> FactRecord:
    names = ("subject", "prompt", "target_new", "target_true", "id")
    kinds = {"portability.consequence": fields["follows"], "locality.elsewhere": fields["others"]}
    return FactRecord(
        request=EditRequest.create(**{name: fields[name] for name in names if name in fields}),
        relation="even" if number % 2 == 0 else "odd",
        probes=tuple(
            Probe(kind=kind, prompt=question, answers=(answer,))
            for kind, pairs in kinds.items()
            for question, answer in pairs  # type: ignore[attr-defined]
        ),
        extra={"line": number},
    )
