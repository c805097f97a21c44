"""How much a text depends on each direction of a projection's output: F, a second moment of gradients.

With g_t the gradient of the text's negative log-likelihood with respect to the output for token t, and ĝ = g / ‖g‖,

    F = d · mean over tokens of ĝ ĝᵀ,

so that its mean eigenvalue is 1. Gradients of text have heavy tails: 1 % of the tokens have a quarter of Σ‖g‖². Only
their directions count here, so every token counts alike. Without that, F is the Fisher information of the output where
the text is the model's own, because its tokens are then samples of what the model predicts.

Shapes: ``d_out`` the width of the projection's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editcore._util.memory import in_halves
from editcore.interfaces.progress import Progress, silent
from editcore.models.module_hooks import hooks
from editcore.models.planning import PassBudget

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["gradient_moments"]


def gradient_moments(
    model: LanguageModel, sequences: Tensor, layers: Sequence[int], *, progress: Progress = silent
) -> dict[int, Tensor]:
    """F of each layer, ``[d_out, d_out]`` float64 on the CPU, over ``sequences [n, seq]`` (no padding).

    The first token of a sequence is left out, because it has other activations than all tokens behind it, and so is the
    last one, on whose output no prediction of the text depends.
    """
    width = model.layout.d_model
    totals = {layer: torch.zeros(width, width, dtype=torch.float64) for layer in layers}
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            # The lowest one begins the graph: no gradient is computed below it.
            outputs[layer] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[layer]

        return hook

    def run(rows: Sequence[Tensor]) -> list[dict[int, Tensor]]:
        ids = torch.stack(list(rows)).to(model.device)
        with torch.enable_grad(), hooks() as handles:
            for layer in layers:
                handles.append(model.projection(layer).register_forward_hook(keep(layer)))
            logits = model.hf(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
        outputs.clear()
        products = {}
        for layer, gradient in zip(layers, gradients, strict=True):
            seen = gradient[:, 1:-1].reshape(-1, width).float()
            directions = seen / seen.norm(dim=1, keepdim=True).clamp_min(torch.finfo(seen.dtype).tiny)
            products[layer] = directions.T @ directions  # [d_out, d_out]
        return [products]

    length = sequences.shape[1]
    with progress.task("gradients of the text", sequences.numel()) as advance:
        for part in torch.split(sequences, PassBudget.backward(model, min(layers)).rows(length, scored=length)):
            for found in in_halves(run, list(part)):
                for layer, product in found.items():
                    totals[layer] += product.to(totals[layer])
            advance(part.numel())
    return {layer: total * width / (len(sequences) * (length - 2)) for layer, total in totals.items()}
