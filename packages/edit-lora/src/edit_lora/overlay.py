"""Adapters on the modules of a model in memory, by peft's own layers.

A module with an adapter is wrapped in a ``LoraLayer`` at its place in the model, so that whatever calls it or hooks
onto it sees the adapter's effect. Its weight stays the same parameter object, and the wrapper is removed with the last
adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from editcore import FactoredDelta
from peft import LoraConfig
from peft.tuners.lora import Embedding, Linear
from torch import nn

from edit_lora.adapter import EDITS
from edit_lora.targets import Targets

__all__ = ["Overlay"]


class Overlay:
    """Named adapters on one model; all of them are active.

    Args:
        targets: the model's modules, listed while it had no adapter.
    """

    def __init__(self, hf: nn.Module, targets: Targets) -> None:
        self._hf, self._targets = hf, targets
        self._layers: dict[str, Any] = {}
        """The wrapper of each module that has one, by path."""

    def put(
        self, adapter: str, path: str, delta: FactoredDelta, *, alpha: float | None = None, scale: float = 1.0
    ) -> None:
        """Give a module an adapter that adds ``scale · delta``, in float32 at least. It replaces one of the same name.

        Args:
            delta: as the module sees its weight, (out, in): ``[d_model, vocab]`` of an embedding.
            alpha: α of the adapter; its rank if left out. The factors are divided by α/r, so the product does not
                depend on it.

        Raises:
            ModelError: there is no such module, or it takes no adapter.
        """
        rank = delta.rank
        alpha = float(rank) if alpha is None else alpha
        kind = self._targets.find(path).kind
        base = self._targets.module(path)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights=False,
            fan_in_fan_out=kind == "conv1d",
            inference_mode=True,
        )
        layer = self._layers.get(path)
        with torch.random.fork_rng(devices=[]):  # peft draws weights that are overwritten below
            if layer is None:
                wrapper = Embedding if kind == "embedding" else Linear
                layer = wrapper(base, adapter, config=config, r=rank, lora_alpha=alpha)
                self._layers[path] = layer
                self._replace(path, layer)
            else:
                layer.update_layer(adapter, rank, lora_alpha=alpha, config=config)
        # Low-precision bases keep exact factors: what they add is rounded once, with the module's output.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        down, up = (
            nn.Parameter(factor.to(base.weight.device, dtype).contiguous(), requires_grad=False)
            for factor in (delta.right, delta.left * (rank / alpha))
        )
        if kind == "embedding":
            layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter] = down, up
        else:
            layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = down, up
        layer.scaling[adapter] = scale * alpha / rank
        layer.set_adapter(_in_order(layer), inference_mode=True)
        layer.eval()

    def rescale(self, adapter: str, path: str, scale: float) -> None:
        """Change the strength of an existing adapter."""
        layer = self._layers[path]
        layer.scaling[adapter] = scale * layer.lora_alpha[adapter] / layer.r[adapter]

    def take(self, adapter: str, path: str) -> None:
        """Take an adapter off a module; nothing happens if it has none of that name."""
        layer = self._layers.get(path)
        if layer is None or adapter not in _adapters(layer):
            return
        layer.set_adapter([name for name in _in_order(layer) if name != adapter], inference_mode=True)
        layer.delete_adapter(adapter)
        if not _adapters(layer):
            self._replace(path, layer.get_base_layer())
            del self._layers[path]

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Take all wrappers off the model, inside the block only."""
        for path, layer in self._layers.items():
            self._replace(path, layer.get_base_layer())
        try:
            yield
        finally:
            for path, layer in self._layers.items():
                self._replace(path, layer)

    def _replace(self, path: str, module: nn.Module) -> None:
        for place in self._targets.places(path):
            parent, _, child = place.rpartition(".")
            setattr(self._hf.get_submodule(parent), child, module)


def _adapters(layer: Any) -> Any:
    """peft's own mapping of a layer's adapters, by name."""
    return layer.lora_embedding_A if isinstance(layer, Embedding) else layer.lora_A


def _in_order(layer: Any) -> list[str]:
    """The adapters of a layer, in the order in which their outputs are summed. The edits come last, so that the sum has
    the same bits whether adapters were attached before or after them."""
    return sorted(_adapters(layer), key=lambda name: name == EDITS)
