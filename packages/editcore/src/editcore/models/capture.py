"""Inputs and outputs of the edited projections at the lookup tokens.

Shapes: ``rows`` token rows, ``seq`` their padded length, ``d_in`` and ``d_out`` the widths of a projection.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from editcore._util.memory import in_halves
from editcore.interfaces.documented import documented
from editcore.models.encoding import pad_rows
from editcore.models.module_hooks import first_tensor, hooks
from editcore.models.passes import skip_first_blocks, stop_after
from editcore.models.planning import PassBudget, plan_passes
from editcore.models.tokens import TokenRow

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["Captured", "LayerByLayerCapture", "capture", "outputs_at", "project"]


@documented
@dataclass(frozen=True, slots=True)
class Captured:
    """What one layer read and wrote at the lookup tokens."""

    inputs: Tensor
    """Projection input (the key), ``[rows, d_in]``."""
    outputs: Tensor
    """Projection output, bias included, ``[rows, d_out]``."""
    block_outputs: Tensor
    """Output of the whole block (the residual stream), ``[rows, d_model]``."""


def capture(
    model: LanguageModel, rows: Sequence[TokenRow], layers: Sequence[int], *, budget: PassBudget | None = None
) -> dict[int, Captured]:
    """Projection inputs and outputs and block outputs at each row's lookup token, all layers in one pass.

    The pass ends after the deepest of ``layers``. Later blocks, logits and tokens after the lookup token are not
    computed.

    Args:
        budget: what one forward pass may hold; left out, what suits the device of the model.
    """
    return LayerByLayerCapture(model, budget=budget).capture(dict(enumerate(rows)), layers)


class LayerByLayerCapture:
    """Captures activations at increasing layers.

    Each capture resumes from the hidden states of the one before, because the blocks below have not changed. It works
    in families whose blocks read nothing of lower blocks but the residual stream.

    Args:
        keep_bytes: memory for the hidden states that are kept: the input of the lowest captured block, for each row.
        budget: what one forward pass may hold; left out, what suits the device of the model.
    """

    def __init__(self, model: LanguageModel, *, keep_bytes: int = 0, budget: PassBudget | None = None) -> None:
        self.model, self.budget, self._left = model, budget or PassBudget.forward(model), keep_bytes
        self._kept: dict[Hashable, tuple[int, Tensor]] = {}
        """By row, the block to resume at and its input, ``[seq, d_model]``."""
        self._returns_tuple = False

    @torch.inference_mode()
    def capture(self, rows: Mapping[Hashable, TokenRow], layers: Sequence[int]) -> dict[int, Captured]:
        """As :func:`capture`, for rows with names; the result is in their order."""
        names = list(rows)
        for name in names:
            if name in self._kept and self._kept[name][0] > min(layers):
                self._left += self._kept.pop(name)[1].nbytes
        at = {name: self._kept[name][0] if name in self._kept else 0 for name in names}
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in layers}

        def run(chunk: Sequence[int]) -> list[dict[int, tuple[Tensor, Tensor, Tensor]]]:
            return [self._run({names[index]: rows[names[index]] for index in chunk}, layers)]

        lengths = [row.lookup + 1 for row in rows.values()]
        order: list[int] = []
        for start in sorted(set(at.values())):
            together = [index for index, name in enumerate(names) if at[name] == start]
            for members in plan_passes([lengths[index] for index in together], self.budget):
                chunk = [together[place] for place in members]
                order += chunk
                for found in in_halves(run, chunk):
                    for layer, part in found.items():
                        parts[layer].append(part)
        restore = torch.tensor(order).argsort()
        return {
            layer: Captured(*(torch.cat(pieces)[restore.to(pieces[0].device)] for pieces in zip(*chunks, strict=True)))
            for layer, chunks in parts.items()
        }

    def _run(
        self, rows: Mapping[Hashable, TokenRow], layers: Sequence[int]
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """One pass over rows that are all at the same block."""
        model, lowest = self.model, min(layers)
        ids, mask = pad_rows([row.ids[: row.lookup + 1] for row in rows.values()], model.pad_id, device=model.device)
        lookups = torch.tensor([row.lookup for row in rows.values()])
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        entering: list[Any] = []

        def at_lookup(hidden: Tensor) -> Tensor:
            places = torch.arange(hidden.shape[0], device=hidden.device)
            return hidden[places, lookups.to(hidden.device)]

        def on_projection(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                # Projections may see tokens flattened to [rows * seq, d_in] (OPT does); bring the row axis back.
                found[layer] += [at_lookup(part.reshape(*ids.shape, -1)) for part in (args[0], first_tensor(output))]

            return hook

        def on_block(layer: int) -> Any:
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                found[layer].append(at_lookup(first_tensor(output)))

            return hook

        def on_entering(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            entering.append(output)

        kept = [self._kept[name] for name in rows if name in self._kept]
        hidden = pad_sequence([states for _, states in kept], batch_first=True) if kept else None
        with (
            hooks() as handles,
            skip_first_blocks(model, kept[0][0] if kept else 0, hidden, returns_tuple=self._returns_tuple),
        ):
            if lowest and self._left:
                handles.append(model.block(lowest - 1).register_forward_hook(on_entering))
            for layer in layers:
                handles.append(model.projection(layer).register_forward_hook(on_projection(layer)))
                handles.append(model.block(layer).register_forward_hook(on_block(layer)))
            with stop_after(model, max(layers)):
                model.hf.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        for output in entering:
            self._returns_tuple = isinstance(output, tuple)
            self._keep(rows, lowest, first_tensor(output))
        return {layer: (parts[0], parts[1], parts[2]) for layer, parts in found.items()}

    def _keep(self, rows: Mapping[Hashable, TokenRow], block: int, hidden: Tensor) -> None:
        for place, (name, row) in enumerate(rows.items()):
            states = hidden[place, : row.lookup + 1].clone()
            if name in self._kept:
                self._left += self._kept.pop(name)[1].nbytes
            if states.nbytes <= self._left:
                self._kept[name] = block, states
                self._left -= states.nbytes


@contextmanager
def outputs_at(model: LanguageModel, layers: Iterable[int], columns: Tensor) -> Iterator[list[Tensor]]:
    """Inside the ``with`` block, a forward pass puts the outputs of blocks ``layers`` into the list, each at one token
    of every row, ``[rows, d_model]``. They are differentiable.

    Args:
        columns: ``[rows]``, which token.
    """
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        hidden = first_tensor(output)
        found.append(hidden[torch.arange(len(columns), device=hidden.device), columns.to(hidden.device)])

    with hooks() as handles:
        for layer in layers:
            handles.append(model.block(layer).register_forward_hook(note))
        yield found


@torch.inference_mode()
def project(model: LanguageModel, address: str, keys: Tensor) -> Tensor:
    """The matrix at ``address`` times ``keys [n, d_in]``: ``[n, d_out]``, in the type and on the device of the keys.

    Where the address is the weight of a linear module, the module itself is called. So its bias counts, and whatever a
    backend put beside its weight.
    """
    weight = model.weight(address)
    module = model.hf.get_submodule(address.removesuffix(".weight")) if address.endswith(".weight") else None
    if module is None or isinstance(module, nn.Embedding):
        return (keys.to(weight) @ model.as_out_in(address, weight).T).to(keys)
    found: Tensor = module(keys.to(weight))
    return found.to(keys)
