"""How llama.cpp names the weights of a model, and in which order its GGUF files keep their rows.

Names are those of the ``gguf`` package. Most weights are kept as transformers has them, (out, in). llama.cpp rotates
neighbouring components of queries and keys where transformers rotates the two halves of a head, so for some
architectures the rows of these projections are kept in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gguf
from editcore import ModelError
from torch import Tensor

__all__ = ["GgufLayout"]

_ARCHITECTURES: Mapping[str, str] = {
    "cohere": "command-r",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "granitemoe": "granitemoe",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
"""By ``config.model_type``: llama.cpp's architecture, where its name is another."""
_PAIRED = frozenset({"granite", "llama", "smollm3"})
"""Architectures whose rows of q and k are kept in pairs: component j of a head's first half, then j of its second."""
_AS_THEY_ARE = frozenset(
    {"gemma", "gemma2", "gemma3", "gpt2", "olmo2", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"}
)
"""Architectures whose rows of q and k are kept as they are."""
_QUERIES = frozenset({"attn_q", "attn_qkv"})
_KEYS = frozenset({"attn_k", "attn_qkv"})


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """The weights of one model as a GGUF file has them."""

    architecture: str
    """llama.cpp's name of it."""
    num_layers: int
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, config: Any) -> GgufLayout:
        """The layout for a model of transformers.

        Args:
            config: its configuration.

        Raises:
            ModelError: the ``gguf`` package does not know the architecture.
        """
        kind = str(config.model_type)
        architecture = _ARCHITECTURES.get(kind, kind)
        if architecture not in gguf.MODEL_ARCH_NAMES.values():
            raise ModelError(
                f"llama.cpp has no architecture for models of the type '{kind}', as far as the package gguf knows it. "
                "Export the edits with --format peft or merged."
            )
        heads = int(config.num_attention_heads)
        return cls(
            architecture=architecture,
            num_layers=int(config.num_hidden_layers),
            num_heads=heads,
            num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        )

    def name(self, address: str) -> str:
        """The name of a weight in the file, such as ``blk.3.ffn_down.weight``.

        Raises:
            ModelError: llama.cpp has no such weight.
        """
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        found: str | None = gguf.get_tensor_name_map(kind, self.num_layers).get_name(address, (".weight", ".bias"))
        if found is None:
            raise ModelError(
                f"llama.cpp has no name for '{address}' in its architecture '{self.architecture}'. Export the edits "
                "with --format peft or merged."
            )
        return found

    def reordered(self, address: str, rows: Tensor) -> Tensor:
        """A weight, or the left factor of its change, with the rows in the order of the file.

        Args:
            rows: ``[d_out, ...]``

        Raises:
            ModelError: the order is not known.
        """
        match self._order(address):
            case "paired":
                part = self.name(address).rsplit(".", 2)[-2]
                return _paired(rows, self.num_heads if part in _QUERIES else self.num_kv_heads)
            case "unknown":
                raise ModelError(
                    f"The order in which llama.cpp keeps the rows of '{address}' is not known here for its "
                    f"architecture '{self.architecture}'. Export the edits with --format peft or merged."
                )
            case _:
                return rows

    def _order(self, address: str) -> Literal["same", "paired", "unknown"]:
        part = self.name(address).rsplit(".", 2)[-2]
        if part not in _QUERIES | _KEYS or self.architecture in _AS_THEY_ARE:
            return "same"
        return "paired" if self.architecture in _PAIRED and part != "attn_qkv" else "unknown"


def _paired(rows: Tensor, num_heads: int) -> Tensor:
    """Rows in two halves per head, ``[num_heads, 2, d_head / 2]``, as pairs, ``[num_heads, d_head / 2, 2]``."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()
