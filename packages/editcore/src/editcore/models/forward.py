"""The model's own forward pass, with the head run only where logits are wanted.

A language-model head costs ``d_model x vocab`` per token; for a small model it is most of a forward pass, and the
logits of a batch are its largest tensor. Scoring and the value optimisation read a few positions per row.

The gather happens at the input of the output embedding, so everything an architecture does around it (soft-caps, scaled
heads, head biases, final norms) is the model's own code and stays as it is.

Shapes: ``batch`` rows of ``seq`` tokens, ``num_scored`` positions, ``d_model``, ``vocab``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

    Gradients flow unless the caller forbids them (``torch.inference_mode``). Nothing is kept: no cache is made unless
    one is handed in.

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
    calls = 0

    def gather(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
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
        return (picked.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        arguments: dict[str, Any] = {"use_cache": False, "return_dict": True, **forward_kwargs}
        logits: Tensor = model.hf(input_ids=input_ids, attention_mask=attention_mask, **arguments).logits
    finally:
        handle.remove()
    if calls != 1:
        raise ModelError(
            f"{type(model.hf).__name__} called its output embedding {calls} times in one forward pass; expected once."
        )
    return logits[0]  # [num_scored, vocab]
