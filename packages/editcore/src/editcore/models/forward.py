"""The model's own forward pass, with the head run only where logits are wanted.

The head (output embedding) costs ``d_model x vocab`` per token. For a small model that is most of a forward pass, and
the logits of a batch are its largest tensor. Scoring and the value optimisation read only a few positions per row.

Wanted positions are picked at the input of the head. Everything that an architecture does around it (final norm, scale,
bias, soft-cap) stays the model's own code. The head of a model in bfloat16 or float16 runs in float32: a logit of eight
bits would be the same for several likely tokens.

Shapes: ``batch`` rows of ``seq`` tokens, ``num_scored`` positions, ``d_model``, ``vocab``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editcore.interfaces.errors import ModelError

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["logits_at"]


def logits_at(
    model: LanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    rows: Tensor,
    positions: Tensor,
    **forward_kwargs: Any,
) -> Tensor:
    """The logits at ``(rows[i], positions[i])``, as ``[num_scored, vocab]``, differentiable.

    Gradients flow unless the caller forbids them (``torch.inference_mode``). No cache is made unless one is given. A
    head in bfloat16 or float16 is copied to float32 for the call, and the logits are float32.

    Args:
        input_ids: ``[batch, seq]``.
        attention_mask: ``[batch, seq]``, or ``[batch, past + seq]`` with a cache; ``None`` where nothing is padded.
        rows: ``[num_scored]``, which row of the batch.
        positions: ``[num_scored]``, which token of ``input_ids`` (not counting what a cache holds).
        forward_kwargs: handed to the model's forward: ``position_ids``, or a cache under its name
            (``**{model.cache_argument: cache, "use_cache": True}``).

    Raises:
        ModelError: the model's head is not called once on the hidden states, so nothing could be gathered.
    """
    head = model.hf.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model.hf).__name__} has no output embedding, so it cannot score tokens.")
    calls, wide = 0, ExitStack()

    def gather(head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        hidden = args[0] if args else None  # [batch, seq, d_model]
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != input_ids.shape:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else "no tensor"
            raise ModelError(
                f"The head of {type(model.hf).__name__} reads {shape}; expected hidden states of shape "
                f"{(*input_ids.shape, 'd_model')}, one per token."
            )
        calls += 1
        picked = hidden[rows.to(hidden.device), positions.to(hidden.device)]  # [num_scored, d_model]
        if wide.enter_context(_in_float32(head)):
            picked = picked.float()
        return (picked.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    with wide:
        wide.callback(handle.remove)
        arguments: dict[str, Any] = {"use_cache": False, "return_dict": True, **forward_kwargs}
        logits: Tensor = model.hf(input_ids=input_ids, attention_mask=attention_mask, **arguments).logits
    if calls != 1:
        raise ModelError(
            f"{type(model.hf).__name__} called its output embedding {calls} times in one forward pass; expected once."
        )
    return logits[0]  # [num_scored, vocab]


@contextmanager
def _in_float32(head: nn.Module) -> Iterator[bool]:
    """The head with its bfloat16 or float16 parameters in float32, inside the block only. Yields whether it has any.

    Other modules that share a parameter keep it as it is.
    """
    narrow = [
        (module._parameters, name, parameter)
        for module in head.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16)
    ]
    try:
        for parameters, name, parameter in narrow:
            parameters[name] = parameter.float()  # type: ignore[assignment]  # a module reads it as it reads a parameter
        yield bool(narrow)
    finally:
        for parameters, name, parameter in narrow:
            parameters[name] = parameter
