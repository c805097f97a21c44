"""The editor: one matrix, trained by Adam on the facts of a batch, all of them in each epoch.

Shapes: ``n`` facts, ``d_out``, ``d_in`` of the matrix.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from editcore import EditBatch, EditContext, EditEvidence, LanguageModel, Proposal, RequestError
from editcore.models import asking_for_gradients, target_losses

from edit_ft.hparams import FineTuneHParams
from edit_ft.trained import DenseChange, FactoredChange, TrainedChange

__all__ = ["FineTuneEditor"]


class FineTuneEditor:
    """Minimises the mean loss of the targets over one matrix (LocFT-BF, arXiv 2509.22072; FT-M).

    Breadth first: an epoch has a step for each minibatch of the batch, so no fact is trained to its end before the
    others. Departures: LocFT-BF trains on all facts of a run together; here each batch is trained on its own, after the
    ones before. Facts have the weights of their batch. Gradients are not clipped.
    """

    def __init__(self, hparams: FineTuneHParams) -> None:
        self.hparams = hparams

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Find the matrix.

        Raises:
            HParamsError: the layer does not exist.
        """
        model.check_layer(self.hparams.layer, setting="ft: layer")
        return {"weight": model.layout.weight_name(self.hparams.layer)}

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Train the change of a batch on top of what is active.

        Raises:
            RequestError: the batch is empty, or a prompt or a target has no token.
        """
        if not batch.requests:
            raise RequestError("ft: the batch is empty; give it a request.")
        address = model.layout.weight_name(self.hparams.layer)
        # A string seed, because it is hashed: nearby batches draw independently.
        seed = random.Random(f"ft:{context.seed}:{batch.index}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        change = self._begin(model, address, generator)
        with context.progress.task("Training", self.hparams.epochs) as advance:
            epochs = 0
            while epochs < self.hparams.epochs:
                order = torch.randperm(len(batch), generator=generator).tolist()
                steps, mean = self._epoch(model, address, change, batch, order=order, context=context)
                epochs += bool(steps)
                advance(1)
                if not steps or mean < self.hparams.stop_loss:
                    break
        changes = {address: change.delta()}
        with context.trial(changes), torch.no_grad():
            parts = [target_losses(model, batch.keep(rows).requests) for rows in self._minibatches(range(len(batch)))]
        evidence = tuple(
            EditEvidence(
                request_id=request.id,
                replayed=row >= batch.num_new,
                figures={"steps": float(epochs), "target_loss": loss, "target_probability": math.exp(-loss)},
            )
            for row, (request, loss) in enumerate(zip(batch.requests, torch.cat(parts).tolist(), strict=True))
        )
        norm = float(model.weight(address).double().norm())
        return Proposal(
            changes=changes,
            evidence=evidence,
            diagnostics={"epochs": float(epochs), "relative_change": changes[address].norm() / norm},
        )

    def _begin(self, model: LanguageModel, address: str, generator: torch.Generator) -> TrainedChange:
        weight, rate = model.as_out_in(address, model.weight(address)), self.hparams.learning_rate
        like = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        if self.hparams.rank is None:
            return DenseChange(like, learning_rate=rate, limit=self.hparams.max_change)
        return FactoredChange(like, learning_rate=rate, rank=self.hparams.rank, generator=generator)

    def _epoch(
        self,
        model: LanguageModel,
        address: str,
        change: TrainedChange,
        batch: EditBatch,
        *,
        order: Sequence[int],
        context: EditContext,
    ) -> tuple[int, float]:
        """Take a step for each minibatch; the number of steps, and the mean loss before them."""
        steps, total = 0, 0.0
        for rows in self._minibatches(order):
            part = batch.keep(rows)
            shares = torch.tensor(part.weights, dtype=torch.float64) / sum(part.weights)
            with context.trial({address: change.delta()}), asking_for_gradients(model, [address]) as weights:
                losses = target_losses(model, part.requests, ended=self.hparams.append_end)
                loss = (losses * shares.to(losses)).sum()
                total += loss.item() * len(rows)
                if loss.item() < self.hparams.skip_loss:
                    continue
                [gradient] = torch.autograd.grad(loss, weights)
            change.step(model.as_out_in(address, gradient))
            steps += 1
        return steps, total / len(batch)

    def _minibatches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Rows of a batch, a minibatch at a time, ascending."""
        size = self.hparams.minibatch
        return (sorted(rows[start : start + size]) for start in range(0, len(rows), size))
