"""Texts as token ids, padded, and token ids as texts: the one place where the tokenizer reads a text.

Shapes: ``rows`` texts, ``seq`` their padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from editcore.interfaces.documented import documented

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "TokenSpans", "continuation_text", "decoded", "pad_rows", "shortened", "tokens_of"]

TokenSpans = tuple[tuple[int, int], ...]
"""For each token its first character and the one after its last; special tokens have (0, 0)."""

_SHOWN = 80
"""Characters of a text that a message shows."""


@documented
@dataclass(frozen=True, slots=True)
class Encoded:
    """Texts as tokens, padded on the right."""

    input_ids: Tensor
    """``[rows, seq]`` int64, on the model's device."""
    attention_mask: Tensor
    """``[rows, seq]`` int64, 1 at tokens and 0 at padding."""
    offsets: tuple[TokenSpans, ...]
    """Per row and token (without padding): first character and the one after the last; special tokens have (0, 0)."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool
) -> tuple[tuple[int, ...], TokenSpans]:
    """Ids of a text, and the characters of each token.

    Args:
        special_tokens: with those that the tokenizer puts in front (BOS). Those that it appends are left out.
    """
    encoded = tokenizer(
        text,
        add_special_tokens=special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if all(special):  # no token of a text separates those in front from those behind
        end = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"].index(0) if ids else 0
    else:
        end = max(place for place, is_special in enumerate(special) if not is_special) + 1
    return tuple(ids[:end]), tuple((int(first), int(last)) for first, last in encoded["offset_mapping"][:end])


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, *, device: torch.device, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """``(input_ids, attention_mask)``, both ``[rows, seq]`` int64, with at least one column."""
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(row, dtype=torch.long)
        mask[index, where] = 1
    return ids.to(device), mask.to(device)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of some ids, without special tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def continuation_text(tokenizer: PreTrainedTokenizerBase, row: Sequence[int], new: Sequence[int]) -> str:
    """The text of the new tokens behind a row.

    Both are decoded together, because some tokenizers drop the first space of what they decode alone.
    """
    before = decoded(tokenizer, row)
    whole = decoded(tokenizer, [*row, *new])
    return whole[len(before) :] if whole.startswith(before) else decoded(tokenizer, new)


def shortened(text: str) -> str:
    """A text in a message: quoted, in one line, and only the beginning of a long one."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
