"""Activations of the facts of a batch at one layer: keys, outputs of the projection, and the residual stream.

Shapes: ``n`` facts, ``contexts`` templates, ``d_in``, ``d_out`` the widths of the edited projection.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from editcore.interfaces.errors import NumericalError
from editcore.interfaces.values import EditBatch, EditRequest
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.windows import Window
from editcore.models.capture import LayerByLayerCapture, project
from editcore.models.tokens import TokenRow, lookup_row

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["ActivationReader", "KeyWeighting", "LayerActivations", "ResidualKey", "context_weights", "kept_keys"]

ResidualKey = Literal["mean", "prompt"]
"""The key to which the solve gives the residual: the mean key over the contexts, or the key of the bare prompt."""

KeyWeighting = Literal["grouped", "mean", "prompt"]
"""How keys of the contexts are averaged (:func:`context_weights`); ``prompt``: the bare prompt's key alone."""

_FACTS_PER_CHUNK = 128
"""Keys are averaged over contexts this many facts at a time, to bound memory."""
_KEPT_BYTES = 2**28
"""Memory for the hidden states at one layer, from which the capture of the next layer resumes."""


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Activations of the facts of a batch at one layer."""

    keys: Tensor
    """Weighted mean over the contexts, ``[n, d_in]`` float64."""
    residual_keys: Tensor
    """Keys that get the residual, ``[n, d_in]`` float64: ``keys``, or those of the bare prompts."""
    outputs: Tensor
    """W k (bias included) of ``residual_keys``, ``[n, d_out]`` float64."""
    prompt_outputs: Tensor
    """W k (bias included) of the bare prompts' keys, ``[n, d_out]`` float64."""
    stream: Tensor
    """Output of the deepest edited block on the bare prompt, ``[n, d_model]`` float64."""

    def averaged(self, groups: Sequence[Sequence[int]]) -> LayerActivations:
        """The same, with one row in place of those of each group: facts with one key have one key to the last bit, and
        so are one constraint of the solve."""
        if not groups:
            return self
        fields = {name: getattr(self, name).clone() for name in self.__slots__}
        for rows in groups:
            for field in fields.values():
                field[list(rows)] = field[list(rows)].mean(dim=0)
        return LayerActivations(**fields)

    @classmethod
    def join(cls, parts: Sequence[LayerActivations], order: Tensor) -> LayerActivations:
        """The facts of all parts, one after the other, then in ``order [n]``."""
        joined = [torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__]
        return cls(*(whole[order.to(whole.device)] for whole in joined))


class ActivationReader:
    """Reads the activations of the facts of a batch, one layer after the other.

    Args:
        key_weighting: how keys of the contexts are averaged.
        residual_key: the key to which the solve gives the residual.
        resume: whether a layer's capture may resume from the hidden states of the layer below.
        windows: by id, requests that stand for a window of a long target.
    """

    def __init__(
        self,
        model: LanguageModel,
        hparams: LocateThenEditHParams,
        templates: Sequence[str],
        *,
        key_weighting: KeyWeighting,
        residual_key: ResidualKey,
        resume: bool,
        windows: Mapping[str, Window] | None = None,
    ) -> None:
        self.model, self.hparams, self.windows = model, hparams, windows or {}
        self.key_weighting: KeyWeighting = key_weighting
        self.residual_key: ResidualKey = residual_key
        self.templates = templates[:1] if key_weighting == "prompt" else templates
        self.captures = LayerByLayerCapture(model, keep_bytes=_KEPT_BYTES if resume else 0)

    def read(self, batch: EditBatch, layer: int, *, deepest: int, kept: Mapping[int, Tensor]) -> LayerActivations:
        """Activations of all facts of a batch at ``layer``.

        Args:
            deepest: the last edited layer. The output of its block is read, too.
            kept: by row, keys that need no forward pass (:func:`kept_keys`). Only the edited projection is computed for
                them.

        Raises:
            NumericalError: a kept key does not fit the projection.
        """
        model, fresh = self.model, [row for row in range(len(batch)) if row not in kept]
        parts = [
            self._read_facts(
                {row: batch.requests[row] for row in fresh[start : start + _FACTS_PER_CHUNK]}, layer, deepest
            )
            for start in range(0, len(fresh), _FACTS_PER_CHUNK)
        ]
        if not kept:
            return parts[0] if len(parts) == 1 else LayerActivations.join(parts, torch.arange(len(batch)))
        name = model.layout.weight_name(layer)
        d_in = model.as_out_in(name, model.weight(name)).shape[1]
        for row, key in kept.items():
            if key.shape != (d_in,):
                raise NumericalError(
                    f"The stored key of '{batch.requests[row].text}' has the shape {list(key.shape)}, but {name} of "
                    f"{model.name} takes {d_in} numbers: it comes from another model. Edit the fact anew."
                )
        keys = torch.stack([key.double() for key in kept.values()]).to(model.place(layer))  # [kept, d_in]
        outputs = project(model, name, keys)
        # The stream tells how much of δ the lower layers have reached. A known fact asks for a value, so its stream is
        # not needed.
        parts.append(LayerActivations(keys, keys, outputs, outputs, torch.zeros_like(outputs)))
        return LayerActivations.join(parts, torch.tensor([*fresh, *kept]).argsort())

    def _read_facts(self, requests: Mapping[int, EditRequest], layer: int, deepest: int) -> LayerActivations:
        """Activations of some facts, given by their row in the batch."""
        prompts = self.captures.capture(self._rows(requests, range(1)), sorted({layer, deepest}))
        captured = [prompts[layer]]
        if len(self.templates) > 1:  # prompts behind contexts are not run up to the deepest layer
            contexts = self._rows(requests, range(1, len(self.templates)))
            captured.append(self.captures.capture(contexts, [layer])[layer])
        shares = context_weights(len(self.templates), self.key_weighting).to(self.model.place(layer))

        def mean(parts: Sequence[Tensor]) -> Tensor:
            per_context = [part.double().reshape(len(requests), -1, part.shape[-1]) for part in parts]
            return torch.einsum("c,ncw->nw", shares, torch.cat(per_context, dim=1))

        # The projection is linear and the shares sum to one, so the mean output is the output of the mean key.
        keys = mean([part.inputs for part in captured])
        prompt_keys, prompt_outputs = captured[0].inputs.double(), captured[0].outputs.double()
        at_mean = self.residual_key == "mean"
        return LayerActivations(
            keys=keys,
            residual_keys=keys if at_mean else prompt_keys,
            outputs=mean([part.outputs for part in captured]) if at_mean else prompt_outputs,
            prompt_outputs=prompt_outputs,
            stream=prompts[deepest].block_outputs.double().to(shares.device),
        )

    def _rows(self, requests: Mapping[int, EditRequest], contexts: Sequence[int]) -> dict[Hashable, TokenRow]:
        return {
            (row, context): self._row(request, self.templates[context])
            for row, request in requests.items()
            for context in contexts
        }

    def _row(self, request: EditRequest, template: str) -> TokenRow:
        if (window := self.windows.get(request.id)) is not None:
            return window.row(self.model, template)
        return lookup_row(self.model, request, template=template, fact_token=self.hparams.fact_token)


def kept_keys(batch: EditBatch, name: str, fresh: Mapping[str, int]) -> dict[int, Tensor]:
    """By row, the stored keys of replayed facts. Facts that are optimised anew, whose ids are in ``fresh``, are left
    out."""
    return {
        row: batch.known[request.id].keys[name]
        for row, request in enumerate(batch.requests)
        if row >= batch.num_new and request.id not in fresh and name in batch.known[request.id].keys
    }


def context_weights(count: int, weighting: KeyWeighting) -> Tensor:
    """Share of each context in a mean key, ``[count]`` float64, the bare prompt first.

    ``grouped``: ½ for the bare prompt, ½ for the others together (MEMIT's code). ``mean``: the same share for all
    (ROME, eq. 3).
    """
    if weighting == "mean" or count == 1:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    return torch.tensor([0.5] + [0.5 / (count - 1)] * (count - 1), dtype=torch.float64)
