"""What a GGUF file is: a model or an adapter. Read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
from editcore import ModelError

__all__ = ["field_of", "kind_of", "open_gguf"]


def kind_of(path: Path) -> Literal["adapter", "model"]:
    """Whether a GGUF file is a whole model or an adapter. Raises as :func:`open_gguf`."""
    return "adapter" if field_of(open_gguf(path).fields, gguf.Keys.General.TYPE) == gguf.GGUFType.ADAPTER else "model"


def open_gguf(path: Path) -> gguf.GGUFReader:
    """The metadata of a GGUF file, and where its tensors are.

    Raises:
        ModelError: there is no such file, or it is no GGUF file.
    """
    if not path.is_file():
        raise ModelError(f"There is no file '{path}'.")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(f"{path} is not a GGUF file, or is damaged: {' '.join(str(error).split())}.") from error


def field_of(fields: Mapping[str, Any], name: str) -> Any:
    """What the metadata says; ``None`` where it does not."""
    return fields[name].contents() if name in fields else None
