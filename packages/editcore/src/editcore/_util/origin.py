"""The file ``editcore.json`` in a model folder that editcore wrote. It names the model that the folder was made
from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editcore._util.files import json_text, write_text

__all__ = ["PROVENANCE_FILE", "base_name", "read_object", "write_base"]

PROVENANCE_FILE = "editcore.json"
"""It is written last, so a folder that has it is complete."""


def write_base(directory: Path, name: str, fingerprint: str) -> None:
    """Record in the edited model's folder which model was edited.

    Args:
        name: name of the base model: a catalogue name, a hub id or a folder. For a folder that has a base itself, that
            base is written.
        fingerprint: fingerprint of the base's weights.
    """
    base = base_name(name) or (Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name)
    write_text(directory / PROVENANCE_FILE, json_text({"base": base, "base_fingerprint": fingerprint}, indent=2) + "\n")


def base_name(model: str) -> str | None:
    """The model that a folder was made from, if editcore wrote the folder (a catalogue model or an edited model).
    ``None`` for any other model."""
    path = Path(model).expanduser() / PROVENANCE_FILE
    found = read_object(path) if path.is_file() else {}
    name = found.get("base", found.get("name"))
    return name if isinstance(name, str) else None


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
