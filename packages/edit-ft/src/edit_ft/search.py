"""What ``editctl onboard`` tries for a new model: the layers that it proposes, then another learning rate."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from editcore import LanguageModel

__all__ = ["search"]

Settings = Mapping[str, Any]

_RATES = (2e-4, 2e-3)
"""Beside LocFT-BF's 5e-4. Small models need the larger one."""


def search(model: LanguageModel, layers: Sequence[int]) -> Generator[list[Settings], Settings, None]:
    """The rounds of the search; see ``editcore.onboarding``."""
    found = yield [{"layer": layer} for layer in layers]
    yield [{**found, "learning_rate": rate} for rate in _RATES]
