"""Makes the report of a run, a sweep or an evaluation, and writes its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from editcore._util.files import remove_leftovers, replacing, write_text
from editcore._util.paths import check_writable
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.report.document import Document
from editcore.report.html import page
from editcore.report.markdown import summary
from editcore.runs.evaluation_record import EVALUATION_NAME
from editcore.runs.record import RUN_NAME
from editcore.runs.results import FIGURES_NAME
from editcore.sweeps import PLAN_NAME

__all__ = ["PAGE_NAME", "REPORT_NAME", "Report", "make_report"]

REPORT_NAME = "report"
PAGE_NAME = "index.html"
SUMMARY_NAME = "report.md"


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The files of a report."""

    directory: Path
    """The folder of the report."""
    page: Path
    """One HTML file that needs no other."""
    summary: Path
    """Markdown; its figures are in ``figures/`` beside it."""
    figures: tuple[Path, ...]
    """The pictures in it."""


def make_report(directory: Path | str, out: Path | str | None = None) -> Report:
    """Write the report of a run, a sweep or an evaluation. An earlier report is replaced.

    Args:
        out: the folder to write to; left out, ``report`` in ``directory``.

    Raises:
        RunError: there is no finished run, no sweep and no evaluation, one of its files is damaged, or ``out`` has
            something else in it.
        StorageError: a file cannot be written.
    """
    directory = Path(directory)
    out = None if out is None else Path(out)
    out = out or directory / REPORT_NAME
    writer = f"editcore {version('editcore')}"
    if (directory / PLAN_NAME).exists():
        from editcore.report.of_sweep import sweep_report

        document = sweep_report(directory, writer=writer, link_to=lambda path: _relative(path, out))
    elif (directory / EVALUATION_NAME).exists():
        from editcore.report.of_evaluation import evaluation_report

        document = evaluation_report(directory, writer=writer)
    elif (directory / RUN_NAME).exists():
        from editcore.report.of_run import run_report

        document = run_report(directory, writer=writer)
    else:
        raise RunError(
            f"{directory} is neither a run ({RUN_NAME} is not there) nor a sweep ({PLAN_NAME} is not there) nor an "
            f"evaluation ({EVALUATION_NAME} is not there); give a directory that 'editctl run', 'editctl sweep' or "
            "'editctl evaluate' wrote."
        )
    _refuse_foreign(out)
    return _write(document, out)


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()


def _refuse_foreign(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not (out / PAGE_NAME).exists():
        raise RunError(f"The output {out} is already there and is not a report; give another --out, or remove it.")
    if out.exists() and not out.is_dir():
        raise RunError(f"The output {out} is a file; give another --out.")
    check_writable(out)


def _write(document: Document, out: Path) -> Report:
    """Write the figures first and the page last, so that a page never lacks its figures."""
    figures = out / FIGURES_NAME
    for folder in (out, figures):
        remove_leftovers(folder)
    pictures = {figures / f"{picture.name}.png": picture.png for picture in document.pictures}
    for path, png in pictures.items():
        with replacing(path) as temporary:
            temporary.write_bytes(png)
    write_text(out / SUMMARY_NAME, summary(document))
    write_text(out / PAGE_NAME, page(document))
    return Report(directory=out, page=out / PAGE_NAME, summary=out / SUMMARY_NAME, figures=tuple(pictures))
