"""The main job: edit many facts in batches, measure before and after, and leave a directory that says how."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from editcore._util.files import remove_leftovers, write_text
from editcore._util.folders import refuse_existing
from editcore._util.lock import locked
from editcore._util.memory import peak_memory_bytes
from editcore._util.paths import timed_directory
from editcore._util.words import counted
from editcore.datasets import check_records, content_hash, short_name
from editcore.datasets.load import load
from editcore.evaluation import Measurement
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import EditcoreError, HParamsError, RunError
from editcore.interfaces.metrics import REWRITE
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import EditRequest, FactRecord
from editcore.ledger.file import DELTAS_NAME
from editcore.plugins.registry import Plugins
from editcore.plugins.versions import code_versions
from editcore.runs.checkpoints import CHECKPOINTS, Checkpoints, Schedule
from editcore.runs.config import RunConfig
from editcore.runs.fit import check_savable, check_subjects, refuses_subjects
from editcore.runs.held_out import HeldOutText, held_out
from editcore.runs.log import BatchLog, BatchRecord, Before
from editcore.runs.record import REQUESTS_NAME, RunRecord, recorded
from editcore.runs.resolved import resolve_dataset
from editcore.runs.results import FIGURES_NAME, RunResult, Sample, Tally, write_observations, write_summary
from editcore.runs.resume import has_begun, refuse_finished, refuse_unlike, refuse_used
from editcore.runs.stopwatch import Stages
from editcore.runs.watched import Watched
from editcore.second_moments.corpora import open_corpus
from editcore.settings.hparams import HParams

if TYPE_CHECKING:
    from editcore.models import LanguageModel
    from editcore.runs.session import EditSession

__all__ = ["RunOptions", "default_directory", "records_of", "run"]

_log = logging.getLogger(__name__)

_SAMPLES = 3
_SAMPLE_TOKENS = 8
_LONGEST_STEM = 64
"""Characters of a data set's name in the name of a directory; its argument may be long."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run is made. Nothing here changes its result."""

    plugins: Plugins | None = None
    """The installed plugins, if they are loaded already."""
    progress: Progress = silent
    """Shows how far it is."""
    command: Sequence[str] = ()
    """The command line, for the record."""
    resume: bool = False
    """Whether to go on with the run in the directory, if one was begun there; the configuration must be that run's."""
    save: Path | str | None = None
    """Where the edited model is written as a normal folder, too."""
    save_dtype: str | None = None
    """Of the weights in that folder; see :meth:`EditSession.save`."""
    draw: Callable[[RunResult], None] | None = None
    """Draws the results, such as :func:`editcore.figures.draw_run`. Called before the summary is written, so that a
    finished run has its pictures."""
    model: LanguageModel | None = None
    """The model of the configuration, unedited, if it is in memory. It is unedited again when the run ends; after an
    exception it may not be."""
    shared: Path | str | None = None
    """A folder where runs keep what they measure of an unedited model, for one another."""
    records_hash: str | None = None
    """What the records must have as their :func:`editcore.datasets.content_hash`."""


def run(config: RunConfig, directory: Path | str, options: RunOptions | None = None) -> RunResult:
    """Edit, measure and write the run directory.

    What can be wrong with names, settings, data and the directory is found before anything is written. Whatever ends
    the process, a run that has its ``run.json`` can be resumed: weights, ledger and results are then, to the bit, those
    of a run that nothing had ended.

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
    # Here: what a run edits can be asked without torch.
    from editcore.models.tokens import refuse_too_long
    from editcore.runs.session import EditSession

    clock = Stages()
    if record is None and config.eval_text is not None:
        open_corpus(config.eval_text)  # found now rather than after the model was loaded
    data_settings: Mapping[str, HParams] = {}
    if record is None:
        data_settings = resolve_dataset(plugins, config.dataset, config.settings, part_names=config.part_names)
        records, notes = _records(config, plugins)
    else:
        records, notes = recorded(directory), list(record.notes)
    if options.records_hash is not None:
        _refuse_other_records(records, options.records_hash, config)
    check_subjects([fact.request for fact in records], plugins.editor(config.editor))
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
        before = Before.read(directory, session.measures) if record is not None else None
        if before is not None:
            _check_about(before.measured, records, directory)
            session.remember_unedited(before.measured, records)
        else:
            before = _before(session, records, config, options.shared)
    if record is None:
        before.write(directory)
        write_text(directory / REQUESTS_NAME, "".join(f"{fact.model_dump_json()}\n" for fact in records))
        begun = RunRecord.of(
            session, config, records=records, data_settings=data_settings, command=options.command, notes=notes
        )
        begun.write(directory)  # last: with it the run can be resumed
    else:
        record.compare(session)
        _compare_records(record, records, plugins)
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
    watched: Watched | None = None
    with clock.stage("after"):
        start = time.perf_counter()
        kept = [fact for fact in records if fact.request.id in active]
        after = session.evaluate(kept)
        shown = _shown(before.measured, records)
        said = _said(after, shown, session.generate)
        if checkpoints is not None:
            watched = checkpoints.finish(after, start=start)
    session.finish()
    result = RunResult(
        directory=directory,
        title=_title(config, record, session.requests, records),
        before=before.measured.summary,
        after=after.summary,
        tallies=_tallies(after, kept),
        samples=tuple(
            Sample(prompt=fact.request.text, target_new=fact.request.target_new, before=old, after=new)
            for fact, old, new in zip(shown, before.said, said, strict=True)
        ),
        edits=len(session.requests),
        rejected=sum(fact.request.id not in applied for fact in records),
        rejections=tuple(
            (entry.batch, rejection) for entry in session.ledger.batches for rejection in entry.all_rejected
        ),
        seconds=clock.seconds,
        seconds_per_edit=_seconds_per_edit(log.lines),
        peak_memory_bytes=peak_memory_bytes(session.model.device),
        notes=tuple(
            dict.fromkeys(
                [
                    *notes,
                    *(note for entry in session.ledger.batches for note in entry.notes),
                    *_unseen(after, kept),
                    *_not_said(session),
                ]
            )
        ),
        extensions=session.statistics(),
        watched=watched,
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


def _title(
    config: RunConfig, record: RunRecord | None, active: Sequence[EditRequest], records: Sequence[FactRecord]
) -> str:
    asked = {record.request.id for record in records}
    own = sum(request.id in asked for request in active)
    return config.title(own, data=None if record is None else record.data, more=len(active) - own)


def _check_about(found: Measurement, records: Sequence[FactRecord], directory: Path) -> None:
    """Refuse what was kept of other facts."""
    asked = {record.request.id for record in records}
    if not asked.issuperset(
        observation.request_id for observations in found.observations.values() for observation in observations
    ):
        raise RunError(
            f"What {directory} has kept of the unedited model is of other facts than the run's: its before.parquet is "
            "damaged. Remove it and before.json to measure anew."
        )


def _before(
    session: EditSession,
    records: Sequence[FactRecord],
    config: RunConfig,
    shared: Path | str | None,
) -> Before:
    def measure() -> Before:
        return session.without_edits(lambda: _measure_base(session, records, config))

    if shared is None:
        return measure()
    model = session.model
    text = held_out(config.eval_text, config.seed, beside=session.context.statistics.corpus).identity()
    identity = {
        "model": model.base_fingerprint,
        "device": model.device.type,
        "prompt_form": asdict(model.prompt_form),
        "records": [record.model_dump(mode="json") for record in records],
        "text": None if config.eval_every is None else [text, config.eval_text_tokens],
        "seed": config.seed,
        "evaluators": {
            name: session.settings[name].model_dump(mode="json") if name in session.settings else None
            for name in config.evaluators
        },
        "code": code_versions(session.plugins, config.evaluators),
    }
    before, foreign = Before.shared(Path(shared), identity, session.measures, measure)
    if foreign:
        session.remember_unedited(before.measured, records)
        session.tell_measured(before.measured, records, phase="before")
    return before


def _measure_base(session: EditSession, records: Sequence[FactRecord], config: RunConfig) -> Before:
    text: HeldOutText | None = None
    if config.eval_every is not None:  # first: a text that is too short should cost no measurement
        statistics = session.context.statistics
        text = HeldOutText.measured(
            session.model,
            held_out(config.eval_text, config.seed, beside=statistics.corpus),
            tokens=config.eval_text_tokens,
            progress=session.context.progress,
        )
    measured = session.evaluate_unedited(records)
    said = _said(measured, _shown(measured, records), session.generate_unedited)
    return Before(measured=measured, said=tuple(said), text=text)


def _shown(before: Measurement, records: Sequence[FactRecord]) -> Sequence[FactRecord]:
    """The facts whose prompt is shown with what the model says to it: those that an evaluator has asked come first."""
    asked = _answers(before)
    return sorted(records, key=lambda record: record.request.id not in asked)[:_SAMPLES]


def _said(found: Measurement, shown: Sequence[FactRecord], generate: Callable[..., list[str]]) -> list[str]:
    """What the model says to their prompts: as an evaluator has heard it, and else written for the purpose."""
    answers = _answers(found)
    missing = [record.request for record in shown if record.request.id not in answers]
    texts = generate([request.text for request in missing], max_new_tokens=_SAMPLE_TOKENS)
    answers |= dict(zip((request.id for request in missing), texts, strict=True))
    return [answers[record.request.id] for record in shown]


def _answers(found: Measurement) -> dict[str, str]:
    """By fact, what an evaluator heard the model say to the edited prompt."""
    observed = itertools.chain.from_iterable(found.observations.values())
    return {
        observation.request_id: observation.text
        for observation in observed
        if observation.kind == REWRITE and observation.text is not None
    }


def _tallies(found: Measurement, records: Sequence[FactRecord]) -> tuple[Tally, ...]:
    told = {measure: Tally.of(measure, found, records) for measure in found.measures if measure.tally}
    first = [tally for measure, tally in told.items() if tally is not None and measure.show == "always"]
    return tuple(first or [tally for tally in told.values() if tally is not None])


def _unseen(found: Measurement, records: Sequence[FactRecord]) -> list[str]:
    """What did nothing must not look like success."""
    silent_ones = [name for name, observations in found.observations.items() if records and not observations]
    return [f"The evaluator '{name}' observed nothing of the {counted(len(records), 'fact')}." for name in silent_ones]


def _not_said(session: EditSession) -> list[str]:
    from editcore.runs.saying import not_said

    entries = session.ledger.entries
    told = not_said(session.requests, [evidence for entry in entries for evidence in entry.evidence])
    return [told] if told else []


def _checkpoints(
    session: EditSession, records: Sequence[FactRecord], before: Before, config: RunConfig, directory: Path
) -> Checkpoints | None:
    if config.eval_every is None or before.text is None:
        return None
    schedule = Schedule(every=config.eval_every, sample=config.eval_sample, seed=config.seed, text=before.text)
    return Checkpoints(session, records, before.measured, schedule, directory)


def _seconds_per_edit(log: Sequence[BatchRecord]) -> float:
    """Over the batches whose time is known."""
    timed = [(line.seconds, line.new) for line in log if line.seconds is not None]
    seconds, facts = sum(float(time) for time, _ in timed), sum(float(new) for _, new in timed)
    return seconds / max(1.0, facts)


def _records(config: RunConfig, plugins: Plugins) -> tuple[list[FactRecord], list[str]]:
    """The records to edit, without those that a later one contradicts, unless an extension settles that."""
    kept, notes = records_of(config, plugins)
    for note in notes:
        _log.warning("%s", note)
    return kept, notes


def records_of(
    config: RunConfig, plugins: Plugins, *, leave_out_subjectless: bool = True
) -> tuple[list[FactRecord], list[str]]:
    """The records that a run edits, and notes on those that were left out.

    Args:
        leave_out_subjectless: whether records without a subject cannot be edited where the editor needs one.

    Raises:
        DatasetError: they cannot be read, or none of them can be edited.
        HParamsError: there are fewer than ``config.edits``.
    """
    refuse = refuses_subjects(plugins.editor(config.editor)) if leave_out_subjectless else None
    loaded = load(
        config.dataset, plugins=plugins, settings=config.settings, first=config.edits, strict=config.strict,
        refuse=refuse,
    )  # fmt: skip
    asked, notes = list(loaded.records), list(loaded.notes)
    if config.edits is not None and config.edits > len(asked):
        editable = " that can be edited" if loaded.left_out else ""
        raise HParamsError(
            f"--edits {config.edits} is more than the data set '{config.dataset}' has; it has "
            f"{counted(len(asked), 'record')}{editable}. {loaded.left_out}".rstrip()
        )
    if any(plugins.extension(name).settles_conflicts for name in config.plugins):
        return asked, notes
    kept, more = check_records(asked)
    return kept, [*notes, *more]


def _refuse_other_records(records: Sequence[FactRecord], planned: str, config: RunConfig) -> None:
    """Refuse to give results of other records the name of the planned ones'."""
    found = content_hash(records)
    if found != planned:
        raise RunError(
            f"The records of '{config.dataset}' are not the planned ones: their hash is {found[:12]} where the run is "
            f"made, and was {planned[:12]} where it was planned. Have the same data everywhere, or start the sweep "
            "again if they were changed while it ran."
        )


def _compare_records(record: RunRecord, records: Sequence[FactRecord], plugins: Plugins) -> None:
    """Warn if the data set has changed since the run began. It need not be there any more."""
    try:
        now, _ = records_of(record.config.model_copy(update={"settings": record.settings}), plugins)
    except EditcoreError:
        return
    if content_hash(now) != content_hash(records):
        _log.warning(
            "The data set '%s' has other records now than when the run began. The run goes on with those that it "
            "began with.",
            record.config.dataset,
        )


def _edit(
    session: EditSession,
    requests: Sequence[EditRequest],
    batch_size: int,
    log: BatchLog,
    progress: Progress,
    checkpoints: Checkpoints | None,
) -> None:
    """Batch after batch of what the ledger does not have yet, each logged once it is applied or rejected.

    Before a batch, the checkpoint that is due behind the one before it: also the one that an interrupted run did not
    come to, and none behind the last, where everything is measured anyway.
    """
    handled = {name for entry in session.ledger.batches for name in entry.new_ids}
    handled |= {rejection.request.id for entry in session.ledger.batches for rejection in entry.rejected}
    waiting = [request for request in requests if request.id not in handled]
    size = min(batch_size, session.max_batch or batch_size)  # what the session would split is logged batch by batch
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
