"""What enters and leaves linear modules where targets are predicted, from one forward pass with its backward.

Shapes: ``tokens`` target tokens of all facts, ``d_in`` and ``d_out`` the widths of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from editcore import EditRequest, LanguageModel
from editcore.models import asking_for_gradients, first_tensor, hooks, target_tokens
from torch import Tensor, nn

__all__ = ["ModuleTokens", "read_tokens"]


@dataclass(frozen=True, slots=True)
class ModuleTokens:
    """Inputs and gradients of one module at the positions whose logits predict target tokens."""

    inputs: Tensor
    """h, ``[tokens, d_in]`` float64."""
    gradients: Tensor
    """g: the gradient of the sum over facts of the mean loss, with respect to the output, ``[tokens, d_out]``
    float64."""

    @classmethod
    def join(cls, parts: Sequence[ModuleTokens]) -> ModuleTokens:
        """The tokens of all parts."""
        return cls(torch.cat([part.inputs for part in parts]), torch.cat([part.gradients for part in parts]))


def read_tokens(
    model: LanguageModel, requests: Sequence[EditRequest], addresses: Sequence[str], *, minibatch: int
) -> tuple[dict[str, ModuleTokens], list[int]]:
    """By address, what its module reads and what the loss asks of its output; and how many tokens each fact has.

    Args:
        minibatch: facts of one forward pass.

    Raises:
        RequestError: as :func:`editcore.models.target_tokens`.
    """
    found = [
        _read_pass(model, requests[start : start + minibatch], addresses)
        for start in range(0, len(requests), minibatch)
    ]
    joined = {address: ModuleTokens.join([tokens[address] for tokens, _ in found]) for address in addresses}
    return joined, [length for _, lengths in found for length in lengths]


def _read_pass(
    model: LanguageModel, requests: Sequence[EditRequest], addresses: Sequence[str]
) -> tuple[dict[str, ModuleTokens], tuple[int, ...]]:
    targets = target_tokens(model, requests)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def on_module(address: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen[address] = args[0].detach(), first_tensor(output)

        return hook

    with hooks() as handles, asking_for_gradients(model, addresses):
        for address in addresses:
            module = model.hf.get_submodule(address.removesuffix(".weight"))
            handles.append(module.register_forward_hook(on_module(address)))
        loss = targets.losses(model).sum()
        gradients = torch.autograd.grad(loss, [seen[address][1] for address in addresses])

    def at_targets(hidden: Tensor) -> Tensor:
        whole = hidden.reshape(*targets.input_ids.shape, -1)  # some modules see rows and positions flattened
        return whole[targets.rows.to(hidden.device), targets.positions.to(hidden.device)].double()

    found = {
        address: ModuleTokens(at_targets(seen[address][0]), at_targets(gradient))
        for address, gradient in zip(addresses, gradients, strict=True)
    }
    return found, targets.lengths
