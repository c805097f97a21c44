"""The loss of the values that are optimised side by side, one forward pass at a time.

    L(δ) = mean over the value's facts of Σ over contexts c of share_c · (1/T) Σₜ −log p(target_t | …; δ)
         + kl_factor · KL( p_δ(· | essence prompt) ‖ p(· | essence prompt) )
         + v_context_factor · mean over the value's facts of Σ over pairs of contexts of ‖h_a − h_b‖² / d_model

The weight decay of δ needs no pass; the optimiser adds it.

Shapes: ``rows`` of a pass, ``values`` optimised now, ``tokens`` scored target tokens, ``essences`` essence rows.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editcore.locate_then_edit.prepared_rows import PreparedRows, logits_with_delta
from editcore.locate_then_edit.token_rows import ESSENCE, FactRows, RowName
from editcore.models.capture import outputs_at

if TYPE_CHECKING:
    from editcore.locate_then_edit.hparams import LocateThenEditHParams
    from editcore.models import LanguageModel

__all__ = ["LossPass", "PassLosses", "VocabularyLosses", "loss_pass", "pass_losses", "spread_parts"]

_LOGITS_PER_CHUNK = 2**21
"""Losses are computed for this many logits at a time, to bound memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPass:
    """The rows of one pass, and how each row contributes to the loss of its value."""

    prepared: PreparedRows
    row_value: Tensor
    """``[rows]`` index of the row's value among the active values."""
    row_fact: Tensor
    """``[rows]`` number of the row's fact."""
    row_context: Tensor
    """``[rows]`` number of the row's context."""
    row_share: Tensor
    """``[rows]`` weight of the row in the mean over facts and contexts, 0 for an essence row."""
    row_pair_share: Tensor
    """``[rows]`` weight of the row's part of the spread over contexts."""
    token_row: Tensor
    """``[tokens]`` row of each scored target token."""
    token_position: Tensor
    """``[tokens]`` column of the prepared ids from which it is predicted."""
    token_label: Tensor
    """``[tokens]`` its id."""
    token_share: Tensor
    """``[tokens]`` 1 / T of its row."""
    essence_row: Tensor
    """``[essences]``"""
    essence_position: Tensor
    """``[essences]`` column that the essence term reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLosses:
    """The losses of one pass."""

    losses: Tensor
    """The part of each value's loss that comes from the rows of the pass, ``[values]``, differentiable."""
    nll: Tensor
    """Mean −log p of the target, for each row with a target, ``[targets]``."""
    nll_fact: Tensor
    """``[targets]`` number of the row's fact."""
    nll_context: Tensor
    """``[targets]`` number of the row's context."""
    first_choice: Tensor | None
    """``[targets]`` whether each token of the target is the most probable one; ``None`` if nothing asks for it."""


def loss_pass(
    prepared: PreparedRows,
    names: Sequence[RowName],
    facts: Sequence[FactRows],
    *,
    active: Sequence[Sequence[int]],
    shares: Sequence[float],
    pair_share: float,
) -> LossPass:
    """The pass over the rows ``names``.

    Args:
        facts: the rows of every fact.
        active: for each active value, the numbers of its facts.
        shares: weight of each context in the mean over contexts.
        pair_share: weight of each pair of contexts in the sum over pairs.
    """
    places = {fact: place for place, members in enumerate(active) for fact in members}
    lists: dict[str, list[float]] = {name: [] for name in LossPass.__slots__ if name != "prepared"}
    for index, (fact, context) in enumerate(names):
        row, place = facts[fact].row(context), places[fact]
        start = row.lookup if prepared.edited is not None else 0  # the token that column 0 of the prepared ids holds
        lists["row_value"].append(place)
        lists["row_fact"].append(fact)
        lists["row_context"].append(context)
        lists["row_share"].append(shares[context] / len(active[place]) if context != ESSENCE else 0.0)
        lists["row_pair_share"].append(pair_share / len(active[place]))
        if context == ESSENCE:
            lists["essence_row"].append(index)
            lists["essence_position"].append(len(row.ids) - 1 - start)
        for offset, label in enumerate(row.targets):
            lists["token_row"].append(index)
            lists["token_position"].append(row.target_start - 1 + offset - start)
            lists["token_label"].append(label)
            lists["token_share"].append(1 / len(row.targets))
    tensors = {
        name: torch.tensor(
            values, device=prepared.ids.device, dtype=torch.float32 if name.endswith("share") else torch.long
        )
        for name, values in lists.items()
    }
    return LossPass(prepared=prepared, **tensors)


def pass_losses(
    model: LanguageModel,
    part: LossPass,
    delta: Tensor,
    references: MutableMapping[int, Tensor],
    *,
    layer: int,
    hparams: LocateThenEditHParams,
) -> PassLosses:
    """Run one pass at ``delta [values, d_out]``.

    Args:
        references: by index of a value, the log p ``[vocab]`` at δ = 0 with which its essence row is compared. A
            missing one is added from this pass, because a value's first evaluation is at δ = 0.
    """
    scored = len(part.token_row)
    above = range(layer + 1, model.layout.num_layers)[: hparams.v_context_layers if hparams.v_context_factor else 0]
    with (
        _matrix_products_in(hparams.compute_dtype, model.device.type),
        outputs_at(model, above, part.prepared.lookup) as states,
    ):
        logits = logits_with_delta(
            model,
            part.prepared,
            layer=layer,
            delta=delta[part.row_value],
            rows=torch.cat([part.token_row, part.essence_row]),
            positions=torch.cat([part.token_position, part.essence_position]),
        )
    places = part.row_value[part.essence_row]
    for place, row in zip(places.tolist(), logits[scored:].detach(), strict=True):
        if place not in references:
            references[place] = row.float().log_softmax(-1)
    compared = [references[place] for place in places.tolist()]
    nll, drift = VocabularyLosses.apply(logits.float(), part.token_label.to(logits.device), compared)  # type: ignore[no-untyped-call]
    row_nll = torch.zeros_like(part.row_share).index_add(0, part.token_row, nll.to(delta) * part.token_share)
    losses = delta.new_zeros(len(delta)).index_add(0, part.row_value, row_nll * part.row_share)
    losses = losses.index_add(0, places, hparams.kl_factor * drift.to(delta))
    targets = (part.row_share > 0).nonzero()[:, 0]
    if states:
        states_of = torch.stack([block.to(delta) for block in states], dim=1)[targets]
        parts = spread_parts(states_of, part.row_fact[targets])
        losses = losses.index_add(
            0, part.row_value[targets], hparams.v_context_factor * part.row_pair_share[targets] * parts
        )
    return PassLosses(
        losses=losses,
        nll=row_nll.detach()[targets],
        nll_fact=part.row_fact[targets],
        nll_context=part.row_context[targets],
        first_choice=_first_choice(part, logits[:scored].detach())[targets]
        if hparams.v_stop_most_probable is not None
        else None,
    )


def spread_parts(states: Tensor, groups: Tensor) -> Tensor:
    """What each row adds to Σ over pairs a < b of its group of ‖h_a − h_b‖² / d_model, a mean over blocks, ``[rows]``.

    The sum over the pairs of n rows is n Σ ‖h_a − h̄‖², with h̄ their mean.

    Args:
        states: h of each row, ``[rows, layers, d_model]``.
        groups: name of each row's group, ``[rows]``.
    """
    same = (groups[:, None] == groups[None, :]).to(states)  # [rows, rows]
    sizes = same.sum(1)
    means = torch.einsum("ab,b...->a...", same, states) / sizes[:, None, None]
    parts: Tensor = sizes * (states - means).square().mean(dim=(1, 2))
    return parts


def _first_choice(part: LossPass, logits: Tensor) -> Tensor:
    """Whether each target token of a row is the most probable one, ``[rows]``, from ``logits [tokens, vocab]``."""
    missed = (logits.argmax(-1) != part.token_label.to(logits.device)).to(part.row_share)
    return torch.zeros_like(part.row_share).index_add(0, part.token_row, missed) == 0


class VocabularyLosses(torch.autograd.Function):
    """Losses of rows of logits ``[tokens + essences, vocab]``: −log p of a label for the first rows, KL(p ‖ q) for the
    others.

    ``labels [tokens]`` are the labels. Each of the other rows has its own log q, ``[vocab]``. The results are
    ``[tokens]`` and ``[essences]``.

    Rows are as wide as the vocabulary. So the gradient is computed here in the forward pass, and no other tensor of
    that size is kept: ∂(−log p_y)/∂zⱼ = pⱼ − [j = y] and ∂KL/∂zⱼ = pⱼ (log pⱼ − log qⱼ − KL).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, log_q: list[Tensor]) -> tuple[Tensor, Tensor]:
        scored, size = len(labels), max(1, _LOGITS_PER_CHUNK // logits.shape[1])
        gradient, losses = torch.empty_like(logits), logits.new_empty(len(logits))
        for start in range(0, scored, size):
            rows, wanted = slice(start, min(start + size, scored)), labels[start : start + size, None]
            log_p = logits[rows].log_softmax(-1)
            losses[rows] = -log_p.gather(1, wanted)[:, 0]
            gradient[rows] = log_p.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=log_p.dtype))
        for start in range(scored, len(logits), size):
            rows = slice(start, start + size)
            log_p = logits[rows].log_softmax(-1)
            ratio = log_p - torch.stack(log_q[start - scored : start - scored + size])
            p = log_p.exp_()
            losses[rows] = torch.linalg.vecdot(p, ratio)
            gradient[rows] = ratio.sub_(losses[rows, None]).mul_(p)
        ctx.save_for_backward(gradient)
        return losses[:scored], losses[scored:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return torch.cat(gradients)[:, None] * gradient, None, None


def _matrix_products_in(dtype: str, device: str) -> AbstractContextManager[object]:
    """A context in which matrix products are computed in ``dtype``; δ, the loss and Adam stay in float32."""
    return nullcontext() if dtype == "model" else torch.autocast(device, dtype=getattr(torch, dtype))
