"""How far an edit moved a model's next-token distributions, on prompts that it is not about.

Shapes: ``texts`` prompts, ``vocab``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore._util.memory import in_halves
from editcore.models.encoding import pad_rows
from editcore.models.forward import logits_at
from editcore.models.planning import PassBudget, plan_passes

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["kl_divergences", "log_probabilities_after", "next_token_log_probabilities"]


def next_token_log_probabilities(model: LanguageModel, prompts: Sequence[str]) -> Tensor:
    """log p(token | prompt) after each prompt, in the order given: ``[texts, vocab]``, float64 on the CPU.

    There must be at least one prompt.
    """
    return log_probabilities_after(model, [model.read_prompt(model.asked(prompt))[0] for prompt in prompts])


def log_probabilities_after(model: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """:func:`next_token_log_probabilities` after token ids, of which no row is empty."""
    found: dict[int, Tensor] = {}

    def run(chunk: Sequence[int]) -> list[tuple[int, Tensor]]:
        ids, mask = pad_rows([rows[index] for index in chunk], model.pad_id, device=model.device)
        last = torch.tensor([len(rows[index]) - 1 for index in chunk], device=model.device)
        logits = logits_at(model, ids, mask, torch.arange(len(chunk), device=model.device), last)
        return list(zip(chunk, logits.cpu().double().log_softmax(-1), strict=True))

    with torch.inference_mode():
        for chunk in plan_passes([len(row) for row in rows], PassBudget.forward(model), scored=[1] * len(rows)):
            found |= in_halves(run, chunk)
        return torch.stack([found[index] for index in range(len(rows))])


def kl_divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q) in nats, row by row: ``[texts]``.

    Args:
        before: log p, ``[texts, vocab]``.
        after: log q, ``[texts, vocab]``.
    """
    # A token with p = 0 adds nothing, whatever its q.
    terms = torch.where(before > -torch.inf, before.exp() * (before - after), torch.zeros_like(before))
    return terms.sum(-1).clamp_min(0.0)
