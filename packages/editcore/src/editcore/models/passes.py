"""Forward passes that end or begin at a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from editcore.models.module_hooks import hooks

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["skip_first_blocks", "stop_after", "stop_before"]


class _Enough(Exception):  # noqa: N818  a signal, not an error
    """Ends a forward pass."""


@contextmanager
def stop_after(model: LanguageModel, layer: int) -> Iterator[None]:
    """Inside the ``with`` block, a forward pass ends once decoder block ``layer`` has run: no logits are computed."""

    def stop(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        raise _Enough

    with hooks() as handles, contextlib.suppress(_Enough):
        handles.append(model.block(layer).register_forward_hook(stop))
        yield


@contextmanager
def stop_before(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, a forward pass ends where ``module`` would run, after the hooks that read its
    inputs and were there before."""

    def stop(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        raise _Enough

    with hooks() as handles, contextlib.suppress(_Enough):
        handles.append(module.register_forward_pre_hook(stop))
        yield


@contextmanager
def skip_first_blocks(
    model: LanguageModel, count: int, replacement: Tensor | None, *, returns_tuple: bool
) -> Iterator[None]:
    """The first ``count`` decoder blocks return ``replacement`` and compute nothing.

    Args:
        replacement: input of block ``count``, ``[rows, seq, d_model]``; with ``None`` the blocks run as usual.
        returns_tuple: whether blocks of this model return a tuple.
    """
    if replacement is None:
        yield
        return

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return (replacement,) if returns_tuple else replacement

    blocks = [model.block(index) for index in range(count)]
    replaced = [block.__dict__.get("forward") for block in blocks]  # a forward set on the instance (accelerate does)
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block, earlier in zip(blocks, replaced, strict=True):
            if earlier is None:
                del block.forward
            else:
                block.forward = earlier
