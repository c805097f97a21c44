"""For editors that learn by gradients: the loss of targets, and weights that autograd follows.

Shapes: ``n`` requests, ``num_scored`` target tokens of all of them, ``vocab``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore.interfaces.errors import RequestError
from editcore.models.encoding import pad_rows
from editcore.models.forward import logits_at
from editcore.models.tokens import join_continuation
from editcore.models.weights import split_address

if TYPE_CHECKING:
    from editcore.interfaces.values import EditRequest
    from editcore.models import LanguageModel

__all__ = ["asking_for_gradients", "target_losses"]


def target_losses(model: LanguageModel, requests: Sequence[EditRequest]) -> Tensor:
    """Mean −log p over the tokens of each request's target behind its prompt, in nats, ``[n]``.

    All requests go through the model in one forward pass. Gradients flow unless the caller forbids them. Where none are
    needed, :func:`editcore.evaluation.score_targets` takes any number of prompts.

    Raises:
        RequestError: there is no request, a prompt or a target has no token, or they are longer than the model's
            positions.
    """
    if not requests:
        raise RequestError("The batch is empty; give it a request.")
    joined = []
    for request in requests:
        asked = model.asked(request.text)
        prompt_ids, _ = model.read_prompt(asked)
        ids, start = join_continuation(model, asked, prompt_ids, request.target_new, join=request.join)
        if start == 0 or start >= len(ids):
            raise RequestError(f"'{request.text}' → '{request.target_new}': a prompt and a target need a token each.")
        joined.append((ids, start))
    input_ids, mask = pad_rows([ids[:-1] for ids, _ in joined], model.pad_id, device=model.device)
    wanted = [(row, at - 1, ids[at]) for row, (ids, start) in enumerate(joined) for at in range(start, len(ids))]
    rows, positions, tokens = torch.tensor(wanted, device=model.device).T
    logits = logits_at(model, input_ids, mask, rows, positions).float()  # [num_scored, vocab]
    losses = torch.nn.functional.cross_entropy(logits, tokens.to(logits.device), reduction="none")
    return torch.stack([part.mean() for part in torch.split(losses, [len(ids) - start for ids, start in joined])])


@contextmanager
def asking_for_gradients(model: LanguageModel, addresses: Sequence[str]) -> Iterator[list[Tensor]]:
    """The weights at these addresses, with ``requires_grad`` inside the block only.

    For a slice of a stacked parameter the whole parameter is given, because only that is a leaf of autograd.

    Raises:
        ModelError: the model has no such weight.
    """
    weights = [model.weight(split_address(address)[0]) for address in addresses]
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield weights
    finally:
        for weight, asked in zip(weights, before, strict=True):
            weight.requires_grad_(asked)
