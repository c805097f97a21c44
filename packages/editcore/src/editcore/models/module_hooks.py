"""Hooks on modules that are always removed, and the hidden states that a module returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_tensor", "hooks", "replace_first"]


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a module's output, where they are alone or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def hooks() -> Iterator[list[torch.utils.hooks.RemovableHandle]]:
    """A list of hook handles that are removed at the end, exceptions included."""
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def replace_first(output: Any, tensor: Tensor) -> Any:
    """A module's output with other hidden states in place of its own."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor
