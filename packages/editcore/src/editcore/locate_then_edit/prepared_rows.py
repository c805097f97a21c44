"""One forward pass of the value optimisation: rows of tokens, with δ at their lookup tokens.

A row is run from its lookup token on if the keys and values of the tokens before it are cached
(:mod:`editcore.locate_then_edit.cached_prefixes`), otherwise whole. No code here depends on an architecture: the
model's own forward runs.

Shapes: ``rows`` of one pass, ``tail`` tokens from the lookup token on, ``past`` tokens before it (left-padded).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from editcore.locate_then_edit.windows import PlantedRow
from editcore.models.encoding import pad_rows
from editcore.models.forward import logits_at
from editcore.models.module_hooks import first_tensor, hooks
from editcore.models.passes import skip_first_blocks, stop_after
from editcore.models.tokens import TokenRow

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = [
    "EditedBlock",
    "KeysValues",
    "Prefixes",
    "PreparedRows",
    "logits_with_delta",
    "positions_of",
    "run_new_tokens",
    "run_to_edited_block",
    "whole_rows",
]

KeysValues = Sequence[tuple[Tensor, Tensor]]
"""Per block: keys and values of tokens without padding, ``[tokens, heads, width]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedBlock:
    """Outputs of the edited block without δ."""

    outputs: Tensor
    """``[rows, tail, d_model]`` output of the block."""
    projected: Tensor
    """``[rows, d_out]`` output of its projection at the lookup token."""
    returns_tuple: bool
    """Whether blocks of this model return a tuple."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """The tokens before the tails. Their keys and values are gathered block by block while a pass runs."""

    blocks: KeysValues
    slots: Tensor
    """``[rows, past]`` indices of tokens in ``blocks``; any index where the mask is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRows:
    """Rows of one pass, ready to be run with any δ."""

    ids: Tensor
    """``[rows, tail]``"""
    mask: Tensor
    """``[rows, past + tail]``"""
    positions: Tensor
    """``[rows, tail]`` position of each token in its own row."""
    lookup: Tensor
    """``[rows]`` column of the lookup token in ``ids``."""
    planted: Tensor | None = None
    """``[rows, tail, d_out]``, what is added to the projection's output beside δ; ``None`` for nothing. Whole rows
    only."""
    edited: EditedBlock | None = None
    """``None`` to run whole rows through all blocks."""
    prefixes: Prefixes | None = None


def whole_rows(model: LanguageModel, rows: Sequence[TokenRow]) -> PreparedRows:
    """Whole rows, right-padded, which every model can run."""
    ids, mask = pad_rows([row.ids for row in rows], model.pad_id, device=model.device)
    lookup = torch.tensor([row.lookup for row in rows], device=model.device)
    planted = None
    if any(isinstance(row, PlantedRow) and row.planted for row in rows):
        planted = torch.zeros(*ids.shape, model.layout.d_model, device=model.device)
        for place, row in enumerate(rows):
            for token, delta in row.planted if isinstance(row, PlantedRow) else ():
                planted[place, token] = delta.to(planted)
    return PreparedRows(ids=ids, mask=mask, positions=positions_of(mask), lookup=lookup, planted=planted)


def positions_of(mask: Tensor) -> Tensor:
    """Position of each token in its own row; 0 for padding in front."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def logits_with_delta(
    model: LanguageModel, prepared: PreparedRows, *, layer: int, delta: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """Logits ``[num_scored, vocab]`` with ``delta[i]`` added to the projection's output at row i's lookup token.

    Args:
        delta: ``[rows, d_out]``, one per row of ``prepared``.
        rows, positions: ``[num_scored]``, scored tokens as indices into ``prepared.ids``.
    """
    arguments: dict[str, Any] = {}
    if _takes_positions(model):
        arguments["position_ids"] = prepared.positions
    if prepared.edited is None or prepared.prefixes is None:
        with hooks() as handles:
            handles.append(model.projection(layer).register_forward_hook(_adding(delta, prepared)))
            return logits_at(model, prepared.ids, prepared.mask, rows, positions, **arguments)
    arguments |= {model.cache_argument: _prefix_cache(prepared.prefixes), "use_cache": True}
    hidden = _edited_output(model, layer, prepared.edited, delta)
    with skip_first_blocks(model, layer + 1, hidden, returns_tuple=prepared.edited.returns_tuple):
        return logits_at(model, prepared.ids, prepared.mask, rows, positions, **arguments)


def run_to_edited_block(model: LanguageModel, layer: int, rows: PreparedRows) -> EditedBlock:
    """Run the blocks up to ``layer`` on the tails, without δ."""
    assert rows.prefixes is not None
    projected: list[Tensor] = []
    block_outputs: list[Any] = []

    def on_projection(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        projected.append(output)

    def on_block(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        block_outputs.append(output)

    with hooks() as handles:
        handles.append(model.projection(layer).register_forward_hook(on_projection))
        handles.append(model.block(layer).register_forward_hook(on_block))
        with stop_after(model, layer):
            _run_decoder(model, rows.ids, rows.mask, rows.positions, _prefix_cache(rows.prefixes))
    outputs = first_tensor(block_outputs[0])
    return EditedBlock(
        outputs=outputs,
        projected=projected[0].reshape(*outputs.shape[:2], -1)[:, 0],
        returns_tuple=isinstance(block_outputs[0], tuple),
    )


def run_new_tokens(
    model: LanguageModel, ids: Tensor, mask: Tensor, prefixes: Prefixes | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, in all blocks, of the tokens ``ids [rows, seq]`` behind their prefixes: two tensors
    ``[rows, heads, seq, width]`` per block.

    Args:
        mask: ``[rows, past + seq]``.
    """
    positions = positions_of(mask)[:, mask.shape[1] - ids.shape[1] :]
    if prefixes is None:
        cache = DynamicCache()
        _run_decoder(model, ids, mask, positions, cache)
        return [(layer.keys, layer.values) for layer in cache.layers]
    cache = _prefix_cache(prefixes, _RecordingLayer)
    _run_decoder(model, ids, mask, positions, cache)
    return [layer.appended for layer in cache.layers]


class _PrefixLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of a prefix. A forward pass sees its own keys and values after them, but they are not kept."""

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slots = keys, values, slots
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def get_seq_length(self, *_args: Any) -> int:
        return self.slots.shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        slots = self.slots.to(self.keys.device)  # a later block may be on another device
        keys, values = (tokens[slots].transpose(1, 2) for tokens in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class _RecordingLayer(_PrefixLayer):
    """A prefix layer that also records the keys and values of the pass, ``[rows, heads, tokens, width]`` each."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.appended = key_states, value_states
        return super().update(key_states, value_states)


def _prefix_cache(prefixes: Prefixes, layer: type[_PrefixLayer] = _PrefixLayer) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [layer(keys, values, prefixes.slots) for keys, values in prefixes.blocks]
    return cache


def _run_decoder(model: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> None:
    """Run the decoder without its head."""
    arguments: dict[str, Any] = {model.cache_argument: cache, "use_cache": True}
    if _takes_positions(model):
        arguments["position_ids"] = positions
    model.hf.base_model(input_ids=ids, attention_mask=mask, **arguments)


def _takes_positions(model: LanguageModel) -> bool:
    return "position_ids" in inspect.signature(model.hf.forward).parameters


def _adding(delta: Tensor, prepared: PreparedRows) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A hook that adds ``delta [rows, d_out]`` to a projection's output at the lookup tokens."""
    columns = torch.arange(prepared.ids.shape[1], device=prepared.ids.device)
    at_lookup = (columns[None, :] == prepared.lookup[:, None])[..., None]  # [rows, tail, 1]

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        added = torch.where(
            at_lookup.to(output.device), delta[:, None, :].to(output), torch.zeros((), dtype=output.dtype)
        )
        if prepared.planted is not None:
            added = added + prepared.planted.to(output)
        return output + added.reshape(output.shape)

    return hook


def _edited_output(model: LanguageModel, layer: int, edited: EditedBlock, delta: Tensor) -> Tensor:
    """Output of the edited block with δ, ``[rows, tail, d_model]``.

    The block adds its projection's output o to the residual stream, scaled or through a norm P, and nothing else reads
    o. So δ changes the block's output at the lookup token, which is column 0, by P(o + δ) − P(o).
    """
    projected = edited.projected
    moved = projected + delta.to(projected)
    if model.layout.post_norm:
        norm = model.hf.get_submodule(model.layout.post_norm.format(layer))
        change = norm(moved) - norm(projected)
    else:
        change = (moved - projected) * model.layout.residual_scale
    return torch.cat([edited.outputs[:, :1] + change[:, None], edited.outputs[:, 1:]], dim=1)
