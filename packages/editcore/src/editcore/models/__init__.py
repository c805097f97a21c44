"""Models: loading them, finding out where their MLPs are, and the catalogue of ready ones.

Loaded on first use: ``from editcore.models import CATALOGUE`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editcore.models._catalogue import CATALOGUE, DEFAULT_MODEL, CatalogueEntry, Wheel, local_path, pull
    from editcore.models._language_model import Encoded, LanguageModel
    from editcore.models._layout import CHECKS, ModelLayout, check_layout, detect_layout
    from editcore.models._prompt_form import PromptForm

__all__ = [
    "CATALOGUE",
    "CHECKS",
    "DEFAULT_MODEL",
    "CatalogueEntry",
    "Encoded",
    "LanguageModel",
    "ModelLayout",
    "PromptForm",
    "Wheel",
    "check_layout",
    "detect_layout",
    "local_path",
    "pull",
]

_HOMES = {
    "_catalogue": ("CATALOGUE", "DEFAULT_MODEL", "CatalogueEntry", "Wheel", "local_path", "pull"),
    "_language_model": ("Encoded", "LanguageModel"),
    "_layout": ("CHECKS", "ModelLayout", "check_layout", "detect_layout"),
    "_prompt_form": ("PromptForm",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
