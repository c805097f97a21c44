"""Progress bars of transformers, switched off: editcore shows its own, or nobody is looking."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["quiet_transformers", "without_gguf_bar"]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers, inside the block only."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def without_gguf_bar() -> Iterator[None]:
    """No progress bar of the GGUF reader, inside the block only: it has no setting for that."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is not None:
        reader.tqdm = lambda tensors, **_options: tensors
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
