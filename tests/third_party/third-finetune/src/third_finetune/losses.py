"""How far the model is from saying its targets.

Shapes: ``n`` requests, ``tokens`` target tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from editcore import EditRequest, LanguageModel
from editcore.models import join_continuation, logits_at, pad_rows
from torch import Tensor

__all__ = ["target_losses"]


def target_losses(model: LanguageModel, requests: Sequence[EditRequest]) -> Tensor:
    """Mean −log p over each request's target tokens, ``[n]``, differentiable."""
    prompts = [model.read_prompt(one.text)[0] for one in requests]
    joined = [
        join_continuation(model, one.text, ids, one.target_new) for one, ids in zip(requests, prompts, strict=True)
    ]
    input_ids, mask = pad_rows([ids[:-1] for ids, _ in joined], model.pad_id, device=model.device)
    wanted = [(row, at - 1, ids[at]) for row, (ids, start) in enumerate(joined) for at in range(start, len(ids))]
    rows, positions, tokens = torch.tensor(wanted, device=model.device).T
    logits = logits_at(model, input_ids, mask, rows, positions).float()  # [tokens, vocab]
    losses = torch.nn.functional.cross_entropy(logits, tokens.to(logits.device), reduction="none")
    lengths = [len(ids) - start for ids, start in joined]
    return torch.stack([part.mean() for part in torch.split(losses, lengths)])
