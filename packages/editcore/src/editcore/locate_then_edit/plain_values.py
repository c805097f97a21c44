"""The value optimisation as a plain loop, one fact and one row at a time. It serves as the definition.

:func:`optimise_plainly` does what :func:`editcore.locate_then_edit.optimise_targets` does, without a cache, padding,
passes or a queue, and with ``torch.optim.Adam``. It is many times slower. Read it first. The tests compare the fast
optimisation with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editcore.interfaces.values import EditRequest
from editcore.locate_then_edit.token_rows import fact_rows
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
) -> Tensor:
    """The δ of one request, or of several that share a key, ``[d_out]``: ROME (arXiv 2202.05262), eq. 4."""
    facts = fact_rows(model, requests, templates, hparams)
    rows = facts[0]
    base = _base(model, rows.contexts[0], layer, stream=hparams.clamp_norm == "stream")  # h₀
    added = abs(model.layout.residual_scale) if hparams.clamp_norm == "stream" else 1.0
    delta = torch.zeros(model.layout.d_model, device=model.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=hparams.v_lr, betas=(hparams.v_beta1, 0.999))
    essence_before = None
    if rows.essence is not None:
        with torch.no_grad():
            essence_before = _log_probabilities(model, rows.essence, layer, delta)[-1]
    others = len(rows.contexts) - 1
    turn = min(others, hparams.v_contexts_per_step or others)
    probabilities = torch.zeros(len(facts), len(rows.contexts))
    """Probability of each fact's target behind each context, when it was last evaluated."""
    most_steps = hparams.v_num_grad_steps * len(facts)
    for step in range(most_steps):
        chosen = [0, *sorted(1 + (step * turn + place) % others for place in range(turn))]
        losses = torch.stack(
            [
                torch.stack([_target_loss(model, fact.contexts[context], layer, delta) for context in chosen])
                for fact in facts
            ]
        )
        probabilities[:, chosen] = losses.detach().neg().exp().cpu()
        # The contexts whose turn it is stand for all of them.
        behind_contexts = losses[:, 1:].mean(dim=1) * others if turn else 0.0
        loss = ((losses[:, 0] + behind_contexts) / len(rows.contexts)).mean()
        if rows.essence is not None and essence_before is not None:
            after = _log_probabilities(model, rows.essence, layer, delta)[-1]
            loss = loss + hparams.kl_factor * (after.exp() * (after - essence_before)).sum()
        if bool(delta.any()):
            loss = loss + hparams.v_weight_decay * added * delta.norm() / base.norm() ** 2
        likely = (
            hparams.v_stop_probability is not None
            and float(probabilities.mean(dim=1).min()) >= hparams.v_stop_probability
        )
        # The last evaluation takes no step.
        last = step == most_steps - 1 or float(loss.detach()) < hparams.v_stop_loss
        if last or (likely and not hparams.v_final_step):
            break
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            length, limit = added * delta.norm(), hparams.clamp_norm_factor * base.norm()
            if length > limit:
                delta.mul_(limit / length)
        if likely:
            break
    return delta.detach()


def _target_loss(model: LanguageModel, row: TokenRow, layer: int, delta: Tensor) -> Tensor:
    """−log p of a row's target, averaged over its tokens."""
    log_p = _log_probabilities(model, row, layer, delta)
    positions = torch.arange(row.target_start, len(row.ids)) - 1
    return -log_p[positions, torch.tensor(row.targets)].mean()


def _log_probabilities(model: LanguageModel, row: TokenRow, layer: int, delta: Tensor) -> Tensor:
    """log p of the next token behind every token of a row, ``[seq, vocab]``, with δ at its lookup token."""

    def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        moved = output.reshape(len(row.ids), -1).clone()
        moved[row.lookup] = moved[row.lookup] + delta
        return moved.reshape(output.shape)

    with hooks() as handles:
        handles.append(model.projection(layer).register_forward_hook(add))
        ids = torch.tensor([row.ids], device=model.device)
        logits: Tensor = model.hf(input_ids=ids, use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def _base(model: LanguageModel, row: TokenRow, layer: int, *, stream: bool) -> Tensor:
    """h₀ at the lookup token: the output of the edited projection, or of its block if ``stream``."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: object, output: object) -> None:
        found.append(first_tensor(output).reshape(len(row.ids), -1)[row.lookup])

    with hooks() as handles, torch.no_grad():
        handles.append((model.block(layer) if stream else model.projection(layer)).register_forward_hook(note))
        model.hf(input_ids=torch.tensor([row.ids], device=model.device), use_cache=False)
    return found[0].float()
