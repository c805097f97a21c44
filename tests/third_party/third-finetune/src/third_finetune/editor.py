"""The editor: a few steps on one matrix, whose sum is the change.

Shapes: ``n`` requests, ``d_out`` and ``d_in`` the widths of the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from editcore import (
    DenseDelta,
    EditBatch,
    EditContext,
    EditEvidence,
    HParamsError,
    LanguageModel,
    Proposal,
    RequestError,
)
from editcore.models import asking_for_gradients, split_address, target_losses

from third_finetune.hparams import FinetuneHParams

__all__ = ["FinetuneEditor"]


class FinetuneEditor:
    """Trains one matrix on the targets of a batch. It keeps nothing: the next batch starts from the model as it is."""

    def __init__(self, hparams: FinetuneHParams) -> None:
        self.hparams = hparams

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Find the matrix."""
        shape = tuple(model.weight(self.hparams.weight).shape)
        if len(shape) != 2:
            raise HParamsError(f"finetune.weight: '{self.hparams.weight}' is no matrix; its shape is {shape}.")
        return {"parameters": shape[0] * shape[1]}

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """The sum of the steps as a dense change."""
        if not batch.requests:
            raise RequestError("finetune: the batch is empty; give it a request.")
        address, steps = self.hparams.weight, self.hparams.steps
        index = split_address(address)[1]
        weight = model.weight(address)
        shares = torch.tensor(batch.weights, device=weight.device) / sum(batch.weights)
        delta = torch.zeros(model.as_out_in(address, weight).shape, device=weight.device)
        optimiser = _OPTIMISERS[self.hparams.optimiser]([delta], lr=self.hparams.learning_rate)
        for _ in range(steps):
            with context.trial({address: DenseDelta(delta)}), asking_for_gradients(model, [address]) as parameters:
                loss = target_losses(model, batch.requests) @ shares
                [gradient] = torch.autograd.grad(loss, parameters)
            mine = gradient if index is None else gradient[index]
            delta.grad = model.as_out_in(address, mine).to(delta).contiguous()
            optimiser.step()
        change = DenseDelta(delta.detach())
        with context.trial({address: change}), torch.no_grad():
            after = target_losses(model, batch.requests)
        evidence = tuple(
            EditEvidence(
                request_id=request.id,
                replayed=row >= batch.num_new,
                figures={"target_loss": loss, "target_probability": float(torch.tensor(-loss).exp()), "steps": steps},
            )
            for row, (request, loss) in enumerate(zip(batch.requests, after.tolist(), strict=True))
        )
        return Proposal(changes={address: change}, evidence=evidence, diagnostics={"delta_norm": change.norm()})


_OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
