"""A run directory as a session or a model, with its edits applied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import FactRecord
from editcore.ledger.ledger import Ledger
from editcore.models import LanguageModel
from editcore.models.edited import EditedModel
from editcore.plugins.registry import Plugins
from editcore.runs.backends import open_backend, rebuild
from editcore.runs.config import RunConfig
from editcore.runs.parts import make_backend
from editcore.runs.record import RunRecord, recorded
from editcore.runs.session import EditSession
from editcore.second_moments.statistics import StatisticsStore

__all__ = ["make_session", "open_run", "open_session", "statistics_of"]


def make_session(
    config: RunConfig,
    directory: Path,
    record: RunRecord | None,
    plugins: Plugins,
    progress: Progress,
    *,
    records: Sequence[FactRecord] = (),
    model: LanguageModel | None = None,
) -> EditSession:
    """The session of a run in its directory, with what is there already.

    Args:
        record: of a run that was begun, whose settings are resolved, whatever presets say now.
        records: what the run edits.
        model: loaded unless given.
    """
    settings = {name: values for name, values in (record or config).settings.items() if name in config.part_names}
    source = config.model if record is None else record.source
    return EditSession.open(
        source if model is None else model,
        editor=config.editor,
        plugins=config.plugins,
        backend=config.backend,
        preset=config.preset if record is None else None,
        settings=settings,
        records=records,
        corpus=config.corpus,
        corpus_tokens=config.corpus_tokens,
        corpus_seed=config.corpus_seed,
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        chat_template=config.chat_template,
        evaluators=config.evaluators,
        directory=directory,
        registry=plugins,
        progress=progress,
    )


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
    backend, _ = make_backend(plugins.backend(config.backend), record.settings.get(config.backend, {}))
    model = LanguageModel.load(
        record.source,
        device=device or config.device,
        dtype=config.dtype,
        chat_template=config.chat_template if chat_template is None else chat_template,
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


def open_session(directory: Path | str, *, plugins: Plugins | None = None, progress: Progress = silent) -> EditSession:
    """The session of a run, with the extensions and settings that it had.

    Raises:
        RunError: as :func:`open_run`, or the second moments would be of another text than the run's.
    """
    directory = Path(directory)
    plugins = plugins or Plugins.load()
    record = RunRecord.read(directory)
    session = make_session(record.config, directory, record, plugins, progress, records=recorded(directory))
    record.check(session.model)
    record.check_text(session.context.statistics)
    return session


def statistics_of(config: RunConfig, model: LanguageModel, *, progress: Progress = silent) -> StatisticsStore:
    """The second moments that a run is made with: in the cache, or computed from ``model``, unedited."""
    return StatisticsStore(
        model, corpus=config.corpus, tokens=config.corpus_tokens, seed=config.corpus_seed, progress=progress
    )
