"""The record of a run, from its session; and what is otherwise when the run is resumed."""

from __future__ import annotations

import json
import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from editcore._util.files import json_text
from editcore.datasets import content_hash
from editcore.interfaces.values import FactRecord
from editcore.runs.config import RunConfig
from editcore.runs.record import DatasetRecord, ModelRecord, RunRecord, StatisticsRecord, installed_versions

if TYPE_CHECKING:
    from editcore.runs.session import EditSession
    from editcore.settings.hparams import HParams

__all__ = ["record_of", "warn_of_differences"]

_log = logging.getLogger(__name__)


def record_of(
    session: EditSession,
    config: RunConfig,
    *,
    records: Sequence[FactRecord] | None,
    data_settings: Mapping[str, HParams] | None = None,
    command: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> RunRecord:
    """The record of a run that begins now.

    Args:
        records: what the run edits; ``None`` for a directory that is begun without edits.
        data_settings: hyperparameters of the data set, by its name.
    """
    settings = {**session.settings, **(data_settings or {})}
    statistics = session.context.statistics
    return RunRecord(
        config=config,
        settings={name: hparams.model_dump(mode="json") for name, hparams in settings.items()},
        dataset=None
        if records is None
        else DatasetRecord(name=config.dataset, records=len(records), hash=content_hash(records)),
        provenance=dict(session.provenance),
        model=ModelRecord.of(session.model, config.model, prompt_form=session.model.prompt_form),
        statistics=StatisticsRecord(corpus=statistics.corpus.identity(), tokens=statistics.tokens),
        versions=installed_versions(session.plugins),
        python=platform.python_version(),
        platform=platform.platform(),
        seed=config.seed,
        notes=tuple(notes),
        composed_of=(),
        command=shlex.join(command) if command else None,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def warn_of_differences(record: RunRecord, session: EditSession) -> None:
    """Warn of differences through which a resumed run may not have the bits of an uninterrupted one.

    Raises:
        RunError: the model has other weights than the run's, or the second moments are of another text.
    """
    record.check(session.model)
    record.check_text(session.context.statistics)
    now = installed_versions(session.plugins)
    for name, version_then in record.versions.items():
        if now.get(name) != version_then:
            _log.warning("%s was %s when the run began and is %s now.", name, version_then, now.get(name))
    if json.loads(json_text(dict(session.provenance))) != record.provenance:
        _log.warning("The editor now learns something else from the unedited model than when the run began.")
