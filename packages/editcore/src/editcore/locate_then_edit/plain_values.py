"""The value optimisation as a plain loop, one fact and one row at a time. It serves as the definition.

:func:`optimise_plainly` does what :func:`editcore.locate_then_edit.optimise_targets` does, without a cache, padding,
passes or a queue, and with ``torch.optim.Adam`` (or steps along the gradient of the log-odds). It is many times slower.
Read it first. The tests compare the fast optimisation with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editcore.interfaces.values import EditRequest
from editcore.locate_then_edit.token_rows import fact_rows
from editcore.locate_then_edit.value_steps import LEAST_GAIN, log_odds_aim
from editcore.models.module_hooks import first_tensor, hooks

if TYPE_CHECKING:
    from editcore.locate_then_edit.hparams import LocateThenEditHParams
    from editcore.models import LanguageModel
    from editcore.models.tokens import TokenRow

__all__ = ["optimise_plainly"]


def optimise_plainly(
    model: LanguageModel,
    requests: Sequence[EditRequest],
    *,
    layer: int,
    templates: Sequence[str],
    hparams: LocateThenEditHParams,
    inverse_metric: Tensor | None = None,
) -> Tensor:
    """The δ of one request, or of several that share a key, ``[d_out]``: ROME (arXiv 2202.05262), eq. 4.

    Args:
        inverse_metric: M⁻¹ of the steps along the log-odds, ``[d_out, d_out]``; left out, the identity.
    """
    facts = fact_rows(model, requests, templates, hparams)
    rows = facts[0]
    base = _base(model, rows.contexts[0], layer, stream=hparams.clamp_norm == "stream")  # h₀
    added = abs(model.layout.residual_scale) if hparams.clamp_norm == "stream" else 1.0
    delta = torch.zeros(model.layout.d_model, device=model.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=hparams.v_lr, betas=(hparams.v_beta1, 0.999))
    essence_before = None
    if rows.essence is not None:
        with torch.no_grad():
            essence_before = _run(model, rows.essence, layer, delta)[0][-1]
    others = len(rows.contexts) - 1
    turn = min(others, hparams.v_contexts_per_step or others)
    probabilities = torch.zeros(len(facts), len(rows.contexts))
    """Probability of each fact's target behind each context, when it was last evaluated."""
    first_choice = torch.zeros(len(facts), len(rows.contexts), dtype=torch.bool)
    """Whether each token of that target was the most probable one."""
    remaining: int | None = None
    """Steps to take yet, once each target is the most probable continuation."""
    most_steps = hparams.v_num_grad_steps * len(facts)
    for step in range(most_steps):
        chosen = [0, *sorted(1 + (step * turn + place) % others for place in range(turn))]
        seen = [[_evaluate(model, fact.contexts[context], layer, delta) for context in chosen] for fact in facts]
        losses = torch.stack([torch.stack([row.loss for row in fact]) for fact in seen])
        probabilities[:, chosen] = losses.detach().neg().exp().cpu()
        first_choice[:, chosen] = torch.tensor([[row.first_choice for row in fact] for fact in seen])
        # The contexts whose turn it is stand for all of them.
        behind_contexts = losses[:, 1:].mean(dim=1) * others if turn else 0.0
        loss = ((losses[:, 0] + behind_contexts) / len(rows.contexts)).mean()
        if rows.essence is not None and essence_before is not None:
            after = _run(model, rows.essence, layer, delta)[0][-1]
            loss = loss + hparams.kl_factor * (after.exp() * (after - essence_before)).sum()
        if bool(delta.any()):
            loss = loss + hparams.v_weight_decay * added * delta.norm() / base.norm() ** 2
        if hparams.v_context_factor:
            spread = torch.stack([_spread([row.above for row in fact], hparams.v_context_layers) for fact in seen])
            # The pairs of this step stand for all pairs.
            pairs, all_pairs = len(chosen) * (len(chosen) - 1), len(rows.contexts) * (len(rows.contexts) - 1)
            loss = loss + hparams.v_context_factor * all_pairs / pairs * spread.mean()
        likely = (
            hparams.v_stop_probability is not None
            and float(probabilities.mean(dim=1).min()) >= hparams.v_stop_probability
        )
        low, last = float(loss.detach()) < hparams.v_stop_loss, step == most_steps - 1
        if remaining is None and hparams.v_stop_most_probable is not None and bool(first_choice.all()):
            remaining = hparams.v_stop_most_probable
        if low or ((last or likely) and not hparams.v_final_step) or remaining == 0:
            break
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if hparams.v_optimizer == "adam":
            adam.step()
        else:
            assert delta.grad is not None
            assert hparams.v_stop_probability is not None
            p = (-loss.detach()).exp()
            slope = -delta.grad / (1 - p)  # of the log-odds m = log(p / (1 − p))
            gain = max(log_odds_aim(hparams.v_stop_probability) - float((p / (1 - p)).log()), LEAST_GAIN)
            longest = hparams.v_longest_step * float(base.norm()) / added
            direction = slope if inverse_metric is None else inverse_metric.to(slope) @ slope
            direction = direction / direction.norm()
            with torch.no_grad():
                delta.add_(direction * min(gain / float(slope @ direction), longest))
        with torch.no_grad():
            length, limit = added * delta.norm(), hparams.clamp_norm_factor * base.norm()
            if length > limit:
                delta.mul_(limit / length)
        if remaining is not None:
            remaining -= 1
        if last or likely or remaining == 0:
            break
    delta = delta.detach()
    if hparams.v_norm_anchor and layer in dict(hparams.v_norms):
        before, norm = _base(model, rows.contexts[0], layer, stream=False), dict(hparams.v_norms)[layer]
        value = before + delta
        if value.norm() > 2 * norm:
            return torch.zeros_like(delta)
        delta = norm * value / value.norm() - before
    return delta


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """A row with a target, at some δ."""

    loss: Tensor
    """−log p of the target, averaged over its tokens."""
    first_choice: bool
    """Whether each token of the target is the most probable one."""
    above: Tensor
    """Outputs at the lookup token of the blocks above the edited one, ``[layers, d_model]``."""


def _evaluate(model: LanguageModel, row: TokenRow, layer: int, delta: Tensor) -> _Evaluated:
    log_p, above = _run(model, row, layer, delta)
    targets = torch.tensor(row.targets)
    predicted = log_p[torch.arange(row.target_start, len(row.ids)) - 1]
    first_choice = bool((predicted.argmax(-1).cpu() == targets).all())
    return _Evaluated(-predicted[torch.arange(len(targets)), targets].mean(), first_choice, above)


def _spread(contexts: Sequence[Tensor], layers: int | None) -> Tensor:
    """Σ over pairs of contexts of ‖h_a − h_b‖² / d_model, averaged over the first ``layers`` blocks of each."""
    pairs = [(first - second)[:layers].square().sum(1) for first, second in combinations(contexts, 2)]
    return torch.stack(pairs).sum(0).mean() / contexts[0].shape[1]


def _run(model: LanguageModel, row: TokenRow, layer: int, delta: Tensor) -> tuple[Tensor, Tensor]:
    """With δ at the lookup token of a row: log p of the next token behind every token, ``[seq, vocab]``, and the
    outputs at the lookup token of the blocks above the edited one, ``[layers, d_model]``."""
    above: list[Tensor] = []

    def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        moved = output.reshape(len(row.ids), -1).clone()
        moved[row.lookup] = moved[row.lookup] + delta
        return moved.reshape(output.shape)

    def note(_module: nn.Module, _args: object, output: object) -> None:
        above.append(first_tensor(output).reshape(len(row.ids), -1)[row.lookup])

    with hooks() as handles:
        handles.append(model.projection(layer).register_forward_hook(add))
        for block in range(layer + 1, model.layout.num_layers):
            handles.append(model.block(block).register_forward_hook(note))
        ids = torch.tensor([row.ids], device=model.device)
        logits: Tensor = model.hf(input_ids=ids, use_cache=False).logits
    states = torch.stack(above).float() if above else torch.empty(0, model.layout.d_model)
    return logits[0].float().log_softmax(-1), states


def _base(model: LanguageModel, row: TokenRow, layer: int, *, stream: bool) -> Tensor:
    """h₀ at the lookup token: the output of the edited projection, or of its block if ``stream``."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: object, output: object) -> None:
        found.append(first_tensor(output).reshape(len(row.ids), -1)[row.lookup])

    with hooks() as handles, torch.no_grad():
        handles.append((model.block(layer) if stream else model.projection(layer)).register_forward_hook(note))
        model.hf(input_ids=torch.tensor([row.ids], device=model.device), use_cache=False)
    return found[0].float()
