"""The records that a run edits. Imports no torch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from editcore._util.words import counted
from editcore.datasets import check_records, content_hash
from editcore.datasets.load import Selection, load
from editcore.interfaces.errors import EditcoreError, HParamsError, RunError
from editcore.interfaces.specs import EditorSpec
from editcore.interfaces.values import FactRecord
from editcore.plugins.registry import Plugins
from editcore.runs.config import RunConfig
from editcore.runs.fit import subject_refusal
from editcore.runs.record import RunRecord
from editcore.runs.resolved import editor_settings
from editcore.settings.hparams import HParams

__all__ = ["recorded_editor", "records_of", "refuse_other_records", "warn_of_other_records"]

_log = logging.getLogger(__name__)


def records_of(
    config: RunConfig, plugins: Plugins, *, leave_out_subjectless: bool = True
) -> tuple[list[FactRecord], list[str]]:
    """The records that a run edits, and notes on those that were left out.

    Args:
        leave_out_subjectless: whether records without a subject count as records that cannot be edited, if the editor
            needs one.

    Raises:
        DatasetError: they cannot be read, or none of them can be edited.
        HParamsError: there are fewer than ``config.edits``.
    """
    refuse = None
    if leave_out_subjectless:
        refuse = subject_refusal(plugins.editor(config.editor), editor_settings(plugins, config, config.model))
    selection = Selection(first=config.edits, strict=config.strict, refuse=refuse)
    loaded = load(config.dataset, plugins=plugins, settings=config.settings, selection=selection)
    records, notes = list(loaded.records), list(loaded.notes)
    if config.edits is not None and config.edits > len(records):
        editable = " that can be edited" if loaded.left_out else ""
        raise HParamsError(
            f"--edits {config.edits} is more than the data set '{config.dataset}' has; it has "
            f"{counted(len(records), 'record')}{editable}. {loaded.left_out}".rstrip()
        )
    if any(plugins.extension(name).settles_conflicts for name in config.plugins):
        return records, notes
    kept, more = check_records(records)
    return kept, [*notes, *more, *_several_facts(kept, config, plugins)]


def _several_facts(records: Sequence[FactRecord], config: RunConfig, plugins: Plugins) -> list[str]:
    """A sentence on subjects with several facts, if the editor writes at the subject."""
    if not plugins.editor(config.editor).capabilities.rewrites_subject:
        return []
    counts = Counter(record.request.subject_key for record in records if record.request.subject)
    several = [count for count in counts.values() if count > 1]
    if not several:
        return []
    have = "1 subject has" if len(several) == 1 else f"{len(several)} subjects have"
    return [
        f"{have} several facts, {sum(several)} of the {len(records)}. Facts with the same text up to the end of the "
        "subject share a value, which is optimised for all of them."
    ]


def recorded_editor(plugins: Plugins, record: RunRecord) -> tuple[EditorSpec, HParams | None]:
    """The editor of a run directory, and its hyperparameters as :func:`editor_settings` gives them."""
    config = record.config.model_copy(update={"settings": record.settings, "preset": None})
    return plugins.editor(config.editor), editor_settings(plugins, config, config.model)


def refuse_other_records(records: Sequence[FactRecord], planned: str, config: RunConfig) -> None:
    """Refuse records that are not the planned ones."""
    found = content_hash(records)
    if found != planned:
        raise RunError(
            f"The records of '{config.dataset}' are not the planned ones: their hash is {found[:12]}, and was "
            f"{planned[:12]} when the run was planned. Use the same data on every machine, or start the sweep again if "
            "the data changed while it ran."
        )


def warn_of_other_records(record: RunRecord, records: Sequence[FactRecord], plugins: Plugins) -> None:
    """Warn if the data set has changed since the run began. A data set that is gone is no problem."""
    try:
        now, _ = records_of(record.config.model_copy(update={"settings": record.settings}), plugins)
    except EditcoreError:
        return
    if content_hash(now) != content_hash(records):
        _log.warning(
            "The data set '%s' has other records now than when the run began. The run keeps the records that it "
            "began with.",
            record.config.dataset,
        )
