"""Reads the figures of a run or a sweep from its folder, for its report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from editcore.report.document import Picture

__all__ = ["FORGETTING_CURVE", "saved_pictures"]

FORGETTING_CURVE = "forgetting_curve"

_NAME = re.compile(r"[\w.+-]{1,80}")
_CAPTIONS: Mapping[str, str] = {
    FORGETTING_CURVE: "The forgetting curve: how much of earlier edits is left as more are made."
}


def saved_pictures(folder: Path) -> list[Picture]:
    """The PNG files of a folder, by name."""
    found = []
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
        content = path.read_bytes()
        if content.startswith(b"\x89PNG\r\n\x1a\n") and _NAME.fullmatch(path.stem):
            words = path.stem.replace("_", " ")
            found.append(Picture(name=path.stem, png=content, alt=_CAPTIONS.get(path.stem, f"Figure: {words}.")))
    return found
