"""The main job: edit many facts in batches, measure before and after, and write the run directory."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from editcore._util.files import remove_leftovers, write_text
from editcore._util.folders import refuse_existing
from editcore._util.lock import locked
from editcore._util.memory import peak_memory_bytes
from editcore._util.paths import timed_directory
from editcore._util.stopwatch import Stages
from editcore.datasets import short_name
from editcore.interfaces.documented import documented
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import EditRequest, FactRecord
from editcore.ledger.file import DELTAS_NAME
from editcore.plugins.registry import Plugins
from editcore.runs.before import UneditedMeasurement, measured_before
from editcore.runs.checkpoint_history import CheckpointHistory
from editcore.runs.checkpoints import CHECKPOINTS, Checkpoints, Schedule
from editcore.runs.config import RunConfig
from editcore.runs.facts import records_of, refuse_other_records, warn_of_other_records
from editcore.runs.fit import check_savable, check_subjects
from editcore.runs.log import BatchLog
from editcore.runs.outcome import notes_of, seconds_per_edit, tallies_of, title_of
from editcore.runs.record import REQUESTS_NAME, RunRecord, read_requests
from editcore.runs.recording import record_of, warn_of_differences
from editcore.runs.resolved import editor_settings, resolve_dataset
from editcore.runs.results import FIGURES_NAME, RunResult, Sample, write_observations, write_summary
from editcore.runs.resume import has_begun, refuse_finished, refuse_unlike, refuse_used
from editcore.runs.samples import continuations, sampled
from editcore.second_moments.corpora import open_corpus
from editcore.settings.hparams import HParams

if TYPE_CHECKING:
    from editcore.models import LanguageModel
    from editcore.runs.session import EditSession

__all__ = ["RunOptions", "default_directory", "run"]

_log = logging.getLogger(__name__)

_LONGEST_STEM = 64
"""Most characters of a data set's name in a directory's name. A data set's argument may be long."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run is made. Nothing here changes its result."""

    plugins: Plugins | None = None
    """The installed plugins, if they are loaded already."""
    progress: Progress = silent
    """Shows the progress."""
    command: Sequence[str] = ()
    """The command line, for the record."""
    resume: bool = False
    """Whether to go on with the run in the directory, if one was begun there; the configuration must be that run's."""
    save: Path | str | None = None
    """Where to write the edited model as a normal model folder as well."""
    save_dtype: str | None = None
    """Type of the weights in that folder; see :meth:`EditSession.save`."""
    draw: Callable[[RunResult], None] | None = None
    """Draws the results, such as :func:`editcore.figures.draw_run`. Called before the summary is written, so that a
    finished run has its pictures."""
    model: LanguageModel | None = None
    """The unedited model of the configuration, if it is in memory already. It is unedited again when the run ends;
    after an exception it may still have edits."""
    shared: Path | str | None = None
    """A folder in which runs share their measurements of unedited models."""
    records_hash: str | None = None
    """The :func:`editcore.datasets.content_hash` that the records must have; ``None`` to accept any."""


def run(config: RunConfig, directory: Path | str, options: RunOptions | None = None) -> RunResult:
    """Edit, measure and write the run directory.

    Errors in names, settings, data and the directory are found before anything is written. A run that has its
    ``run.json`` can be resumed, however the process ended. Its weights, ledger and results are then, to the bit, those
    of a run that was never interrupted.

    Raises:
        EditcoreError: the input is wrong, or a batch could not be solved; batches before it stay in the directory.
    """
    directory = Path(directory)
    options = options or RunOptions()
    plugins = options.plugins or Plugins.load()
    begun = options.resume and has_begun(directory)
    if not begun:
        refuse_used(directory)
    with locked(directory):
        record = RunRecord.read(directory) if begun else None
        if record is not None:
            refuse_unlike(record, config, directory)
            refuse_finished(directory)
        for folder in (directory, directory / DELTAS_NAME, directory / FIGURES_NAME, directory / CHECKPOINTS):
            remove_leftovers(folder)
        return _run(config, directory, record, plugins, options)


def _run(
    config: RunConfig, directory: Path, record: RunRecord | None, plugins: Plugins, options: RunOptions
) -> RunResult:
    # Imported here, so that this module can be imported without torch.
    from editcore.models.tokens import refuse_too_long
    from editcore.runs.session import EditSession

    clock = Stages()
    if record is None and config.eval_text is not None:
        open_corpus(config.eval_text)  # an error is found now rather than after the model is loaded
    data_settings: Mapping[str, HParams] = {}
    if record is None:
        data_settings = resolve_dataset(plugins, config.dataset, config.settings, part_names=config.part_names)
        records, notes = records_of(config, plugins)
        for note in notes:
            _log.warning("%s", note)
    else:
        records, notes = read_requests(directory), list(record.notes)
    if options.records_hash is not None:
        refuse_other_records(records, options.records_hash, config)
    own = editor_settings(plugins, config, config.model)
    check_subjects([fact.request for fact in records], plugins.editor(config.editor), own)
    if options.save is not None:
        refuse_existing(Path(options.save))
        check_savable(plugins, config.editor, config.backend)
    with clock.stage("model"):
        session = EditSession.open(
            options.model or (config.model if record is None else record.source),
            config.session if record is None else record.session,
            records=records,
            directory=directory,
            registry=plugins,
            progress=options.progress,
        )
    refuse_too_long(session.model, [fact.request for fact in records])
    with clock.stage("before"):
        before = UneditedMeasurement.read(directory, session.measures) if record is not None else None
        if before is not None:
            before.check(records, directory)
            session.remember_unedited(before.measured, records)
        else:
            before = measured_before(session, records, config, options.shared)
    if record is None:
        before.write(directory)
        write_text(directory / REQUESTS_NAME, "".join(f"{fact.model_dump_json()}\n" for fact in records))
        begun = record_of(
            session, config, records=records, data_settings=data_settings, command=options.command, notes=notes
        )
        begun.write(directory)  # last: once it is there, the run can be resumed
    else:
        warn_of_differences(record, session)
        warn_of_other_records(record, records, plugins)
    log = BatchLog(directory, session.ledger)
    checkpoints = _checkpoints(session, records, before, config, directory)
    _edit(session, [fact.request for fact in records], config.batch_size, log, options.progress, checkpoints)
    for line in log.lines:
        clock.add_batch(line.seconds, line.stages)
    if checkpoints is not None:
        clock.add("checkpoints", checkpoints.seconds)
    active, applied = (
        {request.id for request in requests} for requests in (session.requests, session.ledger.written())
    )
    history: CheckpointHistory | None = None
    with clock.stage("after"):
        start = time.perf_counter()
        kept = [fact for fact in records if fact.request.id in active]
        after = session.evaluate(kept)
        shown = sampled(before.measured, records)
        said = continuations(after, shown, session.generate)
        if checkpoints is not None:
            history = checkpoints.finish(after, start=start)
    session.finish()
    result = RunResult(
        directory=directory,
        title=title_of(config, record, session, records),
        before=before.measured.summary,
        after=after.summary,
        tallies=tallies_of(after, kept),
        samples=tuple(
            Sample(prompt=fact.request.text, target_new=fact.request.target_new, before=old, after=new)
            for fact, old, new in zip(shown, before.said, said, strict=True)
        ),
        edits=len(session.requests),
        rejected=sum(fact.request.id not in applied for fact in records),
        rejections=tuple(
            (entry.batch, rejection) for entry in session.ledger.batches for rejection in entry.all_rejected
        ),
        seconds=MappingProxyType(clock.seconds),
        seconds_per_edit=seconds_per_edit(log.lines),
        peak_memory_bytes=peak_memory_bytes(session.model.device),
        notes=notes_of(session, after, kept, first=notes),
        extensions=session.statistics(),
        checkpoints=history,
    )
    write_observations(directory, before.measured, after, records)
    if options.draw is not None:
        options.draw(result)
    write_summary(result)
    if options.save is not None:
        session.save(options.save, dtype=options.save_dtype)
    if options.model is not None:
        session.close()
    return result


def _checkpoints(
    session: EditSession, records: Sequence[FactRecord], before: UneditedMeasurement, config: RunConfig, directory: Path
) -> Checkpoints | None:
    if config.eval_every is None or before.text is None:
        return None
    schedule = Schedule(every=config.eval_every, sample=config.eval_sample, seed=config.seed, text=before.text)
    return Checkpoints(session, records, before.measured, schedule, directory)


def _edit(
    session: EditSession,
    requests: Sequence[EditRequest],
    batch_size: int,
    log: BatchLog,
    progress: Progress,
    checkpoints: Checkpoints | None,
) -> None:
    """Edit what the ledger does not have yet, batch after batch. Each batch is logged once it is applied or rejected.

    A checkpoint is measured just before the next batch. So a resumed run measures a checkpoint that an interruption
    prevented, and the last batch has none, because everything is measured after it anyway.
    """
    handled = {name for entry in session.ledger.batches for name in entry.new_ids}
    handled |= {rejection.request.id for entry in session.ledger.batches for rejection in entry.rejected}
    waiting = [request for request in requests if request.id not in handled]
    # The session would split larger batches, and each batch is to be logged by itself.
    size = min(batch_size, session.max_batch or batch_size)
    with progress.task("editing", len(waiting)) as advance:
        for start in range(0, len(waiting), size):
            if checkpoints is not None:
                checkpoints.check()
            for result in session.edit(waiting[start : start + size]):
                log.add(session.ledger.batch(result.batch.index), result.seconds, result.proposal.seconds)
                advance(result.batch.num_new + len(result.rejected))


def default_directory(config: RunConfig) -> Path:
    """``runs/EDITOR-DATASET-TIME``, in the working directory."""
    stem = re.sub(r"[^\w-]+", "-", short_name(config.dataset).split(".")[0]).strip("-")
    return timed_directory(f"{config.editor}-{stem[:_LONGEST_STEM]}")
