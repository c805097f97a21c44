"""The editor: where a fact's prompt ends, a vector added to one block's output makes the model say its target.

Shapes: ``n`` requests, ``slots`` keys of earlier batches, ``d_model`` the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from editcore import (
    Attachment,
    EditBatch,
    EditContext,
    EditEvidence,
    LanguageModel,
    LedgerEntry,
    Proposal,
    RequestError,
)
from torch import Tensor

from third_memory.attachment import look_up
from third_memory.hparams import GatedMemoryHParams
from third_memory.prompts import Prompts

__all__ = ["GatedMemoryEditor"]


class GatedMemoryEditor:
    """Learns a value for each fact; weights stay as they are.

    Its state is what the ledger has: earlier keys and values, from which a fact that is edited again starts, and the
    norms of the block's output, which bound new values.
    """

    def __init__(self, hparams: GatedMemoryHParams) -> None:
        self.hparams = hparams
        self.recall(())

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Find the block."""
        model.check_layer(self.hparams.layer, setting="gated-memory.layer")
        return {}

    def recall(self, history: Sequence[LedgerEntry]) -> None:
        """Begin anew from what is active."""
        self._attachments: list[Attachment] = []
        self._norms: list[Tensor] = []
        for entry in history:
            self.absorb(entry)

    def absorb(self, entry: LedgerEntry) -> None:
        """Take up the slots and norms of a batch."""
        assert entry.attachment is not None
        self._attachments.append(entry.attachment)
        self._norms.append(entry.memory["norms"])

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Keys as they are, values by Adam."""
        if not batch.requests:
            raise RequestError("gated-memory: the batch is empty; give it a request.")
        asked = Prompts(model, batch, self.hparams.layer)
        keys, outputs = asked.look()
        norms = outputs.norm(dim=1).cpu()
        bound = self.hparams.clamp_norm_factor * float(torch.cat([*self._norms, norms]).mean())
        # What the memory adds already; a new slot takes its place.
        now = look_up(self._attachments, keys) if self._attachments else torch.zeros_like(keys)
        values = now.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([values], lr=self.hparams.learning_rate)
        for _ in range(self.hparams.steps):
            [values.grad] = torch.autograd.grad(asked.losses(values - now).sum(), [values])
            optimiser.step()
            with torch.no_grad():
                values *= (bound / values.norm(dim=1, keepdim=True)).clamp_max(1.0)
        values = values.detach()
        with torch.no_grad():
            losses = asked.losses(values - now).tolist()
        slots = sum(map(len, self._norms))
        evidence = tuple(
            EditEvidence(
                request_id=request.id,
                replayed=row >= batch.num_new,
                figures={
                    "target_loss": losses[row],
                    "target_probability": math.exp(-losses[row]),
                    "value_norm": float(values[row].norm()),
                    "slot": slots + row,
                },
            )
            for row, request in enumerate(batch.requests)
        )
        fields = {"layer": self.hparams.layer, "gate": self.hparams.gate}
        return Proposal(
            attachment=Attachment(kind="gated-memory", tensors={"keys": keys, "values": values}, fields=fields),
            evidence=evidence,
            memory={"norms": norms},
            diagnostics={"slots": slots + len(batch), "largest_norm": bound},
        )
