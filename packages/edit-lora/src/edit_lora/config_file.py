"""``adapter_config.json`` as peft writes it, read without peft and torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from editcore import ModelError

__all__ = ["CONFIG_NAME", "read_config"]

CONFIG_NAME = "adapter_config.json"


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration of the LoRA adapter in a folder.

    Raises:
        ModelError: there is none, it is damaged, or it describes another kind of adapter.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{directory} is no adapter: {CONFIG_NAME} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{path} describes {found or 'no adapter'}; only LORA adapters can be read.")
    return config
