"""The report of a run: its sections, in the order of a reader's questions."""

from __future__ import annotations

from pathlib import Path

from editcore._util.words import counted_of
from editcore.evaluation import Measurement
from editcore.plugins.registry import Plugins
from editcore.report.checklist import Checked, checklist, evaluators_by_item
from editcore.report.document import Document, Paragraph, Section
from editcore.report.pictures import FORGETTING_CURVE, saved_pictures
from editcore.report.results import RunResults
from editcore.report.run_edits import batches, facts_table, gates, generations
from editcore.report.run_scores import (
    forgetting,
    measured_summary,
    notices,
    refusals_in_words,
    relations,
    relations_name,
    summaries_of,
)
from editcore.report.run_settings import cost, extension_counts, reproduction, settings_table
from editcore.runs.check_record import CheckRecord
from editcore.runs.checkpoint_history import FORGETTING_NAME, read_checkpoint_history
from editcore.runs.evaluation_record import MethodRecord
from editcore.runs.outcome import first_and_last
from editcore.runs.results import FIGURES_NAME
from editcore.runs.targets import settings_hash
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
        Section("Summary", [*notices(run), *measured_summary(run, title=title), *refusals_in_words(run)]),
        Section("Checklist", [checklist(_checked(run), evaluators_by_item(Plugins.load()))]),
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


def _checked(run: RunResults) -> Checked:
    record, summary = run.record, run.summary
    before, after = summaries_of(run)
    found = Measurement.from_frame(run.phase("after"), summary.metrics)
    batches = {identity: batch for (batch, identity), state in run.ledger.states().items() if state == "active"}
    written = sorted(
        (fact for fact in run.facts if fact.request.id in batches), key=lambda fact: batches[fact.request.id]
    )
    several = len(set(batches.values())) > 1
    return Checked(
        model=record.model,
        dtype=record.config.dtype,
        method=MethodRecord(
            name=record.config.method,
            settings_hash=settings_hash(record.settings, record.config.method_parts),
            batch_size=None if record.composed_of else record.config.batch_size,
            edits=summary.edits,
        ),
        before=before,
        after=after,
        first=" ".join(first_and_last(found, written)) if several else "",
        perplexity=_perplexity(run),
        measure_text="'editctl run' with --eval-every N, or 'editctl check' of the run",
        harness=(),
        harness_before=(),
        seconds_per_edit=summary.seconds_per_edit,
        peak_memory=f"{summary.peak_memory_bytes / 2**30:.2f} GiB",
    )


def _perplexity(run: RunResults) -> tuple[float, str] | None:
    """The perplexity ratio of all active edits: of the last checkpoint, or of a check since the last change."""
    if run.summary.checkpoints and not run.is_older_than_ledger and (run.directory / FORGETTING_NAME).exists():
        history = read_checkpoint_history(run.directory)
        return history.checkpoints[-1].perplexity_ratio, f"{history.text.source}, {history.text.tokens:,} tokens"
    check = CheckRecord.last(run.directory)
    if check is None or check.changes != len(run.ledger.events):
        return None
    return check.perplexity_ratio, f"{check.text}, {check.tokens:,} tokens"


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
