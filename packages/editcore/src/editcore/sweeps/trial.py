"""Runs trials on a worker, one after the other, with one model in memory."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from editcore.figures.runs import draw_run
from editcore.interfaces.errors import RunError
from editcore.models import LanguageModel
from editcore.models.options import LoadOptions
from editcore.plugins.registry import Plugins
from editcore.plugins.versions import code_versions
from editcore.runs.config import RunConfig
from editcore.runs.job import RunOptions, run
from editcore.runs.resume import is_finished

__all__ = ["LOG_NAME", "Task", "TrialRunner"]

_log = logging.getLogger(__name__)

LOG_NAME = "trial.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A trial, as it is sent to a worker."""

    key: str
    config: RunConfig
    versions: Mapping[str, str]
    """Versions of the code with which the trial was planned."""
    records: str
    """Hash of the records with which it was planned."""
    home: Path | None
    """The sweep directory, if workers can see it; otherwise they work in a temporary directory of their machine."""
    command: tuple[str, ...] = ()


class TrialRunner:
    """Runs trials. Made once in each worker; the model stays loaded from one trial to the next."""

    def __init__(self) -> None:
        self._plugins = Plugins.load()
        self._versions = code_versions(self._plugins)  # now, because sources may change while this process runs
        self._model: LanguageModel | None = None
        self._loaded: tuple[str, LoadOptions] | None = None
        self._structure: Sequence[tuple[str, type]] = ()

    def __call__(self, task: Task) -> Mapping[str, bytes]:
        """Run a trial, or resume it.

        Returns:
            The files of its run directory by their relative paths, if the main process cannot see the directory.
        """
        self._check_code(task)
        if task.home is not None:
            self._run(task, task.home)
            return {}
        # Always the same folder, so that a trial that is tried again on the same machine is resumed.
        home = Path(tempfile.gettempdir()) / "editcore-trials"
        directory = self._run(task, home)
        files = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        shutil.rmtree(directory)
        return files

    def _run(self, task: Task, home: Path) -> Path:
        directory = home / "trials" / task.key
        if is_finished(directory):
            return directory
        with _logged(directory / LOG_NAME):
            model = self._model_of(task.config)
            try:
                run(
                    task.config,
                    directory,
                    RunOptions(
                        plugins=self._plugins,
                        command=task.command,
                        resume=True,
                        model=model,
                        shared=home / "shared",
                        records_hash=task.records,
                        draw=draw_run,
                    ),
                )
            except BaseException:
                self._model = None  # its state is unknown
                raise
            if not self._is_unedited(model):
                _log.warning("The model is not as it was before the trial; the next trial loads it anew.")
                self._model = None
        return directory

    def _check_code(self, task: Task) -> None:
        """Refuse other code than that of the plan."""
        for package, version in task.versions.items():
            if self._versions.get(package) != version:
                found = self._versions.get(package, "missing")
                raise RunError(
                    f"{package} is {found} where the trial runs, and was {version} when it was planned. Install the "
                    "same packages on every machine, or start the sweep again if they changed while it ran."
                )

    def _model_of(self, config: RunConfig) -> LanguageModel:
        wanted = (config.model, config.load_options)
        if self._model is None or self._loaded != wanted:
            self._model = None  # first: there may be no room for two
            self._model = LanguageModel.load(config.model, config.load_options, families=self._plugins.family_paths())
            self._loaded, self._structure = wanted, _structure(self._model)
            _ = self._model.base_fingerprint  # computed now, from the weights as they were loaded
        return self._model

    def _is_unedited(self, model: LanguageModel) -> bool:
        return _structure(model) == self._structure and model.fingerprint() == model.base_fingerprint


def _structure(model: LanguageModel) -> Sequence[tuple[str, type]]:
    """Every module and every hook with its class. It shows wrappers and hooks that were left in the model."""
    modules = list(model.hf.named_modules())
    hooks = [(name, type(hook)) for name, module in modules for hook in module._forward_hooks.values()]
    return [*((name, type(module)) for name, module in modules), *hooks]


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Write warnings to a file. On the terminal they would mix with those of other trials."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("editcore")
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)
        handler.close()
