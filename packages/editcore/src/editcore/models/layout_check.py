"""Checks a layout against a forward pass, in every block."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editcore.interfaces.errors import ModelError
from editcore.models.layout import ModelLayout, stored_orientation
from editcore.models.layout_probes import (
    BlockCall,
    block_calls,
    hidden_states,
    is_projection,
    module_at,
    probe_block,
    probe_logits,
    readings_of,
    rounding_tolerance,
    token_rows,
)
from editcore.models.module_hooks import hooks

__all__ = ["CHECKS", "check_layout"]

logger = logging.getLogger(__name__)

CHECKS = (
    "weight times input is output, in every block",
    "the projection reads one token and nothing reads it",
    "the parts of every block add up to its output",
    "final norm and head give the logits, or their ranking",
)
"""What :func:`check_layout` checks."""


def check_layout(hf_model: Any, layout: ModelLayout) -> None:
    """Run the model on a few random tokens and check the layout in every block.

    Four conditions must hold, up to rounding:

    1. The projection's weight, in the declared orientation, and its bias turn the observed input into the observed
       output.
    2. The projection's input at a token comes from up-projections at that token alone, and no linear module of the
       block reads its output. (An attention's output projection fails this, in parallel blocks too.)
    3. The parts of the block add up to its output: ``block(x) = rest(x) + scale · p``. Here ``p`` is the projection's
       output, and ``rest`` is the block run with ``p`` replaced by zero. If a norm reads the projection, ``norm(p)``
       and ``norm(0)`` take the places of ``p`` and zero. If a norm follows the addition, the sum is the norm's input.
    4. Final norm and head turn the output of the last block into the logits, or into numbers of the same ranking where
       the model scales or soft-caps its logits.

    Raises:
        ModelError: a condition does not hold.
    """
    for layer in range(layout.num_layers):
        name = layout.projection.format(layer)
        module = module_at(hf_model, name)
        if stored_orientation(module, name) != layout.orientation:
            raise ModelError(
                f"'{name}' is a {type(module).__name__}, which stores its weight {stored_orientation(module, name)}; "
                f"the layout says {layout.orientation}."
            )
    run = _run_model(hf_model, layout)
    calls = block_calls(hf_model, layout.blocks, range(layout.num_layers))
    for layer, call in enumerate(calls):
        block = module_at(hf_model, layout.blocks.format(layer))
        _check_arithmetic(module_at(hf_model, layout.projection.format(layer)), layout, layer, run)
        _check_token_wise(block, call, layout, layer)
        _check_sum(block, call, layout, layer)
    _check_head(hf_model, layout, run)


@dataclass(slots=True)
class _ModelRun:
    inputs: dict[int, Tensor]
    outputs: dict[int, Tensor]
    last_block: Tensor
    logits: Tensor


def _run_model(hf_model: Any, layout: ModelLayout) -> _ModelRun:
    run = _ModelRun({}, {}, torch.empty(0), torch.empty(0))

    def on_projection(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            run.inputs[layer], run.outputs[layer] = args[0].clone(), hidden_states(output).clone()

        return hook

    def on_last(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        run.last_block = hidden_states(output).clone()

    with hooks() as handles, torch.no_grad():
        for layer in range(layout.num_layers):
            module = module_at(hf_model, layout.projection.format(layer))
            handles.append(module.register_forward_hook(on_projection(layer)))
        last = module_at(hf_model, layout.blocks.format(layout.num_layers - 1))
        handles.append(last.register_forward_hook(on_last))
        run.logits = probe_logits(hf_model)
    return run


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    error = (actual.double() - expected.double()).abs().max()
    return bool(error <= rounding_tolerance(expected.dtype) * expected.double().abs().max())


@torch.no_grad()
def _check_arithmetic(module: Any, layout: ModelLayout, layer: int, run: _ModelRun) -> None:
    name = layout.projection.format(layer)
    if layer not in run.inputs:
        raise ModelError(f"'{name}' does not run when the model reads text.")
    weight = module.weight if layout.orientation == "out_in" else module.weight.T  # [d_model, d_ff]
    if tuple(weight.shape) != (layout.d_model, layout.d_ff):
        raise ModelError(
            f"'{name}' is {tuple(weight.shape)} as (out, in); the layout says ({layout.d_model}, {layout.d_ff})."
        )
    bias = getattr(module, "bias", None)
    if (bias is not None) != layout.has_bias:
        raise ModelError(f"'{name}' has {'a' if bias is not None else 'no'} bias; the layout says otherwise.")
    product = token_rows(run.inputs[layer]).double() @ weight.double().T
    if bias is not None:
        product = product + bias.double()
    if not _is_close(product, token_rows(run.outputs[layer])):
        raise ModelError(
            f"'{name}' does not do what its weight says: weight ({layout.orientation}) times input is not its output. "
            "Quantised or wrapped modules cannot be edited."
        )


def _check_token_wise(block: nn.Module, call: BlockCall, layout: ModelLayout, layer: int) -> None:
    name = layout.projection.removeprefix(f"{layout.blocks}.")
    readings, d_model = readings_of(block, call, since=name)
    if name not in readings or not is_projection(name, readings, d_model):
        raise ModelError(
            f"'{layout.projection.format(layer)}' is not an MLP output projection: its input must come from an "
            "up-projection at the same token, and no linear module of the block may read its output."
        )


def _check_sum(block: nn.Module, call: BlockCall, layout: ModelLayout, layer: int) -> None:
    name, path = layout.projection.format(layer), layout.blocks.format(layer)
    parts = probe_block(block, call, layout.projection.removeprefix(f"{layout.blocks}."))
    placement = "post" if parts.norm else "pre"
    post_norm = f"{layout.blocks}.{parts.norm}" if parts.norm else ""
    if placement != layout.norm_placement or post_norm != layout.post_norm:
        found = f"a norm ('{parts.norm}')" if parts.norm else "no norm"
        raise ModelError(
            f"'{path}' has {found} between the MLP output projection and the residual stream; the layout says "
            f"'{layout.norm_placement}'{f' ({layout.post_norm})' if layout.post_norm else ''}."
        )
    tolerance = rounding_tolerance(parts.dtype)
    scale_error = abs(parts.scale - layout.residual_scale) / max(abs(layout.residual_scale), 1e-6)
    if parts.error > tolerance or scale_error > 4 * tolerance:
        raise ModelError(
            f"The parts of '{path}' do not add up to its output (off by {parts.error:.1e} of its size, scale "
            f"{parts.scale:.4g}, expected {layout.residual_scale:.4g}): '{name}' does not write to the residual stream "
            "as an MLP output projection does."
        )


@torch.no_grad()
def _check_head(hf_model: Any, layout: ModelLayout, run: _ModelRun) -> None:
    hidden = run.last_block
    if layout.final_norm:
        hidden = hidden_states(module_at(hf_model, layout.final_norm)(hidden))
    head: Any = module_at(hf_model, layout.head)
    where = f"final norm '{layout.final_norm or 'none'}' and head '{layout.head}'"
    if hidden.shape[-1] != head.weight.shape[-1]:
        logger.info("%s are joined by a projection; the model's own forward is used", where)
        return
    raw = head(hidden)
    if raw.shape == run.logits.shape and _is_close(raw, run.logits):
        return
    ranked = run.logits.gather(-1, raw.argsort(dim=-1)).double()  # ascending if only a scale or a soft-cap is between
    steps_down = (ranked[..., :-1] - ranked[..., 1:]).clamp_min(0).max()
    if steps_down > rounding_tolerance(run.logits.dtype) * ranked.abs().max():
        raise ModelError(f"The {where} do not reproduce the logits of {type(hf_model).__name__}, nor their ranking.")
    logger.info("The logits are a scaled or soft-capped form of what %s give; the model's own forward is used", where)
