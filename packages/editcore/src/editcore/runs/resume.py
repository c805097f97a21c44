"""Whether a run directory may be begun, resumed, or neither."""

from __future__ import annotations

import shlex
from pathlib import Path

from editcore._util.lock import refuse_held
from editcore._util.paths import check_writable
from editcore.interfaces.errors import RunError
from editcore.ledger.file import LEDGER_NAME
from editcore.runs.config import RunConfig
from editcore.runs.record import RUN_NAME, RunRecord
from editcore.runs.results import SUMMARY_NAME

__all__ = [
    "has_begun",
    "is_finished",
    "refuse_finished",
    "refuse_unfinished",
    "refuse_unlike",
    "refuse_used",
    "resume_command",
]


def has_begun(directory: Path | str) -> bool:
    """Whether there is a run that can be opened; unless it is finished, it can be resumed."""
    directory = Path(directory)
    return (directory / RUN_NAME).exists()


def is_finished(directory: Path | str) -> bool:
    """Whether there is a run that was measured to its end."""
    directory = Path(directory)
    return has_begun(directory) and (directory / SUMMARY_NAME).exists()


def resume_command(directory: Path) -> str:
    """The command that resumes a run. It needs no other options, because everything is in the run's directory."""
    return shlex.join(["editctl", "run", "--resume", "--out", str(directory)])


def refuse_used(directory: Path) -> None:
    """Refuse to begin a run in a directory that has a run, that another process uses, or that cannot be written.

    Raises:
        RunError: the directory cannot be used.
    """
    if directory.exists() and not directory.is_dir():
        raise RunError(f"The output {directory} is a file; give a directory that does not exist yet.")
    refuse_held(directory)
    if is_finished(directory):
        raise RunError(f"{directory} already holds a finished run. Give another --out, or remove the directory.")
    if has_begun(directory):
        raise RunError(
            f"{directory} already holds a run that is not finished. Resume it with: {resume_command(directory)} "
            "(without other options), give another --out, or remove the directory."
        )
    if (directory / LEDGER_NAME).exists():
        raise RunError(
            f"{directory} already holds edits ({LEDGER_NAME} is there), but no run that could be resumed. Give "
            "another --out, or remove the directory."
        )
    # An error is found now rather than after the model is loaded and measured.
    check_writable(directory)


def refuse_unlike(record: RunRecord, config: RunConfig, directory: Path) -> None:
    """Refuse to resume a run that was begun with another configuration, or a directory that has no run.

    Raises:
        RunError: an option differs, or the directory was made without a data set.
    """
    if record.dataset is None:
        raise RunError(
            f"There is no run in {directory} to resume: it was made without a data set. 'editctl edit {directory}' "
            f"writes facts into it, and 'editctl check {directory}' measures them."
        )
    for name in RunConfig.model_fields:
        was, wanted = getattr(record.config, name), getattr(config, name)
        if was != wanted:
            option = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
            way_out = (
                f"It is finished. 'editctl edit {directory} --facts FILE' writes more facts into its model; for other "
                "settings, start a new run with another --out."
                if is_finished(directory)
                else "A resumed run takes everything from its run.json; leave the option out, or start a new run with "
                "another --out."
            )
            raise RunError(f"{option}: {wanted} was asked for, but the run in {directory} has {was}. {way_out}")


def refuse_finished(directory: Path) -> None:
    """Refuse to resume a run that is finished.

    Raises:
        RunError: the run is finished.
    """
    if is_finished(directory):
        raise RunError(
            f"The run in {directory} is finished; there is nothing to resume. "
            "'editctl generate RUN PROMPT' runs its model."
        )


def refuse_unfinished(directory: Path, record: RunRecord) -> None:
    """Refuse a directory whose run was interrupted: what the run does not have yet comes first.

    Raises:
        RunError: the run is not finished.
    """
    if record.dataset is not None and not is_finished(directory) and not record.composed_of:
        raise RunError(f"The run in {directory} is not finished. Resume it first, with: {resume_command(directory)}")
