"""The main job: edit many facts in batches, measure before and after, and leave a directory that says how."""

from __future__ import annotations

import json
import logging
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from editcore._errors import HParamsError, RunError, UnknownNameError
from editcore._files import json_text, replacing, write_text
from editcore._ledger import LEDGER_NAME, Ledger
from editcore._memory import peak_memory_bytes
from editcore._paths import check_writable, timed_directory
from editcore._plugins import Plugins
from editcore._progress import Progress, silent
from editcore._protocols import Backend
from editcore._session import BatchResult, EditSession, make_backend
from editcore._values import EditRequest, FactRecord, first_problem
from editcore.datasets import check_records, load_records
from editcore.models import CATALOGUE, LanguageModel

if TYPE_CHECKING:
    from editcore.evaluation import PromptScore, Summary

__all__ = ["RunConfig", "RunResult", "Sample", "open_run", "run"]

_log = logging.getLogger(__name__)

RUN_NAME = "run.json"
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
    settings: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Hyperparameters by the name of the editor, backend or extension."""

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
        return config


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
    """Facts that a gate refused."""
    seconds: Mapping[str, float]
    """Wall time by stage: ``model``, ``before``, ``targets``, ``keys``, ``solve``, ``other``, ``after``."""
    seconds_per_edit: float
    """Wall time of all batches over all new facts; loading and evaluation are not in it."""
    peak_memory_bytes: int
    notes: tuple[str, ...]
    extensions: Mapping[str, Mapping[str, Any]]
    """What extensions count about themselves, by their names."""


def run(
    config: RunConfig,
    directory: Path,
    *,
    plugins: Plugins | None = None,
    progress: Progress = silent,
    command: Sequence[str] = (),
    save: Path | None = None,
) -> RunResult:
    """Edit, measure and write the run directory; with ``save``, the edited model as a normal folder too.

    What can be wrong with names, settings, data and the directory is found before anything is written.

    Raises:
        EditcoreError: the input is wrong, or a batch could not be solved; batches before it stay in the directory.
    """
    plugins = plugins or Plugins.load()
    _refuse_used(directory)
    clock = _Stages()
    records, notes = _records(config, plugins)
    with clock.stage("model"):
        session = EditSession.open(
            config.model,
            editor=config.editor,
            plugins=config.plugins,
            backend=config.backend,
            preset=config.preset,
            settings=config.settings,
            corpus=config.corpus,
            corpus_tokens=config.corpus_tokens,
            seed=config.seed,
            device=config.device,
            dtype=config.dtype,
            chat_template=config.chat_template,
            directory=directory,
            registry=plugins,
            progress=progress,
        )
    with clock.stage("before"):
        scores_before, before = session.evaluate(records, phase="before")
        prompts = [record.request.text for record in records[:_SAMPLES]]
        said_before = session.generate(prompts, max_new_tokens=_SAMPLE_TOKENS)
    _write_run(directory, config, session, command)
    write_text(directory / "requests.jsonl", "".join(record.model_dump_json() + "\n" for record in records))
    batches = _edit(session, [record.request for record in records], config.batch_size, directory, progress)
    kept = _kept(records, batches)
    with clock.stage("after"):
        scores_after, after = session.evaluate(kept, phase="after")
        said_after = session.generate(prompts, max_new_tokens=_SAMPLE_TOKENS)
    session.finish()
    for batch in batches:
        clock.add_batch(batch)
    result = RunResult(
        directory=directory,
        before=before,
        after=after,
        samples=tuple(
            Sample(prompt=record.request.text, target_new=record.request.target_new, before=old, after=new)
            for record, old, new in zip(records, said_before, said_after, strict=False)
        ),
        edits=len(session.requests),
        rejected=len(records) - len(kept),
        seconds=clock.seconds,
        seconds_per_edit=sum(batch.seconds for batch in batches) / len(records),
        peak_memory_bytes=peak_memory_bytes(session.model.device),
        notes=tuple(dict.fromkeys([*notes, *(note for batch in batches for note in batch.proposal.notes)])),
        extensions=session.statistics(),
    )
    _write_results(result, scores_before, scores_after, config)
    if save is not None:
        session.save(save)
    return result


def _refuse_used(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise RunError(f"The output {directory} is a file; give a directory that does not exist yet.")
    for name in (RUN_NAME, LEDGER_NAME):
        if (directory / name).exists():
            raise RunError(
                f"{directory} already holds a run ({name} is there). Give another --out, or remove the directory."
            )
    # Found now rather than after the model was loaded and measured.
    check_writable(directory)


def _records(config: RunConfig, plugins: Plugins) -> tuple[list[FactRecord], list[str]]:
    """The records to edit, without those that a later one contradicts."""
    available = load_records(config.dataset, plugins=plugins)
    if config.edits is not None and config.edits > len(available):
        raise HParamsError(
            f"--edits {config.edits} is more than the data set '{config.dataset}' has; it has {len(available)} records."
        )
    kept, notes = check_records(available[: config.edits])
    for note in notes:
        _log.warning("%s", note)
    return kept, list(notes)


def _edit(
    session: EditSession, requests: Sequence[EditRequest], batch_size: int, directory: Path, progress: Progress
) -> list[BatchResult]:
    """Batch after batch, each logged to ``batches.jsonl`` once it is applied or rejected."""
    results: list[BatchResult] = []
    size = min(batch_size, session.max_batch or batch_size)  # what the session would split is logged batch by batch
    with progress.task("editing", len(requests)) as advance:
        for start in range(0, len(requests), size):
            for result in session.edit(requests[start : start + size]):
                results.append(result)
                _log_batch(directory, result)
                advance(result.batch.num_new)
    return results


def _log_batch(directory: Path, result: BatchResult) -> None:
    proposal = result.proposal
    line = {
        "batch": result.batch.index,
        "applied": result.applied,
        "reason": result.reason,
        "verdicts": {name: asdict(verdict) for name, verdict in result.verdicts.items()},
        "new": result.batch.num_new,
        "replayed": len(result.batch) - result.batch.num_new,
        "seconds": result.seconds,
        "stages": dict(proposal.seconds),
        "notes": list(proposal.notes),
        "diagnostics": dict(proposal.diagnostics),
        "evidence": [asdict(evidence) for evidence in proposal.evidence],
    }
    try:
        with (directory / "batches.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_text(line) + "\n")
    except OSError as error:
        raise RunError(f"Cannot write {directory / 'batches.jsonl'}: {error.strerror}.") from error


def _kept(records: Sequence[FactRecord], batches: Sequence[BatchResult]) -> list[FactRecord]:
    rejected = {request.id for batch in batches if not batch.applied for request in batch.batch.new_requests}
    return [record for record in records if record.request.id not in rejected]


class _Stages:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> _Stopwatch:
        return _Stopwatch(self, name)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def add_batch(self, batch: BatchResult) -> None:
        """A batch's time by the stages that its proposal names; the rest is ``other``."""
        for name, seconds in batch.proposal.seconds.items():
            self.add(name, seconds)
        self.add("other", batch.seconds - sum(batch.proposal.seconds.values()))


class _Stopwatch:
    def __init__(self, stages: _Stages, name: str) -> None:
        self._stages, self._name, self._start = stages, name, 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_exception: object) -> None:
        self._stages.add(self._name, time.perf_counter() - self._start)


def _write_run(directory: Path, config: RunConfig, session: EditSession, command: Sequence[str]) -> None:
    record = {
        "config": config.model_dump(mode="json"),
        "settings": {name: settings.model_dump(mode="json") for name, settings in session.settings.items()},
        "provenance": dict(session.provenance),
        "model": {
            "name": session.model.name,
            "folder": _folder(config.model),
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
        "command": shlex.join(command) if command else None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(directory / RUN_NAME, json_text(record, indent=2) + "\n")


def _folder(model: str) -> str | None:
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
    result: RunResult, before: Sequence[PromptScore], after: Sequence[PromptScore], config: RunConfig
) -> None:
    import pandas as pd

    from editcore._figures import save, summary_figure
    from editcore.evaluation import to_frame

    frame = pd.concat([to_frame(before, phase="before"), to_frame(after, phase="after")], ignore_index=True)
    with replacing(result.directory / "results.parquet") as path:
        frame.to_parquet(path, index=False)
    method = " + ".join([config.editor, *config.plugins])
    title = f"{method} on {Path(config.model).name}: {result.edits} edits of {Path(config.dataset).name}"
    save(summary_figure(result.before, result.after, title=title), result.directory / "figures" / "summary.png")
    summary = {
        "before": result.before.as_json(),
        "after": result.after.as_json(),
        "edits": result.edits,
        "rejected": result.rejected,
        "seconds_per_edit": result.seconds_per_edit,
        "seconds": dict(result.seconds),
        "peak_memory_bytes": result.peak_memory_bytes,
        "samples": [asdict(sample) for sample in result.samples],
        "notes": list(result.notes),
        "extensions": dict(result.extensions),
    }
    write_text(result.directory / "summary.json", json_text(summary, indent=2) + "\n")


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
    path = directory / RUN_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        config = RunConfig(**record["config"])
        expected, folder = record["model"]["fingerprint"], record["model"].get("folder")
        settings = record["settings"]
    except OSError as error:
        raise RunError(f"{directory} is not a run directory: {RUN_NAME} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {' '.join(str(error).split())}.") from error
    ledger = Ledger.open(directory)
    backend, _ = make_backend(plugins.backend(config.backend), settings.get(config.backend, {}))
    source = folder if folder is not None and Path(folder).is_dir() else config.model
    model = LanguageModel.load(
        source,
        device=device or config.device,
        dtype=config.dtype,
        chat_template=config.chat_template if chat_template is None else chat_template,
        plugins=plugins,
        progress=progress,
    )
    if model.base_fingerprint != expected:
        raise RunError(
            f"The model '{config.model}' is not the one of the run: its weights have the fingerprint "
            f"{model.base_fingerprint[:12]}, the run's base had {expected[:12]}."
        )
    backend.open(model)
    backend.rebuild(ledger.active())
    return model, ledger, backend


def default_directory(config: RunConfig) -> Path:
    """``runs/EDITOR-DATASET-TIME``, in the working directory."""
    return timed_directory(f"{config.editor}-{Path(config.dataset).name.split('.')[0]}")
