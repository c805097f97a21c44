"""Begins a run directory without an edit, for facts that are written into it day after day."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from editcore._util.files import remove_leftovers, write_text
from editcore._util.lock import locked
from editcore.interfaces.progress import Progress, silent
from editcore.ledger.ledger import write_ledger
from editcore.ledger.lines import HeaderLine
from editcore.plugins.registry import Plugins
from editcore.runs.config import RunConfig
from editcore.runs.record import REQUESTS_NAME, RunRecord
from editcore.runs.recording import record_of
from editcore.runs.resume import refuse_used

__all__ = ["begin"]


def begin(
    config: RunConfig,
    directory: Path | str,
    *,
    plugins: Plugins | None = None,
    progress: Progress = silent,
    command: Sequence[str] = (),
) -> RunRecord:
    """Make a run directory that has everything but edits: settings, second moments, and what the editor learns from the
    unedited model. Its data set, if the configuration names one, is not edited.

    Args:
        command: the command line, for the record.

    Raises:
        EditcoreError: as for :func:`editcore.runs.job.run`; nothing is written.
    """
    from editcore.runs.session import EditSession

    directory = Path(directory)
    plugins = plugins or Plugins.load()
    refuse_used(directory)
    with locked(directory):
        remove_leftovers(directory)
        session = EditSession.open(
            config.model, config.session, directory=directory, registry=plugins, progress=progress
        )
        record = record_of(session, config, records=None, command=command)
        write_text(directory / REQUESTS_NAME, "")
        header = HeaderLine(model=session.model.name, fingerprint=session.model.base_fingerprint, editor=config.editor)
        write_ledger(directory, [], header)
        record.write(directory)  # last: once it is there, the directory takes edits
        return record
