"""``run.json``: how a run was made. It is written when the run begins, and read when the run is opened again."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ValidationError

from editcore._util.records import Record, read_records
from editcore.datasets import short_name
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.values import FactRecord, first_problem
from editcore.models.catalogue import CATALOGUE
from editcore.models.prompt_form import PromptForm
from editcore.models.sources import HubModel
from editcore.plugins.registry import Plugins
from editcore.runs.added import read_added
from editcore.runs.config import RunConfig, SessionConfig

if TYPE_CHECKING:
    from editcore.ledger.ledger import Ledger
    from editcore.models import LanguageModel
    from editcore.runs.resolved import Resolved
    from editcore.second_moments.statistics import StatisticsStore

__all__ = [
    "REQUESTS_NAME",
    "RUN_NAME",
    "LayoutRecord",
    "ModelRecord",
    "RunRecord",
    "active_facts",
    "facts_of",
    "folder_of",
    "installed_versions",
    "learnt_before",
    "read_requests",
]

_log = logging.getLogger(__name__)

RUN_NAME = "run.json"
REQUESTS_NAME = "requests.jsonl"
_VERSIONED = ("editcore", "torch", "transformers", "numpy", "pandas", "safetensors", "tokenizers")


def folder_of(model: str) -> str | None:
    """The absolute path of a model folder, so that the run can be opened from any working directory; ``None`` for
    models of the catalogue or the hub."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model not in CATALOGUE and path.is_dir() else None


def installed_versions(plugins: Plugins) -> dict[str, str]:
    """Versions of the packages that a result depends on, and of every active plugin's, by name."""
    names = {*_VERSIONED, *(row.distribution for row in plugins.listing() if row.status == "active")}
    found = {}
    for name in sorted(names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class LayoutRecord(Record):
    """A :class:`editcore.models.ModelLayout` in a file. Its fields mean the same; this class imports no torch."""

    blocks: str = ""
    projection: str
    final_norm: str = ""
    head: str = ""
    num_layers: int
    d_model: int
    d_ff: int
    vocab_size: int | None = None
    orientation: Literal["out_in", "in_out"]
    has_bias: bool = False
    norm_placement: Literal["pre", "post"] = "pre"
    post_norm: str = ""
    residual_scale: float = 1.0


@documented
class ModelRecord(Record):
    """The unedited model of a run."""

    name: str = ""
    """Its name in the run."""
    folder: str | None = None
    """Its folder, with an absolute path; ``None`` for a model of the catalogue or the hub."""
    hub: HubModel | None = None
    """Its id and commit on the hub, if they are known."""
    fingerprint: str
    """Of its weights."""
    layout: LayoutRecord | None = None
    """Its modules."""
    prompt_form: PromptForm | None = None
    """What stood around every prompt."""

    @classmethod
    def of(cls, model: LanguageModel, name: str, *, prompt_form: PromptForm | None = None) -> ModelRecord:
        """The record of a model.

        Args:
            name: the name, folder or hub id that the user gave.
            prompt_form: what stands around every prompt; left out, it is not recorded.
        """
        known = {} if prompt_form is None else {"prompt_form": prompt_form}
        return cls(
            name=model.name,
            folder=folder_of(name),
            hub=model.hub,
            fingerprint=model.base_fingerprint,
            layout=LayoutRecord(**asdict(model.layout)),
            **known,
        )


class DatasetRecord(Record):
    """What a run edited."""

    name: str
    """As it was asked for."""
    records: int
    """How many."""
    hash: str
    """See :func:`editcore.datasets.content_hash`."""


class StatisticsRecord(Record):
    """The text behind the second moments of a run."""

    corpus: str = ""
    """What identifies it."""
    tokens: int | None = None
    """How many were counted."""


@documented
class RunRecord(Record):
    """``run.json``: everything that decides the result of a run, and what the editor learnt from the unedited model."""

    config: RunConfig
    """What was asked for."""
    settings: Mapping[str, Mapping[str, Any]]
    """Every hyperparameter, by the name of editor, backend, extension, evaluator or data set."""
    dataset: DatasetRecord | None = None
    """The records that were edited; ``None`` for a directory that was begun without edits, or made from an adapter."""
    provenance: Mapping[str, Any]
    """What the editor learnt from the unedited model, such as its context templates."""
    model: ModelRecord
    """The unedited model."""
    statistics: StatisticsRecord = StatisticsRecord()
    """The text behind its second moments."""
    versions: Mapping[str, str]
    """Versions of the packages that the result depends on."""
    python: str | None = None
    """Version of Python."""
    platform: str | None = None
    """The machine, as Python names it."""
    seed: int | None = None
    """Seed of everything random."""
    notes: tuple[str, ...]
    """Sentences for the user."""
    composed_of: tuple[Path, ...] = ()
    """The run directories that its facts are from, if it was made of other runs."""
    command: str | None = None
    """The command line; ``None`` for a run made from Python."""
    started: str | None = None
    """When it began, in UTC."""

    @classmethod
    def read(cls, directory: Path | str) -> Self:
        """The record of a run directory.

        Raises:
            RunError: there is none, or it is damaged.
        """
        directory = Path(directory)
        path = directory / RUN_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            if directory.is_file():
                raise RunError(f"{directory} is a file, not a run directory.") from error
            raise RunError(
                f"{directory} is not a run directory: {RUN_NAME} cannot be read ({error.strerror})."
            ) from error
        except ValidationError as error:
            raise RunError(f"{path} is damaged: {first_problem(error)}.") from error

    def write(self, directory: Path | str) -> None:
        """Write ``run.json``: from here on the run can be resumed.

        Raises:
            StorageError: it cannot be written.
        """
        self.write_file(Path(directory) / RUN_NAME)

    @property
    def machine(self) -> Mapping[str, str]:
        """``python``, ``platform``, and when it ``started``, as far as they are known."""
        known = {"python": self.python, "platform": self.platform, "started": self.started}
        return {name: value for name, value in known.items() if value is not None}

    @property
    def source(self) -> str:
        """Where the model is loaded from."""
        folder, hub = self.model.folder, self.model.hub
        if folder is not None and Path(folder).is_dir():
            return folder
        return hub.id if folder is not None and hub is not None else self.config.model

    @property
    def session(self) -> SessionConfig:
        """The configuration of its session. All settings are as they were when the run began, even if a preset has
        changed since."""
        settings = {name: own for name, own in self.settings.items() if name in self.config.part_names}
        return self.config.session.model_copy(update={"preset": None, "settings": settings})

    @property
    def data(self) -> str:
        """Where its facts are from, for titles: the data set, or the runs that it was composed of."""
        names = [run.name for run in self.composed_of]
        if len(set(names)) < len(names):
            names = [str(run) for run in self.composed_of]
        return " + ".join(names) or short_name(self.config.dataset)

    def check(self, model: LanguageModel) -> None:
        """Refuse a model with other weights than the run's.

        Raises:
            RunError: the weights differ.
        """
        expected = self.model.fingerprint
        if model.base_fingerprint != expected:
            raise RunError(
                f"The model '{self.config.model}' is not the one of the run: its weights have the fingerprint "
                f"{model.base_fingerprint[:12]}, the run's base had {expected[:12]}."
            )

    def check_text(self, statistics: StatisticsStore) -> None:
        """Refuse second moments of another text than the run's.

        Raises:
            RunError: the texts differ.
        """
        text, was = statistics.corpus.identity(), self.statistics.corpus
        if was and text != was:
            raise RunError(
                f"The run's second moments are of the text {was}, and --corpus {self.config.corpus} with "
                f"--corpus-seed {self.config.corpus_seed} is {text} now; one run cannot mix edits solved with both. "
                "Restore the text, or start a new run with another --out."
            )


def learnt_before(
    directory: Path | str | None, resolved: Resolved, model: LanguageModel, *, seed: int
) -> Mapping[str, Any]:
    """What the editor learnt from the unedited model when the run in a directory began; empty if there is none, or if
    its model, its seed or the editor's settings are not these.

    Raises:
        RunError: the record of the run is damaged.
    """
    if directory is None or not (Path(directory) / RUN_NAME).exists():
        return {}
    record, editor = RunRecord.read(directory), resolved.editor.name
    own = resolved.settings.get(editor)
    now = (editor, {} if own is None else own.model_dump(mode="json"), seed, model.base_fingerprint)
    then = (record.config.editor, record.settings.get(editor, {}), record.seed, record.model.fingerprint)
    return record.provenance if now == then else {}


def read_requests(directory: Path | str) -> list[FactRecord]:
    """The records that the run began with.

    Raises:
        RunError: the file is not there, cannot be read, or is damaged.
    """
    path = Path(directory) / REQUESTS_NAME
    if not path.exists():
        raise RunError(f"{path} cannot be read ({os.strerror(errno.ENOENT)}).")
    return read_records(path, FactRecord)


def facts_of(directory: Path, ledger: Ledger) -> list[FactRecord]:
    """The records that the run began with, then the facts that were added since, with the probes that they have.

    Raises:
        RunError: the records cannot be read.
    """
    begun = read_requests(directory)
    known = {fact.request.id for fact in begun}
    added = {fact.request.id: fact for fact in read_added(directory)}
    edited = (
        request
        for entry in ledger.batches
        for request in (*entry.new_requests, *(left.request for left in entry.rejected))
    )
    return [
        *begun,
        *(
            added.get(request.id, FactRecord(request=request))
            for request in dict.fromkeys(edited)
            if request.id not in known
        ),
    ]


def active_facts(directory: Path, ledger: Ledger) -> list[FactRecord]:
    """The active facts of a directory, with the probes that they have.

    Raises:
        RunError: the records cannot be read.
    """
    records = {fact.request.id: fact for fact in facts_of(directory, ledger)}
    return [records[request.id] for request in ledger.facts()]
