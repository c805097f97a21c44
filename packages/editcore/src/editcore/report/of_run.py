"""The report of a run: its sections, in the order of a reader's questions."""

from __future__ import annotations

from pathlib import Path

from editcore._util.words import counted_of
from editcore.report.document import Document, Paragraph, Section
from editcore.report.pictures import FORGETTING_CURVE, saved_pictures
from editcore.report.results import RunResults
from editcore.report.run_edits import batches, facts_table, gates, generations
from editcore.report.run_scores import forgetting, relations, relations_name, run_summary
from editcore.report.run_settings import cost, extension_counts, reproduction, settings_table
from editcore.runs.results import FIGURES_NAME
from editcore.settings.presets import model_stem

__all__ = ["run_report"]


def run_report(directory: Path, *, writer: str) -> Document:
    """The report of a finished run.

    Raises:
        RunError: the run is not finished, or a file is missing or damaged.
    """
    run = RunResults.read(directory)
    edits, more = run.edits
    title = run.record.config.title(edits, data=run.record.data, more=more)
    saved = {picture.name: picture for picture in saved_pictures(directory / FIGURES_NAME)}
    elsewhere = {"summary", FORGETTING_CURVE, *map(relations_name, run.summary.metrics)}
    sections = [
        Section("Summary", list(run_summary(run, title=title))),
        Section("Relations", list(relations(run))),
        Section("Forgetting", list(forgetting(run, saved))),
        Section("Gates", list(gates(run))),
        Section("Facts", [facts_table(run)]),
        Section("Generations", [generations(run)]),
        Section("Batches", list(batches(run))),
        Section("Counts", list(extension_counts(run))),
        Section("Cost", list(cost(run))),
        Section("More figures", [picture for name, picture in saved.items() if name not in elsewhere]),
        Section("Settings", [settings_table(run)]),
        Section("Reproduce", list(reproduction(run))),
        Section("Notes", [Paragraph(note) for note in dict.fromkeys([*run.record.notes, *run.summary.notes])]),
    ]
    return Document(
        title=title,
        lead=_lead(run),
        sections=[section for section in sections if section.blocks],
        writer=writer,
    )


def _lead(run: RunResults) -> str:
    config, (edits, more) = run.record.config, run.edits
    extensions = f", with {' and '.join(config.plugins)}" if config.plugins else ""
    started = run.record.machine.get("started", "")
    when = f" The run began on {started[:10]} at {started[11:16]} UTC." if started else ""
    together = "all together" if run.record.composed_of else f"{config.batch_size} at a time"
    return (
        f"{counted_of(edits, 'fact', run.record.data, more=more)} written into {model_stem(config.model)} "
        f"by {config.editor}{extensions}, {together}.{when}"
    )
