"""The editor: one forward pass with its backward for a batch, and one small solve for each weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from editcore import (
    EditBatch,
    EditContext,
    EditEvidence,
    FactoredDelta,
    LanguageModel,
    LedgerEntry,
    Proposal,
    RequestError,
)
from editcore.datasets import load_worldfacts
from editcore.models import target_losses

from edit_ultra.activations import ModuleTokens, read_tokens
from edit_ultra.addresses import addresses_of
from edit_ultra.hparams import UltraHParams
from edit_ultra.moments import Moments
from edit_ultra.solve import solve

__all__ = ["UltraEditor"]


class UltraEditor:
    """UltraEdit (arXiv 2505.14679): no optimisation, no second moments, no subject.

    Its running statistics are those of the active batches, which the ledger keeps one by one. Departures: a fact's loss
    is summed over the facts, so that its gradient does not depend on their number; several passes, a start of the
    statistics and weights of facts are possible.
    """

    def __init__(self, hparams: UltraHParams) -> None:
        self.hparams = hparams
        self._addresses: list[str] = []
        self._start: dict[str, Moments] = {}
        self._moments: dict[str, Moments] = {}

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Find the weights, and begin the statistics if some facts are to do that.

        Raises:
            HParamsError: a block or a module does not exist, or is not linear.
        """
        self._addresses = addresses_of(model, self.hparams.weights)
        if self.hparams.warmup_facts:
            facts = [record.request for record in load_worldfacts()[: self.hparams.warmup_facts]]
            tokens, _ = read_tokens(model, facts, self._addresses, minibatch=self.hparams.minibatch)
            self._start = {address: _moments(found) for address, found in tokens.items()}
        self.recall(())
        return {"weights": self._addresses}

    def recall(self, history: Sequence[LedgerEntry]) -> None:
        """The statistics of the start and of the active batches; see :class:`editcore.Remembers`."""
        self._moments = dict(self._start)
        for entry in history:
            self.absorb(entry)

    def absorb(self, entry: LedgerEntry) -> None:
        """The statistics with one batch more."""
        for address in self._addresses:
            self._moments[address] = self._with(address, Moments.read(entry.memory, address))

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Write a batch from its gradients.

        Raises:
            RequestError: the batch is empty, or a prompt or a target has no token.
        """
        if not batch.requests:
            raise RequestError("ultra: the batch is empty; give it a request.")
        if not self._addresses:
            self.prepare(model, context)
        settings, changes = self.hparams, dict[str, FactoredDelta]()
        own: dict[str, Moments] = {}
        for _ in range(settings.passes):
            with context.trial(changes):
                tokens, lengths = read_tokens(model, batch.requests, self._addresses, minibatch=settings.minibatch)
            own = own or {address: _moments(found) for address, found in tokens.items()}  # of the first pass
            weights = torch.tensor(batch.weights, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
            for address, found in tokens.items():
                moments = self._with(address, own[address])
                delta = solve(
                    found, moments, learning_rate=settings.learning_rate, ridge=settings.ridge, weights=weights
                )
                changes[address] = _sum(changes.get(address), delta)
        with context.trial(changes), torch.no_grad():
            starts = range(0, len(batch), settings.minibatch)
            parts = [target_losses(model, batch.requests[start : start + settings.minibatch]) for start in starts]
        evidence = tuple(
            EditEvidence(
                request_id=request.id,
                replayed=row >= batch.num_new,
                figures={"target_loss": loss, "target_probability": math.exp(-loss)},
            )
            for row, (request, loss) in enumerate(zip(batch.requests, torch.cat(parts).tolist(), strict=True))
        )
        memory = {name: tensor for address in own for name, tensor in own[address].tensors(address).items()}
        return Proposal(changes=changes, evidence=evidence, memory=memory)

    def _with(self, address: str, more: Moments) -> Moments:
        known = self._moments.get(address)
        return more if known is None else known.joined(more)


def _moments(tokens: ModuleTokens) -> Moments:
    return Moments.of(torch.cat([tokens.inputs, tokens.gradients], dim=1))


def _sum(first: FactoredDelta | None, second: FactoredDelta) -> FactoredDelta:
    if first is None:
        return second
    return FactoredDelta(torch.cat([first.left, second.left], dim=1), torch.cat([first.right, second.right]))
