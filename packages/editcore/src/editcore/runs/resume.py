"""Whether a run directory may be begun, resumed, or neither."""

from __future__ import annotations

from pathlib import Path

from editcore._util.paths import check_writable
from editcore.interfaces.errors import RunError
from editcore.ledger.ledger import LEDGER_NAME
from editcore.runs.config import RunConfig
from editcore.runs.record import RUN_NAME, RunRecord
from editcore.runs.results import SUMMARY_NAME

__all__ = ["has_begun", "is_finished", "refuse_unlike", "refuse_used"]


def has_begun(directory: Path) -> bool:
    """Whether there is a run that can be opened, and resumed unless it is finished."""
    return (directory / RUN_NAME).exists()


def is_finished(directory: Path) -> bool:
    """Whether there is a run that was measured to its end."""
    return has_begun(directory) and (directory / SUMMARY_NAME).exists()


def refuse_used(directory: Path) -> None:
    """Refuse to begin a run where one is, or where none can be written.

    Raises:
        RunError: it is so.
    """
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


def refuse_unlike(record: RunRecord, config: RunConfig, directory: Path) -> None:
    """Refuse to resume a run that is finished, or that was begun with another configuration.

    Raises:
        RunError: it is so.
    """
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
