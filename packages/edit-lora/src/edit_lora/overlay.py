"""Adapters on the linear modules of a model in memory, by peft's own layers.

A module with an adapter is wrapped in a ``LoraLayer`` at its place in the model, so that whatever calls it or hooks
onto it sees the adapter's effect. Its weight stays the same parameter object, and when the last adapter leaves, so does
the wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from editcore import FactoredDelta, ModelError
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Overlay"]


class Overlay:
    """Named adapters on one model; all of them are active."""

    def __init__(self, hf: nn.Module) -> None:
        self._hf = hf
        self._layers: dict[str, Any] = {}
        """The wrapper of each module that has one, by path."""

    def shape(self, path: str) -> tuple[int, int]:
        """``(d_out, d_in)`` of a module that can take an adapter.

        Raises:
            ModelError: there is no such module, or it is no linear one.
        """
        try:
            module: Any = self._hf.get_submodule(path)
        except AttributeError:
            raise ModelError(f"{type(self._hf).__name__} has no module '{path}'.") from None
        if isinstance(module, LoraLayer):
            module = module.get_base_layer()
        if type(module) is not nn.Linear and not isinstance(module, Conv1D):
            raise ModelError(f"'{path}' is a {type(module).__name__}; adapters go onto nn.Linear and Conv1D.")
        rows, columns = module.weight.shape
        return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)

    def put(
        self, adapter: str, path: str, delta: FactoredDelta, *, alpha: float | None = None, scale: float = 1.0
    ) -> None:
        """Give a module an adapter that adds ``scale · delta``, in float32 at least; one of that name is replaced.

        Args:
            alpha: α of the adapter, its rank if left out. The factors are divided by α/r, so the product stays.
        """
        rank = delta.rank
        alpha = float(rank) if alpha is None else alpha
        layer = self._layers.get(path)
        base: Any = self._hf.get_submodule(path) if layer is None else layer.get_base_layer()
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights=False,
            fan_in_fan_out=isinstance(base, Conv1D),
            inference_mode=True,
        )
        with torch.random.fork_rng(devices=[]):  # peft draws weights that are overwritten below
            if layer is None:
                layer = Linear(base, adapter, config=config, r=rank, lora_alpha=alpha)
                self._layers[path] = layer
                self._replace(path, layer)
            else:
                layer.update_layer(adapter, rank, lora_alpha=alpha, config=config)
        # Low-precision bases keep exact factors: what they add is rounded once, with the module's output.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        factors = ((layer.lora_A[adapter], delta.right), (layer.lora_B[adapter], delta.left * (rank / alpha)))
        for linear, factor in factors:
            linear.weight = nn.Parameter(factor.to(base.weight.device, dtype).contiguous(), requires_grad=False)
        layer.scaling[adapter] = scale * alpha / rank
        layer.set_adapter(list(layer.lora_A), inference_mode=True)
        layer.eval()

    def rescale(self, adapter: str, path: str, scale: float) -> None:
        """Change the strength of an adapter that is there."""
        layer = self._layers[path]
        layer.scaling[adapter] = scale * layer.lora_alpha[adapter] / layer.r[adapter]

    def take(self, adapter: str, path: str) -> None:
        """Take an adapter off a module; nothing happens if it has none of that name."""
        layer = self._layers.get(path)
        if layer is None or adapter not in layer.lora_A:
            return
        layer.set_adapter([name for name in layer.lora_A if name != adapter], inference_mode=True)
        layer.delete_adapter(adapter)
        if not layer.lora_A:
            self._replace(path, layer.get_base_layer())
            del self._layers[path]

    @contextmanager
    def removed(self) -> Iterator[None]:
        """The model without any wrapper, inside the block only."""
        for path, layer in self._layers.items():
            self._replace(path, layer.get_base_layer())
        try:
            yield
        finally:
            for path, layer in self._layers.items():
                self._replace(path, layer)

    @contextmanager
    def merged(self, adapters: Sequence[str]) -> Iterator[None]:
        """The named adapters written into the weights by peft, inside the block only; the bits come back."""
        touched = {
            path: layer for path, layer in self._layers.items() if any(name in layer.lora_A for name in adapters)
        }
        bits: Mapping[str, torch.Tensor] = {
            path: layer.get_base_layer().weight.detach().clone() for path, layer in touched.items()
        }
        try:
            for layer in touched.values():
                layer.merge(adapter_names=[name for name in adapters if name in layer.lora_A])
            yield
        finally:
            for path, layer in touched.items():
                layer.merged_adapters.clear()
                with torch.no_grad():
                    layer.get_base_layer().weight.copy_(bits[path])

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(self._hf.get_submodule(parent), child, module)
