"""Makes a run directory of an adapter folder: its edits one by one if it has them, else one batch of unknown facts."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from editcore import Changes, LanguageModel, LedgerEntry, LoadOptions, ModelError, Plugins, Progress
from editcore.ledger import DELTAS_NAME, LEDGER_NAME, HeaderLine, Ledger, write_ledger
from editcore.models import misfits
from editcore.runs import (
    REQUESTS_NAME,
    RUN_NAME,
    ModelRecord,
    RunConfig,
    RunRecord,
    default_editor,
    new_folder,
    refuse_existing,
    write_text,
)

from edit_lora.adapter import WEIGHTS_NAME, Adapter
from edit_lora.export import EDITS_FOLDER, ExportedRecord
from edit_lora.hparams import LoraHParams
from edit_lora.reading import edits_of

__all__ = ["ImportOptions", "Imported", "import_adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the adapter's files do not say, or what overrides them."""

    model: str | None = None
    """The base; ``None``: the one that the adapter names."""
    editor: str | None = None
    """The editor of further edits, for an adapter that names none; ``None``: the default for the model."""
    force: bool = False
    """Accept a base with another fingerprint, and adapter weights that differ from the exported ones."""


AS_THE_ADAPTER_SAYS = ImportOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import made."""

    batches: int
    edits: int
    """Facts that are known by name; 0 for an adapter that does not say what it changes."""
    model: str


def import_adapter(
    directory: Path,
    out: Path,
    *,
    options: ImportOptions = AS_THE_ADAPTER_SAYS,
    plugins: Plugins,
    progress: Progress,
) -> Imported:
    """Make a run directory of an adapter folder, its base checked by fingerprint.

    Raises:
        ModelError: there is no adapter, it was made for another base, or it makes a change that no edit can make: of
            one end of a tied weight alone.
        StorageError: ``out`` is there already, or cannot be written.
    """
    refuse_existing(out)
    if (directory / EDITS_FOLDER / RUN_NAME).exists():
        return _import_edits(directory, out, options=options, plugins=plugins, progress=progress)
    adapter = Adapter.read(directory)
    name = options.model or adapter.source
    if not name:
        raise ModelError(f"{directory} does not say which model it is for; name it with --model.")
    base = LanguageModel.load(name, families=plugins.family_paths(), progress=progress)
    adapter.check_base(base.name, base.base_fingerprint, force=options.force)
    changes = edits_of(adapter, base)
    editor = options.editor or default_editor(plugins, name)
    config = RunConfig(editor=editor, backend="lora", model=name, dataset=str(directory))
    plugins.editor(config.editor)
    entry = LedgerEntry(batch=0, requests=(), weights=(), num_new=0, changes=changes)
    record = RunRecord(
        config=config,
        settings={"lora": LoraHParams().model_dump(mode="json")},
        model=ModelRecord.of(base, name),
        provenance={},
        versions={},
        notes=(f"Imported from {directory}.",),
    )
    with new_folder(out) as folder:
        header = HeaderLine(model=base.name, fingerprint=base.base_fingerprint, editor=config.editor)
        write_ledger(folder, [entry], header)
        write_text(folder / REQUESTS_NAME, "")
        record.write(folder)
    return Imported(batches=1, edits=0, model=name)


def _import_edits(
    directory: Path, out: Path, *, options: ImportOptions, plugins: Plugins, progress: Progress
) -> Imported:
    inside = directory / EDITS_FOLDER
    record = ExportedRecord.read(inside)
    ledger = Ledger.read(inside)
    if not options.force:
        _check_weights(directory, None if record.exported is None else record.exported.adapter_sha256)
    name = options.model or record.source
    base = LanguageModel.load(
        name, LoadOptions(dtype=record.config.dtype), families=plugins.family_paths(), progress=progress
    )
    if base.base_fingerprint != record.model.fingerprint and not options.force:
        raise ModelError(
            f"The edits in {directory} were made on {record.config.model} with the fingerprint "
            f"{record.model.fingerprint[:12]}; {base.name} has {base.base_fingerprint[:12]}. Name their base with "
            "--model, or use --force to take this one."
        )
    entries = ledger.history()
    for entry in entries:
        _check_fit(entry.changes, base)
    header = HeaderLine(model=base.name, fingerprint=base.base_fingerprint, editor=record.config.editor)
    imported = record.model_copy(
        update={
            "config": record.config.model_copy(update={"model": options.model or record.config.model}),
            "model": ModelRecord.of(base, name),
        }
    )
    with new_folder(out) as folder:
        shutil.copytree(inside, folder, ignore=shutil.ignore_patterns(LEDGER_NAME, DELTAS_NAME), dirs_exist_ok=True)
        write_ledger(folder, entries, header)
        imported.write(folder)
    return Imported(batches=len(entries), edits=sum(entry.num_new for entry in entries), model=name)


def _check_weights(directory: Path, expected: str | None) -> None:
    try:
        found = hashlib.sha256((directory / WEIGHTS_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"{directory} is no adapter: {WEIGHTS_NAME} cannot be read ({error.strerror}).") from error
    if found != expected:
        raise ModelError(
            f"{directory / WEIGHTS_NAME} is not what the edits beside it were written as. --force takes the edits as "
            f"they are; to take the weights instead, remove {directory / EDITS_FOLDER}."
        )


def _check_fit(changes: Changes, model: LanguageModel) -> None:
    """Refuse changes that do not fit the model.

    Raises:
        ModelError: the model lacks one of the weights, or has it in another shape.
    """
    for name, found, expected in misfits(model, changes):
        raise ModelError(
            f"The edits change '{name}' as if it were {' by '.join(map(str, found))}; in {model.name} it is "
            f"{' by '.join(map(str, expected))} (out, in). They belong to another model."
        )
