"""Helpers for tests, of this repository and of plugins: tiny models made in milliseconds, facts for them, and what
every editor, its presets, every backend and every executor have to pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editcore.testing._presets import check_presets
from editcore.testing._tiny import (
    TINY_FAMILIES,
    TINY_MOE_FAMILIES,
    three_facts,
    tiny_hf_model,
    tiny_model,
    tiny_requests,
    tiny_tokenizer,
)

if TYPE_CHECKING:
    from editcore.testing._contracts import BackendContract, EditorContract, ExecutorContract

__all__ = [
    "TINY_FAMILIES",
    "TINY_MOE_FAMILIES",
    "BackendContract",
    "EditorContract",
    "ExecutorContract",
    "check_presets",
    "three_facts",
    "tiny_hf_model",
    "tiny_model",
    "tiny_requests",
    "tiny_tokenizer",
]

if not TYPE_CHECKING:  # the suites need pytest, tiny models do not

    def __getattr__(name):
        if name not in {"BackendContract", "EditorContract", "ExecutorContract"}:
            raise AttributeError(f"module 'editcore.testing' has no attribute {name!r}")
        import pytest

        pytest.register_assert_rewrite("editcore.testing._contracts")
        from editcore.testing import _contracts

        return getattr(_contracts, name)
