"""The editor: gradient steps on an attention's output projection, cut to a low rank, and on its bias as they are.

Shapes: ``n`` requests, ``d_out`` and ``d_in`` the widths of the projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from editcore import (
    Changes,
    DenseDelta,
    EditBatch,
    EditContext,
    EditEvidence,
    FactoredDelta,
    LanguageModel,
    Proposal,
    RequestError,
    VectorDelta,
)
from editcore.models import asking_for_gradients, target_losses
from torch import Tensor

from third_attention.hparams import AttentionHParams

__all__ = ["AttentionEditor"]


class AttentionEditor:
    """Changes what one attention writes into the residual stream, and keeps nothing."""

    def __init__(self, hparams: AttentionHParams) -> None:
        self.hparams = hparams

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Find the projection, and its bias where there is one."""
        model.check_layer(self.hparams.layer, setting="attention.layer")
        model.weight(self._addresses(model)[0])
        return {"weights": self._addresses(model)}

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Steps on both, then the matrix's change as thin factors."""
        if not batch.requests:
            raise RequestError("attention: the batch is empty; give it a request.")
        addresses = self._addresses(model)
        weights = [model.weight(address) for address in addresses]
        sums = [
            torch.zeros(model.as_out_in(address, weight).shape, device=weight.device)
            for address, weight in zip(addresses, weights, strict=True)
        ]
        optimiser = torch.optim.Adam(sums, lr=self.hparams.learning_rate)
        losses: list[Tensor] = []  # [n] before each step
        for _ in range(self.hparams.steps):
            with context.trial(_whole(addresses, sums)), asking_for_gradients(model, addresses):
                losses.append(target_losses(model, batch.requests))
                gradients = torch.autograd.grad(losses[-1].mean(), weights)
            for address, total, gradient in zip(addresses, sums, gradients, strict=True):
                total.grad = model.as_out_in(address, gradient).to(total).contiguous()
            optimiser.step()
        thin, kept = cut(sums[0], self.hparams.rank)
        changes = {addresses[0]: thin, **_whole(addresses[1:], sums[1:])}
        with context.trial(changes), torch.no_grad():
            after = target_losses(model, batch.requests).tolist()
        return Proposal(
            changes=changes,
            evidence=tuple(
                EditEvidence(
                    request_id=request.id,
                    replayed=row >= batch.num_new,
                    figures={"loss_before": before, "target_loss": now, "target_probability": math.exp(-now)},
                )
                for row, (request, before, now) in enumerate(
                    zip(batch.requests, losses[0].tolist(), after, strict=True)
                )
            ),
            diagnostics={"rank": thin.rank, "kept_by_rank": kept},
        )

    def _addresses(self, model: LanguageModel) -> list[str]:
        path = f"{model.layout.blocks.format(self.hparams.layer)}.{self.hparams.module}"
        bias = [f"{path}.bias"] if f"{path}.bias" in model.weights.names() else []
        return [f"{path}.weight", *bias]


def _whole(addresses: Sequence[str], sums: Sequence[Tensor]) -> Changes:
    return {
        address: VectorDelta(total) if total.ndim == 1 else DenseDelta(total)
        for address, total in zip(addresses, sums, strict=True)
    }


def cut(matrix: Tensor, rank: int) -> tuple[FactoredDelta, float]:
    """The nearest matrix of that rank, and the share of ``‖matrix‖²`` that it keeps."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = float(sizes[:rank].square().sum() / sizes.square().sum().clamp_min(torch.finfo(sizes.dtype).tiny))
    return FactoredDelta((left[:, :rank] * sizes[:rank]).contiguous(), right[:rank].contiguous()), kept
