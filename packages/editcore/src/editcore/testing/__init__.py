"""Helpers for tests, of this repository and of plugins: tiny models made in milliseconds, and facts for them."""

from __future__ import annotations

from editcore.testing._tiny import (
    TINY_FAMILIES,
    TINY_MOE_FAMILIES,
    three_facts,
    tiny_hf_model,
    tiny_model,
    tiny_requests,
    tiny_tokenizer,
)

__all__ = [
    "TINY_FAMILIES",
    "TINY_MOE_FAMILIES",
    "three_facts",
    "tiny_hf_model",
    "tiny_model",
    "tiny_requests",
    "tiny_tokenizer",
]
