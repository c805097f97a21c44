"""A hash of a model: its architecture and its weights as they are now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["fingerprint_of"]

_NOT_ARCHITECTURE = {
    "architectures",
    "dtype",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def fingerprint_of(hf: Any) -> str:
    """SHA-256 over the architecture and every weight as it is now: name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(_architecture(hf), sort_keys=True, default=str).encode())
    for name, tensor in _stored_tensors(hf):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _architecture(hf: Any) -> dict[str, Any]:
    """The configuration without what saving, another version or the caller changes."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                str(key): clean(item)
                for key, item in value.items()
                if not str(key).startswith("_") and key not in _NOT_ARCHITECTURE and item is not None
            }
        return [clean(item) for item in value] if isinstance(value, list | tuple) else value

    return {"class": type(hf).__name__, "config": clean(hf.config.to_dict())}


def _stored_tensors(hf: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the state dict, by name; a tensor with several names comes once, under the first."""
    seen: set[tuple[int, torch.device, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in sorted(hf.state_dict().items()):
        identity = (tensor.data_ptr(), tensor.device, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        yield name, tensor
