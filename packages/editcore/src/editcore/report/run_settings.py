"""Sections of a run's report about its making: counts, cost, settings, and how to make it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from editcore._util.files import json_text
from editcore._util.words import counted
from editcore.report.cells import seconds
from editcore.report.document import Block, Cell, Code, Column, Paragraph, Table, one_line
from editcore.report.results import RunResults
from editcore.settings.hparams import toml_lines

__all__ = ["cost", "extension_counts", "reproduction", "settings_by_owner", "settings_table"]


def extension_counts(run: RunResults) -> Iterator[Block]:
    """A table of the numbers that extensions and the backend keep; nothing if they keep none."""
    counts = [
        [owner, name.replace("_", " "), one_line("" if value is None else value)]
        for owner, values in run.summary.extensions.items()
        for name, value in values.items()
    ]
    if counts:
        yield Table(
            caption="Counts of extensions and the backend",
            columns=[Column("by"), Column("what"), Column("value")],
            rows=counts,
        )


def cost(run: RunResults) -> Iterator[Block]:
    """Memory, time per edit, and wall time by stage."""
    summary = run.summary
    per_edit = "" if summary.seconds_per_edit is None else f"{summary.seconds_per_edit:.2f} s per edit; "
    yield Paragraph(f"{per_edit}{summary.peak_memory_bytes / 2**30:.2f} GiB of memory at most.")
    times = {stage: time or 0.0 for stage, time in summary.seconds.items()}
    times["all"] = sum(times.values())
    yield Table(
        caption="Wall time by stage",
        columns=[Column("stage"), Column("time", number=True)],
        rows=[[stage, Cell(seconds(time), order=time)] for stage, time in times.items()],
    )


def settings_table(run: RunResults) -> Table:
    """Every setting of the run, and its owner."""
    config = run.record.config.model_dump(mode="json", exclude={"settings"})
    return settings_by_owner({"run": config, **run.record.settings})


def settings_by_owner(by_owner: Mapping[str, Mapping[str, Any]]) -> Table:
    """Settings with their owners, as a table."""
    return Table(
        caption="Every setting, with presets and defaults resolved",
        columns=[Column("setting"), Column("value"), Column("of")],
        rows=[
            [name, one_line(_readable(value)), owner]
            for owner, values in by_owner.items()
            for name, value in values.items()
        ],
        search=True,
        page_only=True,
    )


def reproduction(run: RunResults) -> Iterator[Block]:
    """The command or file that makes the run again, and the versions that it was made with."""
    record = run.record
    if record.command:
        yield Paragraph("The run was started with:")
        yield Code(record.command)
    else:
        yield Paragraph("The run was made from Python.")
    if record.composed_of:
        yield Paragraph(f"Its facts are those of {' and '.join(map(str, record.composed_of))}, solved together.")
    else:
        yield from _config_file(run)
    if more := run.edits[1]:
        yield Paragraph(f"A session added {counted(more, 'fact')} more, which these commands do not add again.")
    rows = [
        ("model", record.model.name or record.config.model),
        ("fingerprint of its weights", record.model.fingerprint),
        *record.machine.items(),
        *record.versions.items(),
    ]
    yield Table(
        caption="What it was made with",
        columns=[Column("what"), Column("which")],
        rows=[[one_line(name), one_line(value)] for name, value in rows],
    )


def _config_file(run: RunResults) -> Iterator[Block]:
    """The run as a file for ``editctl run --config``."""
    record = run.record
    yield Paragraph(
        "With this file, the following command makes the run again, even if presets and defaults have changed:"
    )
    values = record.config.model_dump(mode="json", exclude={"settings", "preset"})
    tables = "".join(f"\n[{owner}]\n{toml_lines(given)}" for owner, given in record.settings.items() if given)
    options = {name: value for name, value in values.items() if value not in (None, [])}
    yield Code(f"# run.toml\n{toml_lines(options)}{tables}".rstrip())
    yield Code("editctl run --config run.toml")


def _readable(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(one_line(_readable(part)) for part in value) or "none"
    if isinstance(value, str) and value != one_line(value):  # such as one with a line break
        return json_text(value)
    return "none" if value is None else value
