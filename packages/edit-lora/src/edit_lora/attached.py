"""Adapters that are attached to a run directory: a copy of each in ``adapters/NAME``, and a list of their strengths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from editcore import HParamsError, RunError, UnknownNameError
from editcore.runs import RunRecord, json_text, new_folder, write_text

from edit_lora.adapter import ORIGIN_NAME, WEIGHTS_NAME, Adapter
from edit_lora.config_file import CONFIG_NAME

__all__ = ["KeptAdapter", "check_attachable", "keep", "read_attached", "remove", "rescale"]

_FOLDER = "adapters"
_LIST = "attached.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAdapter:
    """One adapter in the list of a run directory."""

    directory: Path
    source: str
    """The folder it was copied from."""
    scale: float
    forced: bool
    """True if it was attached although it was made for another base."""

    def adapter(self) -> Adapter:
        """Read its factors."""
        return Adapter.read(self.directory)


def read_attached(run: Path) -> dict[str, KeptAdapter]:
    """The adapters of a run directory by name, in the order in which they were attached; empty if it has none.

    Raises:
        RunError: the list is damaged.
    """
    path = run / _FOLDER / _LIST
    if not path.exists():
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return {name: KeptAdapter(directory=run / _FOLDER / name, **kept) for name, kept in listed.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged: {' '.join(str(error).split())}.") from error


def check_attachable(run: Path, adapter: Adapter, *, force: bool) -> None:
    """Refuse a run that cannot hold the adapter, before anything is copied.

    Raises:
        RunError: there is no run, or it keeps its edits in the weights.
        ModelError: the adapter was made for another base (``force`` overrides).
    """
    record = RunRecord.read(run)
    if record.config.backend != "lora":
        raise RunError(
            f"{run} has the backend '{record.config.backend}', which holds no adapters beside the edits. Attach to a "
            "run that was made with --plugin lora; 'editctl export' and 'editctl import' turn this one into such a run."
        )
    adapter.check_base(record.config.model, record.model.fingerprint, force=force)


def keep(run: Path, name: str, source: Path, *, scale: float, forced: bool) -> None:
    """Copy an adapter into a run directory and list it.

    Raises:
        HParamsError: the name is taken.
        StorageError: the copy cannot be written.
    """
    listed = read_attached(run)
    if name in listed:
        raise HParamsError(f"{run} already has an adapter '{name}'; give another --name, or detach that one.")
    target = run / _FOLDER / name
    shutil.rmtree(target, ignore_errors=True)  # what a crash left between the copy and the list
    with new_folder(target) as folder:
        for file in (CONFIG_NAME, WEIGHTS_NAME, ORIGIN_NAME):
            if (source / file).exists():
                shutil.copyfile(source / file, folder / file)
    kept = KeptAdapter(directory=target, source=str(source), scale=scale, forced=forced)
    _write(run, {**listed, name: kept})


def rescale(run: Path, name: str, scale: float) -> None:
    """Change the strength of an attached adapter.

    Raises:
        UnknownNameError: there is none of that name.
    """
    listed = read_attached(run)
    _write(run, {**listed, name: replace(_find(listed, name), scale=scale)})


def remove(run: Path, name: str) -> None:
    """Detach an adapter from a run directory, and delete its copy.

    Raises:
        UnknownNameError: there is none of that name.
    """
    listed = read_attached(run)
    gone = _find(listed, name)
    _write(run, {other: kept for other, kept in listed.items() if other != name})
    shutil.rmtree(gone.directory, ignore_errors=True)


def _find(listed: Mapping[str, KeptAdapter], name: str) -> KeptAdapter:
    if name not in listed:
        raise UnknownNameError("adapter", name, listed)
    return listed[name]


def _write(run: Path, listed: Mapping[str, KeptAdapter]) -> None:
    record = {}
    for name, kept in listed.items():
        fields = asdict(kept)
        del fields["directory"]
        record[name] = fields
    write_text(run / _FOLDER / _LIST, json_text(record, indent=2) + "\n")
