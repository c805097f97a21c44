"""How many tokens a model can read: limited where positions are in a table, not limited where they are computed."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["position_limit"]


def position_limit(hf: Any) -> int | None:
    """The most tokens of a row that the model's forward pass takes; ``None`` where it takes any number.

    Learned positions are a table with one row per position (GPT-2, GPT-Neo, OPT), and so are some rotary embeddings
    (GPT-J). MPT makes its attention biases for ``max_seq_len`` tokens. Other rotary embeddings and biases are computed
    for any number of tokens. There, ``max_position_embeddings`` is the length of the training texts and no limit.
    """
    asked = getattr(hf.config, "max_position_embeddings", None)
    if isinstance(asked, int) and any(rows == asked for rows in _tables(hf)):
        return asked
    made_for = getattr(hf.config, "max_seq_len", None)
    if isinstance(made_for, int) and "position_ids" not in inspect.signature(hf.forward).parameters:
        return made_for
    return None


def _tables(hf: Any) -> list[int]:
    """The number of rows of every table that may hold positions."""
    words = (hf.get_input_embeddings(), hf.get_output_embeddings())
    learned = [
        module.num_embeddings - getattr(module, "offset", 0)  # OPT keeps its first rows free
        for module in hf.modules()
        if isinstance(module, nn.Embedding) and all(module is not embedding for embedding in words)
    ]
    computed = [len(table) for name, table in hf.named_buffers() if name.rpartition(".")[2] == "embed_positions"]
    return learned + computed
