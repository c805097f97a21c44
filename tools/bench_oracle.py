"""The plain way of a batch edit, which the benchmark measures against: one fact at a time, whole sequences, all logits.

It is written from the formulas alone and shares nothing with editcore but the tokens of a row and the names of a
model's modules, so that agreement says something. It is not slowed down on purpose: the rows of one fact go through the
network as one padded batch, no gradient of a weight is computed, and one inverse of C serves all batches.

Shapes: ``rows`` contexts and the essence prompt of one fact, ``seq`` their padded length, ``n`` facts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from editcore import EditRequest, LanguageModel
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.models.tokens import TokenRow, continuation_row, lookup_row
from torch import Tensor

__all__ = ["PlainBatch", "PlainLoop"]


@dataclass(slots=True)
class PlainBatch:
    """What one batch gave and what it cost."""

    deltas: list[Tensor] = field(default_factory=list)
    """δ of every fact, ``[d_out]``."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of ``targets``, ``keys`` and ``solve``."""


class PlainLoop:
    """Edits a model in place, batch after batch, by EMMET's closed form, spread over layers as MEMIT spreads it."""

    def __init__(
        self,
        model: LanguageModel,
        hparams: LocateThenEditHParams,
        *,
        templates: Sequence[str],
        moments: Mapping[int, Tensor],
        ridge: float,
    ) -> None:
        self.model, self.hparams, self.templates, self.ridge = model, hparams, templates, ridge
        self.last = hparams.layers[-1]
        # As the reference code has it, [d_in, d_in].
        self.inverses = {layer: torch.linalg.inv(moments[layer].double()) for layer in hparams.layers}

    def edit(self, requests: Sequence[EditRequest]) -> PlainBatch:
        """Optimise, solve and write one batch."""
        batch, start = PlainBatch(), time.perf_counter()
        for request in requests:
            batch.deltas.append(self.optimise(request))
        batch.seconds["targets"] = time.perf_counter() - start
        batch.seconds |= {"keys": 0.0, "solve": 0.0}
        began: Tensor | None = None
        for index, layer in enumerate(self.hparams.layers):
            start = time.perf_counter()
            keys = torch.stack([self.key(request, layer) for request in requests])  # [n, d_in]
            left = torch.stack(batch.deltas).double()  # [n, d_out]
            if len(self.hparams.layers) > 1:
                streams = torch.stack([self.stream(request) for request in requests])  # [n, d_out]
                began = streams if began is None else began
                left = left - (streams - began)
            batch.seconds["keys"] += time.perf_counter() - start
            start = time.perf_counter()
            # What is left of δ, in equal shares for the layers that are left.
            self._write(layer, keys, left / (len(self.hparams.layers) - index))
            batch.seconds["solve"] += time.perf_counter() - start
        return batch

    def _write(self, layer: int, keys: Tensor, residuals: Tensor) -> None:
        inverse, name = self.inverses[layer], self.model.layout.weight_name(layer)
        system = keys @ inverse @ keys.T + self.ridge * torch.eye(len(keys), dtype=torch.float64)
        change = residuals.T @ torch.linalg.inv(system) @ keys @ inverse  # [d_out, d_in]
        with torch.no_grad():
            weight = self.model.weight(name)
            weight.copy_(self.model.as_out_in(name, self.model.as_out_in(name, weight).double() + change).to(weight))

    def _forward(self, rows: Sequence[TokenRow], layer: int, delta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities ``[rows, seq, vocab]``, and input and output of a projection at each lookup token."""
        ids = torch.full((len(rows), max(len(row.ids) for row in rows)), self.model.pad_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            mask[index, : len(row.ids)] = 1
        each, lookup = torch.arange(len(rows)), torch.tensor([row.lookup for row in rows])
        seen: list[Tensor] = []

        def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            shaped = output.reshape(*ids.shape, -1)
            seen.extend([args[0].reshape(*ids.shape, -1)[each, lookup].detach(), shaped[each, lookup].detach()])
            if delta is None:
                return output
            change = torch.zeros_like(shaped)
            change[each, lookup] = 1.0
            return (shaped + change * delta).reshape(output.shape)

        handle = self.model.projection(layer).register_forward_hook(hook)
        try:
            logits = self.model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            handle.remove()
        return logits.float().log_softmax(-1), seen[0], seen[1]

    def optimise(self, request: EditRequest) -> Tensor:
        """δ after ``v_num_grad_steps`` evaluations of the loss (METHODS: NLL, essence drift, weight decay, clamp)."""
        h = self.hparams
        rows = [continuation_row(self.model, request, template=template) for template in self.templates]
        essence = lookup_row(self.model, request.model_copy(update={"prompt": "{} is a"}))
        position = essence.lookup if h.kl_position == "lookup" else len(essence.ids) - 1
        with torch.no_grad():
            before, _, outputs = self._forward([*rows, essence], self.last, None)
        before, base = before[-1, position], outputs[0]
        delta = torch.zeros_like(base, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=h.v_lr)
        for _ in range(h.v_num_grad_steps - 1):  # as in the reference code, the last evaluation takes no step
            predicted, _, _ = self._forward([*rows, essence], self.last, delta)
            loss = torch.zeros(())
            for index, row in enumerate(rows):
                for offset, token in enumerate(row.targets):
                    share = 1 / (len(rows) * len(row.targets))
                    loss = loss - share * predicted[index, row.target_start - 1 + offset, token]
            after = predicted[-1, position]
            loss = loss + h.kl_factor * (after.exp() * (after - before)).sum()
            if bool(delta.any()):
                loss = loss + h.v_weight_decay * delta.norm() / base.norm() ** 2
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                limit = h.clamp_norm_factor * base.norm()
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
        return delta.detach()

    def key(self, request: EditRequest, layer: int) -> Tensor:
        """Mean key over the contexts, the bare prompt ½ and the others ½ together, ``[d_in]`` float64."""
        keys = []
        with torch.no_grad():
            for template in self.templates:
                row = lookup_row(self.model, request, template=template)
                keys.append(self._forward([row], layer, None)[1][0].double())
        if len(keys) == 1:
            return keys[0]
        return 0.5 * keys[0] + 0.5 * torch.stack(keys[1:]).mean(0)

    def stream(self, request: EditRequest) -> Tensor:
        """Output of the last edited block at the bare prompt's lookup token, ``[d_out]`` float64.

        Not for the model's last block, whose output transformers hands out behind the final norm.
        """
        row = lookup_row(self.model, request)
        with torch.no_grad():
            hidden = self.model.hf(
                input_ids=torch.tensor([row.ids]), output_hidden_states=True, use_cache=False
            ).hidden_states
        return hidden[self.last + 1][0, row.lookup].double()  # type: ignore[no-any-return]
