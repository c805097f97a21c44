"""Runs a model on a few random tokens, to see what its modules do.

How the MLP output projection is found: the first block runs once on a few random tokens. The output of each of its
linear modules is detached from the graph that made it. So the gradient of the input of a linear module reaches only the
linear modules that this input depends on *directly*, and it shows at which tokens:

* an attention's output projection depends on queries, keys and values at other tokens;
* queries, keys, values, gates and up-projections feed another linear module of the block;
* the MLP output projection depends on up-projections at its own token only, feeds none, and is ``d_model`` wide.

This holds for sequential and parallel blocks, gated and plain MLPs, fused and separate projections.

Shapes: ``tokens`` of one probe text, ``d_model`` the residual stream.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editcore.interfaces.errors import ModelError
from editcore.models.module_hooks import hooks, replace_first

__all__ = [
    "BlockCall",
    "BlockParts",
    "Reading",
    "block_calls",
    "hidden_states",
    "is_norm",
    "is_projection",
    "model_type",
    "module_at",
    "probe_block",
    "probe_logits",
    "readings_of",
    "rounding_tolerance",
    "token_rows",
]

_PROBE_TOKENS = 6
_PROBE_SEED = 20240501


def model_type(hf_model: Any) -> str:
    """The ``model_type`` of the configuration, or else the name of the class."""
    return str(getattr(hf_model.config, "model_type", type(hf_model).__name__))


def module_at(hf_model: Any, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        ModelError: there is none.
    """
    try:
        module: nn.Module = hf_model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{type(hf_model).__name__} has no module '{path}'.") from None
    return module


class _Stop(Exception):  # noqa: N818  a signal, not an error
    """Ends a forward pass before the last block of interest runs."""


def hidden_states(output: Any) -> Tensor:
    """The tensor that a module returns, alone or first in a tuple.

    Raises:
        ModelError: it returns something else.
    """
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, Tensor):
        raise ModelError(f"A module of the model returns a {type(tensor).__name__}; a tensor was expected.")
    return tensor


def token_rows(tensor: Tensor) -> Tensor:
    """``[tokens, width]``. The probe is one text, and some modules see it without a batch axis."""
    return tensor.reshape(-1, tensor.shape[-1])


def random_like(*shape: int, like: Tensor) -> Tensor:
    """Seeded normal numbers, in the type and on the device of another tensor."""
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    return torch.randn(*shape, generator=generator).to(like)


def probe_logits(hf_model: Any) -> Tensor:
    """The logits of a forward pass on the probe text, ``[1, tokens, vocab]``."""
    embedding = hf_model.get_input_embeddings()
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    ids = torch.randint(embedding.weight.shape[0], (1, _PROBE_TOKENS), generator=generator)
    logits: Tensor = hf_model(input_ids=ids.to(embedding.weight.device), use_cache=False).logits
    return logits


BlockCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block."""


@torch.no_grad()
def block_calls(hf_model: Any, blocks: str, layers: Sequence[int]) -> list[BlockCall]:
    """The arguments of each block in ``layers`` in one forward pass on the probe text."""
    caught: dict[int, BlockCall] = {}

    def catch(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught[layer] = (args, kwargs)
            if layer == layers[-1]:
                raise _Stop

        return hook

    with hooks() as handles:
        for layer in layers:
            block = module_at(hf_model, blocks.format(layer))
            handles.append(block.register_forward_pre_hook(catch(layer), with_kwargs=True))
        with contextlib.suppress(_Stop):
            probe_logits(hf_model)
    if missing := [layer for layer in layers if layer not in caught]:
        raise ModelError(f"'{blocks.format(missing[0])}' does not run when {type(hf_model).__name__} reads text.")
    return [caught[layer] for layer in layers]


def _linears(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


@dataclass(frozen=True, slots=True)
class Reading:
    """One linear module of a block, as it ran."""

    width: int
    """Numbers it writes per token."""
    own: frozenset[str]
    """Linear modules whose output at a token it reads at that same token."""
    other: frozenset[str]
    """Linear modules whose output at other tokens it reads."""


def readings_of(block: nn.Module, call: BlockCall, *, since: str = "") -> tuple[dict[str, Reading], int]:
    """What each linear module of a block reads, in the order of running, and the width of the block's output.

    Args:
        since: leave out the modules that ran before this one. They cannot read its output.
    """
    args, kwargs = call
    inputs: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def cut(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            inputs[name] = args[0]
            # The graph starts at this leaf. The block gets a clone, which it may change in place (Falcon does).
            leaves[name] = hidden_states(output).detach().requires_grad_(True)
            return replace_first(output, leaves[name].clone())

        return hook

    with hooks() as handles, torch.enable_grad():
        for name, module in _linears(block).items():
            handles.append(module.register_forward_hook(cut(name)))
        width = hidden_states(block(*args, **kwargs)).shape[-1]
    order = list(leaves)
    wanted = order[order.index(since) :] if since in leaves else order
    return {name: _reading(name, inputs, leaves) for name in wanted}, width


def _reading(name: str, inputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Reading:
    width = leaves[name].shape[-1]
    if not inputs[name].requires_grad:
        return Reading(width, frozenset(), frozenset())
    rows = token_rows(inputs[name])
    last = rows[-1].float()
    gradients = torch.autograd.grad(
        (last * random_like(last.numel(), like=last)).sum(), list(leaves.values()), retain_graph=True, allow_unused=True
    )
    own, other = set(), set()
    for source, gradient in zip(leaves, gradients, strict=True):
        if gradient is None or source == name:
            continue
        touched = token_rows(gradient).abs().amax(dim=-1) > 0  # [tokens]
        if bool(touched[-1]):
            own.add(source)
        if bool(touched[:-1].any()):
            other.add(source)
    return Reading(width, frozenset(own), frozenset(other))


def is_projection(name: str, readings: Mapping[str, Reading], d_model: int) -> bool:
    """Whether a linear module behaves like the MLP output projection of its block."""
    reading = readings[name]
    feeds = any(name in (other.own | other.other) for other in readings.values())
    return reading.width == d_model and bool(reading.own) and not reading.other and not feeds


def rounding_tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding may cause: a few hundred rounding steps. A wrong layout is off by about 1."""
    return max(256 * torch.finfo(dtype).eps, 1e-9) if dtype in (torch.float32, torch.float64) else 0.04


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class. What it does is checked by running it."""
    return re.search(r"norm", type(module).__name__, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True)
class BlockParts:
    """What a block shows when it runs with and without its projection's output."""

    norm: str
    """Path, relative to the block, of the norm after the projection; empty if there is none."""
    scale: float
    """Factor of the projection's output in the sum, by least squares."""
    error: float
    """Largest difference between the sum of the parts and the whole, relative to the largest number among them."""
    dtype: torch.dtype
    """Of the block's numbers, on which the tolerance depends."""


def probe_block(block: nn.Module, call: BlockCall, projection: str) -> BlockParts:
    """Run a block with its projection's output and with zero in its place, and compare.

    Args:
        projection: its path, relative to the block.

    Raises:
        ModelError: the projection does not run.
    """
    whole = _run_parts(block, projection, call, zero=False)
    rest = _run_parts(block, projection, call, zero=True)
    if whole.projection is None:
        raise ModelError(f"'{projection}' does not run when its {type(block).__name__} does.")
    norm, after_addition = _norm_behind(whole)
    if not norm:
        part, total, without = whole.projection, whole.output, rest.output
    elif after_addition:
        part, total, without = whole.projection, whole.norms[norm][0], rest.norms[norm][0]
    else:
        part, total, without = whole.norms[norm][1] - rest.norms[norm][1], whole.output, rest.output
    dtype = part.dtype
    tolerance = rounding_tolerance(dtype)
    part, total, without = (token_rows(tensor).double() for tensor in (part, total, without))
    difference = total - without
    scale = float((difference * part).sum() / part.square().sum().clamp_min(1e-300))
    scale = 1.0 if abs(scale - 1.0) < 4 * tolerance else float(f"{scale:.6g}")
    deviation = (difference - scale * part).abs().max()
    size = torch.stack([total.abs().max(), without.abs().max(), (scale * part).abs().max()]).max()
    return BlockParts(norm, scale, float(deviation / size.clamp_min(1e-300)), dtype)


@dataclass(slots=True)
class _BlockRun:
    output: Tensor
    projection: Tensor | None
    norms: dict[str, tuple[Tensor, Tensor]]
    """By path: input and output of each norm that ran after the projection, in order."""


def _run_parts(block: nn.Module, projection: str, call: BlockCall, *, zero: bool) -> _BlockRun:
    args, kwargs = call
    seen = _BlockRun(torch.empty(0), None, {})

    def on_projection(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        seen.projection = hidden_states(output).clone()
        seen.norms.clear()
        return replace_first(output, torch.zeros_like(hidden_states(output))) if zero else None

    def on_norm(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if seen.projection is not None and args and isinstance(args[0], Tensor):
                seen.norms[name] = (args[0].clone(), hidden_states(output).clone())

        return hook

    with hooks() as handles, torch.no_grad():
        handles.append(block.get_submodule(projection).register_forward_hook(on_projection))
        for name, module in block.named_modules():
            if name and is_norm(module):
                handles.append(module.register_forward_hook(on_norm(name)))
        seen.output = hidden_states(block(*args, **kwargs)).clone()
    return seen


def _norm_behind(whole: _BlockRun) -> tuple[str, bool]:
    """The norm after the projection (empty if there is none), and whether it follows the addition to the stream.

    It reads the projection's output; or, after the addition, it writes the block's output.
    """
    assert whole.projection is not None
    for name, (before, after) in whole.norms.items():
        if before.numel() == whole.projection.numel() and torch.equal(token_rows(before), token_rows(whole.projection)):
            return name, False
        if after.numel() == whole.output.numel() and torch.equal(token_rows(after), token_rows(whole.output)):
            return name, True
    return "", False
