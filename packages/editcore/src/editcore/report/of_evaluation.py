"""The report of an evaluation: a model that was measured on facts, whoever edited it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from editcore._util.words import counted
from editcore.evaluation import Measurement
from editcore.interfaces.values import FactRecord
from editcore.plugins.registry import Plugins
from editcore.report.cells import seconds
from editcore.report.checklist import Checked, checklist, evaluators_by_item
from editcore.report.document import Block, Code, Column, Document, Paragraph, Section, Table, one_line
from editcore.report.run_edits import measured_facts
from editcore.report.run_scores import measured_summary, relations, summaries_of
from editcore.report.run_settings import settings_by_owner
from editcore.runs.evaluation_record import EvaluationRecord
from editcore.runs.outcome import first_and_last
from editcore.runs.record import read_requests
from editcore.runs.results import RESULTS_NAME, read_observations

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["evaluation_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluation:
    """An evaluation, read from its folder."""

    summary: EvaluationRecord
    facts: Sequence[FactRecord]
    observations: pd.DataFrame

    def phase(self, name: str) -> pd.DataFrame:
        """The observations ``before`` or ``after`` the edits."""
        return self.observations[self.observations["phase"] == name]


def evaluation_report(directory: Path, *, writer: str) -> Document:
    """The report of an evaluation.

    Raises:
        RunError: a file is missing or damaged.
    """
    record = EvaluationRecord.read(directory)
    found = _Evaluation(
        summary=record,
        facts=read_requests(directory),
        observations=read_observations(directory / RESULTS_NAME),
    )
    title = f"{Path(record.target).name}: {counted(record.dataset.records, 'fact')} of {Path(record.dataset.name).name}"
    sections = [
        Section("Summary", list(measured_summary(found, title=title))),
        Section("Checklist", [checklist(_checked(found), evaluators_by_item(Plugins.load()))]),
        Section("Relations", list(relations(found))),
        Section("Facts", [measured_facts(found, found.facts)]),
        Section("Settings", [settings_by_owner({"evaluation": _options(record), **record.settings})]),
        Section("Reproduce", list(_reproduction(record))),
        Section("Notes", [Paragraph(note) for note in record.notes]),
    ]
    return Document(
        title=title,
        lead=_lead(record),
        sections=[section for section in sections if section.blocks],
        writer=writer,
    )


_KINDS = {
    "run": "the run directory",
    "pack": "the pack of edits",
    "adapter": "the adapter",
    "model": "the model",
}


def _lead(record: EvaluationRecord) -> str:
    against = "with no unedited model to compare with" if record.base is None else f"compared with {record.base}"
    return (
        f"{counted(record.dataset.records, 'fact')} of {record.dataset.name} asked of {_KINDS[record.kind]} "
        f"{record.target}, {against}. Measured on {record.started[:10]} at {record.started[11:16]} UTC."
    )


def _checked(found: _Evaluation) -> Checked:
    record = found.summary
    before, after = summaries_of(found)
    method, text = record.method, record.perplexity
    several = method is not None and method.batch_size is not None and method.edits > method.batch_size
    measured = Measurement.from_frame(found.phase("after"), record.metrics)
    return Checked(
        model=record.model,
        dtype=record.dtype,
        method=method,
        before=before,
        after=after,
        first=" ".join(first_and_last(measured, found.facts)) if several and record.own_facts else "",
        perplexity=None
        if text is None or record.base is None
        else (text.ratio, f"{text.text.source}, {text.text.tokens:,} tokens"),
        measure_text="'editctl evaluate' with --text TEXT, and a base to compare with",
        harness=record.harness,
        harness_before=record.harness_before,
        seconds_per_edit=None if method is None else method.seconds_per_edit,
        peak_memory=f"{record.peak_memory_bytes / 2**30:.2f} GiB, of the evaluation",
    )


def _options(record: EvaluationRecord) -> dict[str, object]:
    return record.model_dump(
        mode="json", include={"target", "kind", "base", "dtype", "device", "evaluators", "seed", "state"}
    )


def _reproduction(record: EvaluationRecord) -> Iterator[Block]:
    if record.command:
        yield Paragraph("The evaluation was started with:")
        yield Code(record.command)
    asked = counted(record.questions.asked, "question")
    yield Paragraph(f"{asked} asked in {seconds(record.seconds)}; {record.questions.known:,} were known from before.")
    rows = [("python", record.python), ("platform", record.platform), *record.versions.items()]
    yield Table(
        caption="What it was made with",
        columns=[Column("what"), Column("which")],
        rows=[[one_line(name), one_line(value)] for name, value in rows],
    )
