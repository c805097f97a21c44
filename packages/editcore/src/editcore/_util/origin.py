"""The file ``editcore.json`` of a model folder that editcore wrote: which model it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editcore._util.files import json_text, write_text

__all__ = ["PROVENANCE_FILE", "base_name", "read_object", "write_base"]

PROVENANCE_FILE = "editcore.json"
"""Written last; a folder that has it is complete."""


def write_base(directory: Path, name: str, fingerprint: str) -> None:
    """Write down which model was edited, into the edited model's folder.

    Args:
        name: of the base: a catalogue name, a hub id or a folder. For a folder that has a base, that base is written.
        fingerprint: of the base's weights.
    """
    base = base_name(name) or (Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name)
    write_text(directory / PROVENANCE_FILE, json_text({"base": base, "base_fingerprint": fingerprint}, indent=2) + "\n")


def base_name(model: str) -> str | None:
    """The model that a folder was made from, if editcore wrote the folder: a catalogue entry, or the edited model.
    ``None`` for any other model."""
    path = Path(model).expanduser() / PROVENANCE_FILE
    found = read_object(path) if path.is_file() else {}
    name = found.get("base", found.get("name"))
    return name if isinstance(name, str) else None


def read_object(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty if the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
