"""``run.json``: what a run was made with, written when it begins and read when it is opened again."""

from __future__ import annotations

import json
import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from editcore._util.files import json_text, write_text
from editcore.datasets import content_hash, short_name
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.values import FactRecord, first_problem
from editcore.models.catalogue import CATALOGUE
from editcore.plugins.registry import Plugins
from editcore.runs.config import RunConfig
from editcore.settings.hparams import HParams

if TYPE_CHECKING:
    from editcore.ledger.ledger import Ledger
    from editcore.models import LanguageModel
    from editcore.runs.session import EditSession
    from editcore.second_moments.statistics import StatisticsStore

__all__ = [
    "REQUESTS_NAME",
    "RUN_NAME",
    "RunRecord",
    "facts_of",
    "folder_of",
    "installed_versions",
    "recorded",
    "write_run",
]

_log = logging.getLogger(__name__)

RUN_NAME = "run.json"
REQUESTS_NAME = "requests.jsonl"
_VERSIONED = ("editcore", "torch", "transformers", "numpy", "pandas", "safetensors", "tokenizers")


def write_run(
    directory: Path,
    config: RunConfig,
    session: EditSession,
    records: Sequence[FactRecord],
    *,
    data_settings: Mapping[str, HParams] | None = None,
    command: Sequence[str] = (),
    notes: Sequence[str] = (),
    composed_of: Sequence[Path] = (),
) -> None:
    """Write ``run.json``: everything that decides the result, and what was learnt from the unedited model.

    Args:
        records: what the run edits.
        data_settings: hyperparameters of the data set, by its name.
        composed_of: the run directories that its facts are from, where it was made of other runs.
    """
    settings = {**session.settings, **(data_settings or {})}
    record = {
        "config": config.model_dump(mode="json"),
        "settings": {name: own.model_dump(mode="json") for name, own in settings.items()},
        "dataset": {"name": config.dataset, "records": len(records), "hash": content_hash(records)},
        "provenance": dict(session.provenance),
        "model": {
            "name": session.model.name,
            "folder": folder_of(config.model),
            "hub": None if session.model.hub is None else asdict(session.model.hub),
            "fingerprint": session.model.base_fingerprint,
            "layout": asdict(session.model.layout),
            "prompt_form": asdict(session.model.prompt_form),
        },
        "statistics": {
            "corpus": session.context.statistics.corpus.identity(),
            "tokens": session.context.statistics.tokens,
        },
        "versions": installed_versions(session.plugins),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seed": config.seed,
        "notes": list(notes),
        "composed_of": [str(run.resolve()) for run in composed_of],
        "command": shlex.join(command) if command else None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(directory / RUN_NAME, json_text(record, indent=2) + "\n")


def folder_of(model: str) -> str | None:
    """Where a model folder is, so that the run can be opened from any working directory; ``None`` for other models."""
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


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What ``run.json`` says of a run."""

    config: RunConfig
    """What was asked for."""
    settings: Mapping[str, Mapping[str, Any]]
    """Every hyperparameter, by the name of editor, backend, extension or data set."""
    model: Mapping[str, Any]
    """Name, folder if it is one, hub id and commit where they are known, fingerprint and layout."""
    versions: Mapping[str, str]
    """By package, of the code that the result depends on."""
    provenance: Mapping[str, Any]
    """What the editor learnt of the unedited model, such as its context templates."""
    notes: tuple[str, ...]
    """Sentences for the user."""
    command: str | None = None
    """The command line; ``None`` for a run made from Python."""
    machine: Mapping[str, str] = field(default_factory=dict)
    """``python``, ``platform``, and when it ``started``."""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """``corpus`` and ``tokens`` of its second moments."""
    composed_of: tuple[Path, ...] = ()
    """The run directories that its facts are from, if it was made of other runs."""

    @classmethod
    def read(cls, directory: Path | str) -> RunRecord:
        """The record of a run directory.

        Raises:
            RunError: there is none, or it is damaged.
        """
        directory = Path(directory)
        path = directory / RUN_NAME
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                config=RunConfig(**record["config"]),
                settings={name: dict(values) for name, values in record["settings"].items()},
                model={
                    "folder": None,
                    "hub": None,
                    **record["model"],
                    "fingerprint": str(record["model"]["fingerprint"]),
                },
                versions=dict(record["versions"]),
                provenance=dict(record["provenance"]),
                notes=tuple(map(str, record["notes"])),
                command=record.get("command"),
                machine={name: str(record[name]) for name in ("python", "platform", "started") if name in record},
                statistics=dict(record.get("statistics", {})),
                composed_of=tuple(map(Path, record.get("composed_of", ()))),
            )
        except OSError as error:
            if directory.is_file():
                raise RunError(f"{directory} is a file, not a run directory.") from error
            raise RunError(
                f"{directory} is not a run directory: {RUN_NAME} cannot be read ({error.strerror})."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(f"{path} is damaged: {' '.join(str(error).split())}.") from error

    @property
    def source(self) -> str:
        """Where the model is loaded from."""
        folder, hub = self.model["folder"], self.model["hub"]
        if isinstance(folder, str) and Path(folder).is_dir():
            return folder
        return str(hub["id"]) if folder is not None and hub is not None else self.config.model

    @property
    def data(self) -> str:
        """What its facts are of, for titles: the data set, or the runs that it was made of."""
        names = [run.name for run in self.composed_of]
        if len(set(names)) < len(names):
            names = [str(run) for run in self.composed_of]
        return " + ".join(names) or short_name(self.config.dataset)

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

    def check_text(self, statistics: StatisticsStore) -> None:
        """Refuse second moments of another text than the run's.

        Raises:
            RunError: they are.
        """
        text, was = statistics.corpus.identity(), self.statistics.get("corpus", "")
        if was and text != was:
            raise RunError(
                f"The run's second moments are of the text {was}, and --corpus {self.config.corpus} with "
                f"--corpus-seed {self.config.corpus_seed} is {text}; edits solved on both do not belong together. Give "
                "the text back its content, or start a new run with another --out."
            )

    def compare(self, session: EditSession) -> None:
        """Warn of what may keep a resumed run from giving the bits of an uninterrupted one.

        Raises:
            RunError: the model has other weights than the run's, or the second moments are of another text.
        """
        self.check(session.model)
        self.check_text(session.context.statistics)
        now = installed_versions(session.plugins)
        for name, version_then in self.versions.items():
            if now.get(name) != version_then:
                _log.warning("%s was %s when the run began and is %s now.", name, version_then, now.get(name))
        if json.loads(json_text(dict(session.provenance))) != self.provenance:
            _log.warning("What the editor learns from the unedited model is not what it was when the run began.")


def recorded(directory: Path | str) -> list[FactRecord]:
    """The records that the run began with."""
    directory = Path(directory)
    path = directory / REQUESTS_NAME
    try:
        return [FactRecord.model_validate_json(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise RunError(f"{path} is damaged ({first_problem(error)}).") from error


def facts_of(directory: Path, ledger: Ledger) -> list[FactRecord]:
    """The records that the run began with, and behind them the facts that a session added since.

    Raises:
        RunError: the records cannot be read.
    """
    begun = recorded(directory)
    known = {one.request.id for one in begun}
    edited = (
        one for entry in ledger.batches for one in (*entry.new_requests, *(left.request for left in entry.rejected))
    )
    return [*begun, *(FactRecord(request=one) for one in dict.fromkeys(edited) if one.id not in known)]
