"""The memory: keys and values beside blocks.

Shapes: ``slots`` keys of a block, ``rows`` texts of ``seq`` tokens, ``d_model`` the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from editcore import Attachment, LanguageModel, ModelError
from editcore.models import first_tensor
from torch import Tensor, nn

__all__ = ["GatedMemory", "entering", "look_up", "with_hidden"]

_EQUAL = 1e-5
"""Cosines that differ by less are equal: how rows are padded shows in the last bits of a hidden state."""


class GatedMemory:
    """Adds the value of the nearest key to a block's output, at every token whose hidden state is near enough."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        """Hook the blocks that attachments speak of."""
        by_layer: dict[int, list[Attachment]] = {}
        for attachment in attachments:
            model.check_layer(attachment.fields["layer"])
            if (width := attachment.tensors["keys"].shape[1]) != model.layout.d_model:
                raise ModelError(f"The memory's keys are {width} wide, {model.name} is {model.layout.d_model}.")
            by_layer.setdefault(attachment.fields["layer"], []).append(attachment)
        for layer, several in by_layer.items():
            self._handles.append(model.block(layer).register_forward_hook(_adding(several), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks out."""
        while self._handles:
            self._handles.pop().remove()


def _adding(attachments: Sequence[Attachment]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        return with_hidden(output, first_tensor(output) + look_up(attachments, entering(args, kwargs)))

    return hook


def look_up(attachments: Sequence[Attachment], hidden: Tensor) -> Tensor:
    """What the memory adds for ``hidden [..., d_model]``: zero where no key is near enough, and where several are
    equally near, what was written last."""
    newest_first = attachments[::-1]
    keys, values = (torch.cat([attachment.tensors[name] for attachment in newest_first]) for name in ("keys", "values"))
    gates = torch.cat(
        [torch.full((len(attachment.tensors["keys"]),), attachment.fields["gate"]) for attachment in newest_first]
    )
    near = torch.nn.functional.normalize(hidden.float(), dim=-1)
    cosines = near @ torch.nn.functional.normalize(keys.to(near), dim=-1).T  # [..., slots]
    best = cosines.amax(dim=-1, keepdim=True)
    slot = (cosines > best - _EQUAL).int().argmax(dim=-1)  # the first of them
    opened = best > gates.to(best)[slot].unsqueeze(-1)
    return (values.to(near)[slot] * opened).to(hidden)


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block was called with, ``[rows, seq, d_model]``."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
