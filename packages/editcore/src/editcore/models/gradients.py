"""For editors that learn by gradients: the loss of targets, and weights that autograd follows.

Shapes: ``n`` requests, ``seq`` tokens of the longest, ``num_scored`` target tokens of all of them, ``vocab``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import ModelError, RequestError
from editcore.models.encoding import pad_rows
from editcore.models.forward import logits_at
from editcore.models.tokens import join_continuation
from editcore.models.weights import split_address

if TYPE_CHECKING:
    from editcore.interfaces.values import EditRequest
    from editcore.models import LanguageModel

__all__ = ["TargetTokens", "asking_for_gradients", "target_losses", "target_tokens"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTokens:
    """Prompts with their targets as padded rows of tokens, and the place where each target token is predicted."""

    input_ids: Tensor
    """``[n, seq]``, without the last token of each target, which is only predicted."""
    mask: Tensor
    """``[n, seq]``, 1 at tokens and 0 at padding."""
    rows: Tensor
    """The row of each target token, ``[num_scored]``."""
    positions: Tensor
    """The position whose logits predict it, ``[num_scored]``."""
    tokens: Tensor
    """Its id, ``[num_scored]``."""
    lengths: tuple[int, ...]
    """The number of tokens of each target."""

    def losses(self, model: LanguageModel) -> Tensor:
        """Mean −log p over the tokens of each target, in nats, ``[n]``, from one forward pass."""
        logits = logits_at(model, self.input_ids, self.mask, self.rows, self.positions).float()  # [num_scored, vocab]
        losses = torch.nn.functional.cross_entropy(logits, self.tokens.to(logits.device), reduction="none")
        return torch.stack([part.mean() for part in torch.split(losses, list(self.lengths))])


def target_tokens(model: LanguageModel, requests: Sequence[EditRequest], *, ended: bool = False) -> TargetTokens:
    """The targets of requests behind their prompts, as tokens.

    Args:
        ended: with the token that ends a text behind each target; in a chat, the one that ends an answer. It is left
            out behind a target that fills the model's positions.

    Raises:
        RequestError: there is no request, a prompt or a target has no token, or they are longer than the model's
            positions.
        ModelError: the tokenizer has no token that ends a text.
    """
    if not requests:
        raise RequestError("The batch is empty; give it a request.")
    end = (_end_id(model),) if ended else ()
    joined = []
    for request in requests:
        asked = model.asked(request.text)
        prompt_ids, _ = model.read_prompt(asked)
        ids, start = join_continuation(model, asked, prompt_ids, request.target_new, join=request.join)
        if start == 0 or start >= len(ids):
            raise RequestError(f"'{request.text}' → '{request.target_new}': a prompt and a target need a token each.")
        full = model.positions is not None and len(ids) > model.positions
        joined.append((ids if full else (*ids, *end), start))
    input_ids, mask = pad_rows([ids[:-1] for ids, _ in joined], model.pad_id, device=model.device)
    wanted = [(row, at - 1, ids[at]) for row, (ids, start) in enumerate(joined) for at in range(start, len(ids))]
    rows, positions, tokens = torch.tensor(wanted, device=model.device).T
    return TargetTokens(
        input_ids=input_ids,
        mask=mask,
        rows=rows,
        positions=positions,
        tokens=tokens,
        lengths=tuple(len(ids) - start for ids, start in joined),
    )


def _end_id(model: LanguageModel) -> int:
    if model.prompt_form.end:
        return int(model.tokenizer.convert_tokens_to_ids(model.prompt_form.end))
    if model.tokenizer.eos_token_id is None:
        raise ModelError(f"The tokenizer of {model.name} has no token that ends a text, and one was asked for.")
    return int(model.tokenizer.eos_token_id)


def target_losses(model: LanguageModel, requests: Sequence[EditRequest], *, ended: bool = False) -> Tensor:
    """Mean −log p over the tokens of each request's target behind its prompt, in nats, ``[n]``.

    All requests go through the model in one forward pass. Gradients flow unless the caller forbids them. Where none are
    needed, :func:`editcore.evaluation.score_targets` takes any number of prompts.

    Args:
        ended: as in :func:`target_tokens`.

    Raises:
        RequestError, ModelError: as :func:`target_tokens`.
    """
    return target_tokens(model, requests, ended=ended).losses(model)


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
