"""How surprised a model is by text: the usual check that an edit left the rest of the model alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from editcore._errors import RequestError
from editcore._forward import logits_at
from editcore._progress import Progress, silent
from editcore.evaluation._scoring import token_losses

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["perplexity"]


def perplexity(
    model: LanguageModel, text: str, *, window: int = 512, max_tokens: int | None = None, progress: Progress = silent
) -> float:
    """exp of the mean negative log-likelihood per token of ``text``.

    The text is cut into windows of ``window`` tokens that do not overlap. Where the tokenizer puts a token in front of
    a text (BOS), it stands in front of every window; otherwise a window's first token is context only. Numbers compare
    between models with one tokenizer and for one ``window``.

    Args:
        window: tokens of one forward pass, at most what the model reads.
        max_tokens: use the first tokens of the text only.

    Raises:
        RequestError: the text has no token to predict.
    """
    prefix = _prefix(model)
    ids = tuple(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[:max_tokens]
    limit = getattr(model.hf.config, "max_position_embeddings", None)
    size = (min(window, limit) if isinstance(limit, int) else window) - len(prefix)
    windows = [prefix + ids[start : start + size] for start in range(0, len(ids), size)]
    windows = [row for row in windows if len(row) > 1]
    if not windows:
        raise RequestError("The text for perplexity has no token to predict; give a longer one.")
    total, count = 0.0, 0
    with torch.inference_mode(), progress.task("Perplexity", len(windows)) as advance:
        for row in windows:
            total += _loss(model, row)
            count += len(row) - 1
            advance(1)
    return math.exp(total / count)


def _prefix(model: LanguageModel) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts in front of a text."""
    with_special = list(model.tokenizer("a")["input_ids"])
    alone = list(model.tokenizer("a", add_special_tokens=False)["input_ids"])
    start = next(i for i in range(len(with_special)) if with_special[i : i + len(alone)] == alone)
    return tuple(with_special[:start])


def _loss(model: LanguageModel, row: tuple[int, ...]) -> float:
    input_ids = torch.tensor([row[:-1]], device=model.device)
    positions = torch.arange(len(row) - 1, device=model.device)
    logits = logits_at(model, input_ids, None, torch.zeros_like(positions), positions).float()
    losses, _ = token_losses(logits, positions.to(logits.device), torch.tensor(row[1:], device=logits.device))
    return float(losses.sum())
