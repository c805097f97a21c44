"""Opens a run directory as a session or as a model, with the run's edits applied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from editcore.interfaces.progress import Progress, silent
from editcore.ledger.ledger import Ledger
from editcore.models import LanguageModel
from editcore.models.edited import EditedModel
from editcore.plugins.registry import Plugins
from editcore.runs.added import read_added
from editcore.runs.backends import open_backend, rebuild
from editcore.runs.parts import make_backend
from editcore.runs.record import RunRecord, read_requests
from editcore.runs.session import EditSession
from editcore.runs.statistics import statistics_of

__all__ = ["open_run", "open_session"]


def open_run(
    directory: Path | str,
    *,
    device: str | None = None,
    chat_template: bool | None = None,
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> tuple[EditedModel, Ledger]:
    """The model of a run with its edits applied, and the run's ledger.

    Args:
        chat_template: whether to put the chat template around prompts; left out, as the run did.

    Raises:
        RunError: there is no run, a file is damaged, or the model has other weights than the run's.
    """
    directory = Path(directory)
    plugins = plugins or Plugins.load()
    record = RunRecord.read(directory)
    config = record.config
    ledger = Ledger.read(directory)
    backend = make_backend(plugins.backend(config.backend), record.settings.get(config.backend, {}))
    model = LanguageModel.load(
        record.source,
        replace(
            config.load_options,
            device=device or config.device,
            chat_template=config.chat_template if chat_template is None else chat_template,
        ),
        families=plugins.family_paths(),
        progress=progress,
    )
    record.check(model)
    open_backend(
        backend,
        model,
        statistics=lambda: statistics_of(config, model, progress=progress),
        directory=directory,
    )
    edited = EditedModel(model, backend, spec=plugins.backend(config.backend), plugins=plugins)
    rebuild(edited, ledger)
    return edited, ledger


def open_session(
    directory: Path | str,
    record: RunRecord | None = None,
    *,
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> EditSession:
    """The session of a run, with the extensions and settings that it had.

    Args:
        record: of the run, if it was read already.

    Raises:
        RunError: as for :func:`open_run`; or the second moments are of another text than the run's.
    """
    directory = Path(directory)
    plugins = plugins or Plugins.load()
    record = record or RunRecord.read(directory)
    session = EditSession.open(
        record.source,
        record.session,
        records=[*read_requests(directory), *read_added(directory)],
        directory=directory,
        registry=plugins,
        progress=progress,
    )
    record.check(session.model)
    record.check_text(session.context.statistics)
    return session
