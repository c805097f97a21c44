"""Perplexity of a text: the usual check that an edit left the rest of the model alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from editcore._util.memory import in_halves
from editcore.evaluation.scoring import token_losses
from editcore.interfaces.errors import RequestError
from editcore.interfaces.progress import Progress, silent
from editcore.models.forward import logits_at
from editcore.models.planning import PassBudget

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["WINDOW", "perplexity"]

WINDOW = 512
"""Tokens of one forward pass by default."""

Ids = tuple[int, ...]


def perplexity(
    model: LanguageModel,
    text: str | Sequence[int],
    *,
    window: int = WINDOW,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> float:
    """exp of the mean negative log-likelihood per token of ``text``, in float64 over float32 logits.

    The text is cut into windows of ``window`` tokens that do not overlap. If the tokenizer puts a token in front of a
    text (BOS), every window begins with it; it is one of the ``window`` tokens and is not predicted. Otherwise a
    window's first token is context only. Numbers can be compared between models with the same tokenizer and for the
    same ``window``.

    With a large vocabulary, logits are made for a part of a window at a time, never more numbers than
    :attr:`editcore.models.PassBudget.logits`.

    Args:
        text: a text, or its token ids without special tokens.
        window: tokens of one forward pass, at most what the model was made to read.
        max_tokens: use the first tokens of the text only.

    Raises:
        RequestError: the text has no token to predict, or a window is too short to predict one.
    """
    prefix = model.opening_ids
    ids: Ids = (model.read_text(text) if isinstance(text, str) else tuple(text))[:max_tokens]
    limits = (model.positions, getattr(model.hf.config, "max_position_embeddings", None))
    size = min([window, *(limit for limit in limits if isinstance(limit, int))]) - len(prefix)
    if size + len(prefix) < 2 or size < 1:
        raise RequestError(f"A window of {window} tokens is too short to predict one; give at least 2.")
    windows: list[Ids] = [prefix + ids[start : start + size] for start in range(0, len(ids), size)]
    windows = [row for row in windows if len(row) > 1]
    if not windows:
        raise RequestError("The text for perplexity has no token to predict; give a longer one.")
    places = PassBudget.forward(model).positions()

    def loss(part: Sequence[int]) -> list[float]:
        return _losses(model, row, part)

    total: list[float] = []
    with torch.inference_mode(), progress.task("Perplexity", len(windows)) as advance:
        for row in windows:
            for part in _parts(len(row) - 1, places):
                total += in_halves(loss, part)
            advance(1)
    return math.exp(math.fsum(total) / len(total))


def _parts(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _losses(model: LanguageModel, row: Ids, places: Sequence[int]) -> list[float]:
    """−log p of the token after each of ``places`` in a row. Tokens after the last place are left out, as the model is
    causal."""
    input_ids = torch.tensor([row[: places[-1] + 1]], device=model.device)
    positions = torch.tensor(places, device=model.device)
    logits = logits_at(model, input_ids, None, torch.zeros_like(positions), positions).float()  # [slots, vocab]
    tokens = torch.tensor([row[place + 1] for place in places], device=logits.device)
    losses, _ = token_losses(logits, torch.arange(len(places), device=logits.device), tokens)
    return losses.tolist()
