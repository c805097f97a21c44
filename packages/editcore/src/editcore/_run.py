"""The main job: edit many facts in batches, measure before and after, and leave a directory that says how."""

from __future__ import annotations

import json
import logging
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from editcore._backends import open_backend, rebuild
from editcore._checkpoints import CHECKPOINTS, TEXT_TOKENS, TEXT_WINDOW, Checkpoints, HeldOutText
from editcore._errors import HParamsError, RunError, UnknownNameError
from editcore._files import json_text, remove_leftovers, replacing, write_text
from editcore._ledger import DELTAS_NAME, LEDGER_NAME, Ledger
from editcore._lock import locked
from editcore._memory import peak_memory_bytes
from editcore._paths import check_writable, timed_directory
from editcore._plugins import Plugins
from editcore._progress import Progress, silent
from editcore._protocols import Backend
from editcore._run_log import BatchLog, Before, rejection_line
from editcore._session import EditSession, make_backend
from editcore._values import EditRequest, FactRecord, RejectedRequest, first_problem
from editcore._versions import code_versions
from editcore.corpora import open_corpus
from editcore.datasets import check_records, load_records
from editcore.evaluation import summarize
from editcore.models import CATALOGUE, LanguageModel
from editcore.statistics import StatisticsStore

if TYPE_CHECKING:
    from editcore.evaluation import PromptScore, Summary

__all__ = [
    "RunConfig",
    "RunRecord",
    "RunResult",
    "Sample",
    "has_begun",
    "is_finished",
    "make_session",
    "open_run",
    "open_session",
    "recorded",
    "records_of",
    "run",
    "write_run",
]

_log = logging.getLogger(__name__)

RUN_NAME = "run.json"
REQUESTS_NAME = "requests.jsonl"
SUMMARY_NAME = "summary.json"
RESULTS_NAME = "results.parquet"
FIGURES_NAME = "figures"
_VERSIONED = ("editcore", "torch", "transformers", "numpy", "pandas", "safetensors", "tokenizers")
_SAMPLES = 3
_SAMPLE_TOKENS = 8


class RunConfig(BaseModel):
    """Everything that decides a run's result, but for the versions of the code."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    editor: str
    """Name of an installed editor."""
    plugins: tuple[str, ...] = ()
    """Extensions, in the order asked for. The name of a backend selects that backend."""
    backend: str = "raw"
    """How deltas are put into the model."""
    model: str = "smollm2-135m"
    """A catalogue name, a folder or a hub id."""
    dataset: str = "worldfacts"
    """A registered data set or a file of records."""
    edits: Annotated[int, Field(ge=1)] | None = None
    """How many records to edit, from the start of the data set; left out, all of them."""
    batch_size: Annotated[int, Field(ge=1)] = 10
    """Facts solved together."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""
    device: str = "cpu"
    dtype: str = "float32"
    preset: str | None = None
    """A preset of the editor; left out, the one named like the model where there is one."""
    corpus: str = "self"
    """Text behind the second moments: self, docs, hf:NAME or a file."""
    corpus_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens counted; left out, ten times the width of the projection's input."""
    chat_template: bool = False
    """Whether the model's chat template stands around every prompt, of edits and of measurements."""
    evaluator: str = "counterfact"
    """What measures the model: before, at checkpoints and at the end."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Facts between two checkpoints, at which the edits made so far are measured again; left out, only the end is."""
    eval_sample: Annotated[int, Field(ge=1)] | None = None
    """Facts measured at a checkpoint, a seeded sample over all ages; left out, all. The end is measured on all."""
    eval_text: str | None = None
    """Text for the perplexity at checkpoints: docs, hf:NAME or a file; left out, text that the unedited model writes,
    with another seed than the second moments have."""
    eval_text_tokens: Annotated[int, Field(ge=TEXT_WINDOW)] = TEXT_TOKENS
    """Tokens of it, from its start."""
    settings: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Hyperparameters by the name of the editor, backend or extension."""

    @property
    def method(self) -> str:
        """What edits, in titles: the editor and its extensions."""
        return " + ".join([self.editor, *self.plugins])

    @classmethod
    def create(cls, values: Mapping[str, Any], plugins: Plugins) -> RunConfig:
        """A checked configuration; ``--plugin NAME`` of a backend becomes the backend.

        Raises:
            HParamsError: a value is missing or out of range.
            UnknownNameError: there is no such option.
        """
        values = dict(values)
        for name in values:
            if name not in cls.model_fields:
                raise UnknownNameError("option", name, cls.model_fields, hint="A plugin's settings stand in its table.")
        given = values.get("plugins", ())
        asked = [given] if isinstance(given, str) else [str(name) for name in given]
        chosen = [name for name in asked if name in plugins.backends()]
        if len(chosen) > 1:
            raise HParamsError(f"--plugin names the backends {' and '.join(chosen)}; a run has one backend.")
        if chosen:
            values["backend"] = chosen[0]
        values["plugins"] = tuple(name for name in asked if name not in chosen)
        try:
            config = cls(**values)
        except ValidationError as error:
            raise HParamsError(f"The run's configuration is wrong. {first_problem(error)}.") from error
        if len(set(config.plugins)) < len(config.plugins):
            raise HParamsError(f"A plugin is named twice: --plugin {' --plugin '.join(config.plugins)}.")
        for name in ("eval_sample", "eval_text", "eval_text_tokens"):
            value = getattr(config, name)
            if config.eval_every is None and value != cls.model_fields[name].default:
                raise HParamsError(
                    f"--{name.replace('_', '-')} {value} is for checkpoints, and there are none without --eval-every N."
                )
        return config

    def title(self, edits: int) -> str:
        """What stands over a run's results: by what, on what, and how many facts of which data were edited."""
        counted = f"{edits} edit" if edits == 1 else f"{edits} edits"
        return f"{self.method} on {Path(self.model).name}: {counted} of {Path(self.dataset).name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the model says on one edited fact."""

    prompt: str
    target_new: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    directory: Path
    before: Summary
    after: Summary
    samples: tuple[Sample, ...]
    edits: int
    """Facts that are active at the end."""
    rejected: int
    """Facts that an extension kept out."""
    rejections: tuple[tuple[int, RejectedRequest], ...]
    """Each of them with the number of its batch, the reason and the figures."""
    seconds: Mapping[str, float]
    """Wall time by stage: ``model``, ``before``, ``targets``, ``keys``, ``solve``, ``other``, ``after``; with
    checkpoints, ``checkpoints``."""
    seconds_per_edit: float
    """Wall time of all batches over all new facts; loading and evaluation are not in it."""
    peak_memory_bytes: int
    notes: tuple[str, ...]
    extensions: Mapping[str, Mapping[str, Any]]
    """What extensions and the backend count about themselves, by their names."""


def run(
    config: RunConfig,
    directory: Path,
    *,
    plugins: Plugins | None = None,
    progress: Progress = silent,
    command: Sequence[str] = (),
    save: Path | None = None,
    resume: bool = False,
    model: LanguageModel | None = None,
    shared: Path | None = None,
) -> RunResult:
    """Edit, measure and write the run directory; with ``save``, the edited model as a normal folder too.

    What can be wrong with names, settings, data and the directory is found before anything is written. Whatever ends
    the process, a run that has its ``run.json`` can be resumed: weights, ledger and results are then, to the bit, those
    of a run that nothing had ended.

    Args:
        resume: go on with the run in ``directory``, if one was begun there; ``config`` must be that run's.
        model: the model of ``config``, unedited, if it is in memory. It is unedited again when this returns; after an
            exception it may not be.
        shared: a folder where runs keep what they measure of an unedited model, for one another.

    Raises:
        EditcoreError: the input is wrong, or a batch could not be solved; batches before it stay in the directory.
    """
    plugins = plugins or Plugins.load()
    begun = resume and has_begun(directory)
    if not begun:
        _refuse_used(directory)
    with locked(directory):
        record = RunRecord.read(directory) if begun else None
        if record is not None:
            _refuse_unlike(record, config, directory)
        for folder in (directory, directory / DELTAS_NAME, directory / FIGURES_NAME, directory / CHECKPOINTS):
            remove_leftovers(folder)
        return _run(config, directory, record, plugins, progress, command, save, model, shared)


def _run(
    config: RunConfig,
    directory: Path,
    record: RunRecord | None,
    plugins: Plugins,
    progress: Progress,
    command: Sequence[str],
    save: Path | None,
    model: LanguageModel | None,
    shared: Path | None,
) -> RunResult:
    clock = _Stages()
    if record is None and config.eval_text is not None:
        open_corpus(config.eval_text)  # found now rather than after the model was loaded
    records, notes = _records(config, plugins) if record is None else (recorded(directory), list(record.notes))
    with clock.stage("model"):
        session = make_session(config, directory, record, plugins, progress, model=model)
    prompts = [one.request.text for one in records[:_SAMPLES]]
    with clock.stage("before"):
        before = Before.read(directory) if record is not None else None
        if before is None:
            before = _before(session, records, prompts, config, shared)
    if record is None:
        _write_begun(directory, config, session, command, records, notes, before)
    else:
        record.compare(session)
    log = BatchLog(directory, session.ledger)
    checkpoints = _checkpoints(session, records, before, config, directory)
    _edit(session, [one.request for one in records], config.batch_size, log, progress, checkpoints)
    for line in log.lines:
        clock.add_batch(line)
    if checkpoints is not None:
        clock.add("checkpoints", checkpoints.seconds)
    active, applied = ({one.id for one in requests} for requests in (session.requests, session.ledger.written()))
    watched: dict[str, Any] = {}
    with clock.stage("after"):
        start = time.perf_counter()
        kept = [one for one in records if one.request.id in active]
        after = _measure(session, kept, prompts, phase="after")
        if checkpoints is not None:
            watched = checkpoints.finish(after.scores, start=start, title=config.title(len(session.requests)))
    session.finish()
    result = RunResult(
        directory=directory,
        before=summarize(before.scores),
        after=summarize(after.scores),
        samples=tuple(
            Sample(prompt=one.request.text, target_new=one.request.target_new, before=old, after=new)
            for one, old, new in zip(records, before.said, after.said, strict=False)
        ),
        edits=len(session.requests),
        rejected=sum(one.request.id not in applied for one in records),
        rejections=tuple((entry.batch, one) for entry in session.ledger.batches for one in entry.all_rejected),
        seconds=clock.seconds,
        seconds_per_edit=_seconds_per_edit(log.lines),
        peak_memory_bytes=peak_memory_bytes(session.model.device),
        notes=tuple(dict.fromkeys([*notes, *(note for entry in session.ledger.batches for note in entry.notes)])),
        extensions=session.statistics(),
    )
    _write_results(result, before.scores, after.scores, config, watched)
    if save is not None:
        session.save(save)
    if model is not None:
        session.close()
    return result


def make_session(
    config: RunConfig,
    directory: Path,
    record: RunRecord | None,
    plugins: Plugins,
    progress: Progress,
    *,
    model: LanguageModel | None = None,
) -> EditSession:
    """The session of a run in its directory, with what is there already.

    Args:
        record: of a run that was begun, whose settings are resolved, whatever presets say now.
        model: loaded unless given.
    """
    named = {config.editor, config.backend, *config.plugins}
    settings = {name: values for name, values in (record or config).settings.items() if record is None or name in named}
    source = config.model if record is None else record.source
    return EditSession.open(
        source if model is None else model,
        editor=config.editor,
        plugins=config.plugins,
        backend=config.backend,
        preset=config.preset if record is None else None,
        settings=settings,
        corpus=config.corpus,
        corpus_tokens=config.corpus_tokens,
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        chat_template=config.chat_template,
        evaluator=config.evaluator,
        directory=directory,
        registry=plugins,
        progress=progress,
    )


def has_begun(directory: Path) -> bool:
    """Whether there is a run that can be opened, and resumed unless it is finished."""
    return (directory / RUN_NAME).exists()


def is_finished(directory: Path) -> bool:
    """Whether there is a run that was measured to its end."""
    return has_begun(directory) and (directory / SUMMARY_NAME).exists()


def _before(
    session: EditSession,
    records: Sequence[FactRecord],
    prompts: Sequence[str],
    config: RunConfig,
    shared: Path | None,
) -> Before:
    def measure() -> Before:
        return session.without_edits(lambda: _measure_base(session, records, prompts, config))

    if shared is None:
        return measure()
    model = session.model
    text = "self" if config.eval_text is None else open_corpus(config.eval_text).identity()
    identity = {
        "model": model.base_fingerprint,
        "device": model.device.type,
        "prompt_form": asdict(model.prompt_form),
        "records": [record.model_dump(mode="json") for record in records],
        "text": None if config.eval_every is None else [text, config.eval_text_tokens, config.seed],
        "evaluator": config.evaluator,
        "code": code_versions(session.plugins, (config.evaluator,)),
    }
    before, foreign = Before.shared(shared, identity, measure)
    if foreign:
        session.tell_measured(summarize(before.scores), phase="before")
    return before


def _measure(session: EditSession, records: Sequence[FactRecord], prompts: Sequence[str], *, phase: str) -> Before:
    scores, _ = session.evaluate(records, phase=phase)
    return Before(scores=tuple(scores), said=tuple(session.generate(prompts, max_new_tokens=_SAMPLE_TOKENS)))


def _measure_base(
    session: EditSession, records: Sequence[FactRecord], prompts: Sequence[str], config: RunConfig
) -> Before:
    # The text first: one that is too short should cost no measurement.
    text = (
        None
        if config.eval_every is None
        else HeldOutText.measured(session, config.eval_text, config.seed, tokens=config.eval_text_tokens)
    )
    return _measure(session, records, prompts, phase="before").model_copy(update={"text": text})


def _checkpoints(
    session: EditSession, records: Sequence[FactRecord], before: Before, config: RunConfig, directory: Path
) -> Checkpoints | None:
    if config.eval_every is None or before.text is None:
        return None
    return Checkpoints(
        session,
        records,
        before.scores,
        before.text,
        every=config.eval_every,
        sample=config.eval_sample,
        seed=config.seed,
        directory=directory,
    )


def _seconds_per_edit(log: Sequence[Mapping[str, Any]]) -> float:
    """Over the batches whose time is known."""
    timed = [line for line in log if line["seconds"] is not None]
    seconds, facts = (sum(float(line[name]) for line in timed) for name in ("seconds", "new"))
    return seconds / max(1.0, facts)


def _refuse_used(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise RunError(f"The output {directory} is a file; give a directory that does not exist yet.")
    for name in (RUN_NAME, LEDGER_NAME):
        if (directory / name).exists():
            raise RunError(
                f"{directory} already holds a run ({name} is there). Go on with it with --resume, give another --out, "
                "or remove the directory."
            )
    # Found now rather than after the model was loaded and measured.
    check_writable(directory)


def _records(config: RunConfig, plugins: Plugins) -> tuple[list[FactRecord], list[str]]:
    """The records to edit, without those that a later one contradicts, unless an extension settles that."""
    kept, notes = records_of(config, plugins)
    for note in notes:
        _log.warning("%s", note)
    return kept, notes


def records_of(config: RunConfig, plugins: Plugins) -> tuple[list[FactRecord], list[str]]:
    """The records that a run edits, and notes on those that were left out.

    Raises:
        DatasetError: they cannot be read.
        HParamsError: there are fewer than ``config.edits``.
    """
    available = load_records(config.dataset, plugins=plugins)
    if config.edits is not None and config.edits > len(available):
        raise HParamsError(
            f"--edits {config.edits} is more than the data set '{config.dataset}' has; it has {len(available)} records."
        )
    asked = available[: config.edits]
    if any(plugins.extension(name).settles_conflicts for name in config.plugins):
        return asked, []
    kept, notes = check_records(asked)
    return kept, list(notes)


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
    handled |= {one.request.id for entry in session.ledger.batches for one in entry.rejected}
    waiting = [request for request in requests if request.id not in handled]
    size = min(batch_size, session.max_batch or batch_size)  # what the session would split is logged batch by batch
    with progress.task("editing", len(waiting)) as advance:
        for start in range(0, len(waiting), size):
            if checkpoints is not None:
                checkpoints.check()
            for result in session.edit(waiting[start : start + size]):
                log.add(session.ledger.batch(result.batch.index), result.seconds, result.proposal.seconds)
                advance(result.batch.num_new + len(result.rejected))


class _Stages:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> _Stopwatch:
        return _Stopwatch(self, name)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def add_batch(self, line: Mapping[str, Any]) -> None:
        """A logged batch's time by the stages that its proposal named; the rest is ``other``."""
        for name, seconds in line["stages"].items():
            self.add(name, seconds)
        self.add("other", (line["seconds"] or 0.0) - sum(line["stages"].values()))


class _Stopwatch:
    def __init__(self, stages: _Stages, name: str) -> None:
        self._stages, self._name, self._start = stages, name, 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_exception: object) -> None:
        self._stages.add(self._name, time.perf_counter() - self._start)


def _write_begun(
    directory: Path,
    config: RunConfig,
    session: EditSession,
    command: Sequence[str],
    records: Sequence[FactRecord],
    notes: Sequence[str],
    before: Before,
) -> None:
    """What a run needs to be resumed; with ``run.json``, which comes last, it is begun."""
    before.write(directory)
    write_text(directory / REQUESTS_NAME, "".join(record.model_dump_json() + "\n" for record in records))
    write_run(directory, config, session, command=command, notes=notes)


def write_run(
    directory: Path,
    config: RunConfig,
    session: EditSession,
    *,
    command: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write ``run.json``: everything that decides the result, and what was learnt from the unedited model."""
    record = {
        "config": config.model_dump(mode="json"),
        "settings": {name: settings.model_dump(mode="json") for name, settings in session.settings.items()},
        "provenance": dict(session.provenance),
        "model": {
            "name": session.model.name,
            "folder": folder_of(config.model),
            "fingerprint": session.model.base_fingerprint,
            "layout": asdict(session.model.layout),
            "prompt_form": asdict(session.model.prompt_form),
        },
        "statistics": {
            "corpus": session.context.statistics.corpus.identity(),
            "tokens": session.context.statistics.tokens,
        },
        "versions": _versions(session.plugins),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seed": config.seed,
        "notes": list(notes),
        "command": shlex.join(command) if command else None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(directory / RUN_NAME, json_text(record, indent=2) + "\n")


def folder_of(model: str) -> str | None:
    """Where a model folder is, so that the run can be opened from any working directory; ``None`` for other models."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model not in CATALOGUE and path.is_dir() else None


def _versions(plugins: Plugins) -> dict[str, str]:
    names = {*_VERSIONED, *(row.distribution for row in plugins.listing() if row.status == "active")}
    found = {}
    for name in sorted(names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _write_results(
    result: RunResult,
    before: Sequence[PromptScore],
    after: Sequence[PromptScore],
    config: RunConfig,
    watched: Mapping[str, Any],
) -> None:
    import pandas as pd

    from editcore._figures import save, summary_figure
    from editcore.evaluation import to_frame

    frame = pd.concat([to_frame(before, phase="before"), to_frame(after, phase="after")], ignore_index=True)
    with replacing(result.directory / RESULTS_NAME) as path:
        frame.to_parquet(path, index=False)
    figure = summary_figure(result.before, result.after, title=config.title(result.edits))
    save(figure, result.directory / FIGURES_NAME / "summary.png")
    summary = {
        "before": result.before.as_json(),
        "after": result.after.as_json(),
        "edits": result.edits,
        "rejected": result.rejected,
        "rejections": [{"batch": batch, **rejection_line(one)} for batch, one in result.rejections],
        "seconds_per_edit": result.seconds_per_edit,
        "seconds": dict(result.seconds),
        "peak_memory_bytes": result.peak_memory_bytes,
        "samples": [asdict(sample) for sample in result.samples],
        "notes": list(result.notes),
        "extensions": dict(result.extensions),
        **watched,
    }
    Before.remove(result.directory)  # before the summary, which says that the run is finished
    write_text(result.directory / SUMMARY_NAME, json_text(summary, indent=2) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What ``run.json`` says of a run."""

    config: RunConfig
    settings: Mapping[str, Mapping[str, Any]]
    """Every hyperparameter, by the name of editor, backend or extension."""
    model: Mapping[str, Any]
    """Name, folder if it is one, fingerprint and layout."""
    versions: Mapping[str, str]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]
    command: str | None = None
    """The command line; ``None`` for a run made from Python."""
    machine: Mapping[str, str] = field(default_factory=dict)
    """``python``, ``platform``, and when it ``started``."""

    @classmethod
    def read(cls, directory: Path) -> RunRecord:
        """The record of a run directory.

        Raises:
            RunError: there is none, or it is damaged.
        """
        path = directory / RUN_NAME
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                config=RunConfig(**record["config"]),
                settings={name: dict(values) for name, values in record["settings"].items()},
                model={"folder": None, **record["model"], "fingerprint": str(record["model"]["fingerprint"])},
                versions=dict(record["versions"]),
                provenance=dict(record["provenance"]),
                notes=tuple(map(str, record["notes"])),
                command=record.get("command"),
                machine={name: str(record[name]) for name in ("python", "platform", "started") if name in record},
            )
        except OSError as error:
            raise RunError(
                f"{directory} is not a run directory: {RUN_NAME} cannot be read ({error.strerror})."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(f"{path} is damaged: {' '.join(str(error).split())}.") from error

    @property
    def source(self) -> str:
        """Where the model is loaded from."""
        folder = self.model["folder"]
        return folder if isinstance(folder, str) and Path(folder).is_dir() else self.config.model

    def check(self, model: LanguageModel) -> None:
        """Refuse a model with other weights than the run's.

        Raises:
            RunError: they differ.
        """
        expected = self.model["fingerprint"]
        if model.base_fingerprint != expected:
            raise RunError(
                f"The model '{self.config.model}' is not the one of the run: its weights have the fingerprint "
                f"{model.base_fingerprint[:12]}, the run's base had {expected[:12]}."
            )

    def compare(self, session: EditSession) -> None:
        """Warn of what may keep a resumed run from giving the bits of an uninterrupted one.

        Raises:
            RunError: the model has other weights than the run's.
        """
        self.check(session.model)
        now = _versions(session.plugins)
        for name, version_then in self.versions.items():
            if now.get(name) != version_then:
                _log.warning("%s was %s when the run began and is %s now.", name, version_then, now.get(name))
        if json.loads(json_text(dict(session.provenance))) != self.provenance:
            _log.warning("What the editor learns from the unedited model is not what it was when the run began.")


def _refuse_unlike(record: RunRecord, config: RunConfig, directory: Path) -> None:
    if is_finished(directory):
        raise RunError(
            f"The run in {directory} is finished; there is nothing to resume. "
            "'editctl generate RUN PROMPT' speaks with its model."
        )
    for name in RunConfig.model_fields:
        was, asked = getattr(record.config, name), getattr(config, name)
        if was != asked:
            option = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
            raise RunError(
                f"{option}: {asked} was asked for, but the run in {directory} has {was}. A resumed run takes "
                "everything from its run.json; leave the option out, or start a new run with another --out."
            )


def recorded(directory: Path) -> list[FactRecord]:
    """The records that the run began with."""
    path = directory / REQUESTS_NAME
    try:
        return [FactRecord.model_validate_json(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise RunError(f"{path} is damaged ({first_problem(error)}).") from error


def open_run(
    directory: Path,
    *,
    device: str | None = None,
    chat_template: bool | None = None,
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> tuple[LanguageModel, Ledger, Backend]:
    """The model of a run with its edits applied, the run's ledger, and the backend that holds them.

    Args:
        chat_template: whether to put the chat template around prompts; left out, as the run did.

    Raises:
        RunError: there is no run, a file is damaged, or the model has other weights than the run's.
    """
    plugins = plugins or Plugins.load()
    record = RunRecord.read(directory)
    config = record.config
    ledger = Ledger.read(directory)
    backend, _ = make_backend(plugins.backend(config.backend), record.settings.get(config.backend, {}))
    model = LanguageModel.load(
        record.source,
        device=device or config.device,
        dtype=config.dtype,
        chat_template=config.chat_template if chat_template is None else chat_template,
        plugins=plugins,
        progress=progress,
    )
    record.check(model)
    open_backend(
        backend,
        model,
        statistics=lambda: statistics_of(config, model, progress=progress),
        directory=directory,
    )
    rebuild(backend, model, ledger)
    return model, ledger, backend


def open_session(directory: Path, *, plugins: Plugins | None = None, progress: Progress = silent) -> EditSession:
    """The session of a run, with the extensions and settings that it had.

    Raises:
        RunError: as :func:`open_run`.
    """
    plugins = plugins or Plugins.load()
    record = RunRecord.read(directory)
    session = make_session(record.config, directory, record, plugins, progress)
    record.check(session.model)
    return session


def statistics_of(config: RunConfig, model: LanguageModel, *, progress: Progress = silent) -> StatisticsStore:
    """The second moments that a run is made with: in the cache, or computed from ``model``, unedited."""
    return StatisticsStore(
        model, corpus=config.corpus, tokens=config.corpus_tokens, seed=config.seed, progress=progress
    )


def default_directory(config: RunConfig) -> Path:
    """``runs/EDITOR-DATASET-TIME``, in the working directory."""
    return timed_directory(f"{config.editor}-{Path(config.dataset).name.split('.')[0]}")
