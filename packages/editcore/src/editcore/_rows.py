"""Rows of tokens prepared so that the value optimisation computes only what δ can change.

Two things never see δ: tokens before the lookup token, and blocks below the edited one. A prepared chunk therefore
keeps the key/value cache of every row's prefix and the hidden states that enter the edited block, and each
optimisation step runs the model on the tails alone. No code here knows an architecture: the model's own forward runs,
with the blocks below the edited one standing aside. Whether a family fits is decided by comparing logits, once per
model and layer.

Shapes: ``rows`` of one chunk, ``tail`` tokens from the lookup token on, ``past`` tokens before it (left-padded).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from editcore._forward import cache_argument, logits_at
from editcore.tracing import TokenRow, hooks, pad_rows, standing_aside

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["PreparedRows", "forward_logits", "prepare_plain", "prepare_tails"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRows:
    """A chunk of rows, ready to be run with any δ."""

    ids: Tensor
    """``[rows, tail]``"""
    mask: Tensor
    """``[rows, past + tail]``"""
    positions: Tensor
    """``[rows, tail]`` position of each token in its own row."""
    lookup: Tensor
    """``[rows]`` column of the lookup token in ``ids``."""
    hidden: Tensor | None = None
    """``[rows, tail, d_model]`` what enters the edited block; ``None`` to run the blocks below it."""
    past: tuple[tuple[Tensor, Tensor], ...] | None = None
    """Per block: keys and values of the prefix, ``[rows, heads, past, width]``."""
    tuples: bool = False
    """Whether blocks return a tuple."""

    def select(self, rows: Tensor) -> PreparedRows:
        """The same for some rows."""
        return replace(
            self,
            ids=self.ids[rows],
            mask=self.mask[rows],
            positions=self.positions[rows],
            lookup=self.lookup[rows],
            hidden=None if self.hidden is None else self.hidden[rows],
            past=None if self.past is None else tuple((k[rows], v[rows]) for k, v in self.past),
        )


class _PrefixLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of a prefix, to which a forward pass appends its own without keeping them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def prepare_plain(model: LanguageModel, rows: Sequence[TokenRow]) -> PreparedRows:
    """Whole rows, right-padded: what every model can run."""
    ids, mask = pad_rows([row.ids for row in rows], model.pad_id, device=model.device)
    lookup = torch.tensor([row.lookup for row in rows], device=model.device)
    return PreparedRows(ids=ids, mask=mask, positions=_positions(mask), lookup=lookup)


@torch.no_grad()
def prepare_tails(model: LanguageModel, rows: Sequence[TokenRow], layer: int) -> PreparedRows:
    """The tails of the rows, with what their prefixes and the lower blocks computed.

    One forward pass over ``[left padding | prefix | tail | right padding]``: every lookup token lands in one column.
    """
    past = max(1, *(row.lookup for row in rows))
    lined_up = [[model.pad_id] * (past - row.lookup) + list(row.ids) for row in rows]
    ids, mask = pad_rows(lined_up, model.pad_id, device=model.device)
    for index, row in enumerate(rows):
        mask[index, : past - row.lookup] = 0
    positions = _positions(mask)
    cache = DynamicCache()
    entered: list[Tensor] = []
    tuples: list[bool] = []

    def on_entry(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    def on_exit(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        tuples.append(isinstance(output, tuple))

    with hooks() as handles:
        handles.append(model.block(layer).register_forward_pre_hook(on_entry, with_kwargs=True))
        handles.append(model.block(layer).register_forward_hook(on_exit))
        arguments = {cache_argument(model.hf): cache, "use_cache": True}
        if _takes_positions(model):
            arguments["position_ids"] = positions
        model.hf.base_model(input_ids=ids, attention_mask=mask, **arguments)
    kept = tuple((entry.keys[..., :past, :], entry.values[..., :past, :]) for entry in cache.layers)
    return PreparedRows(
        ids=ids[:, past:],
        mask=mask,
        positions=positions[:, past:],
        lookup=torch.zeros(len(rows), dtype=torch.long, device=model.device),
        hidden=entered[0][:, past:].contiguous() if layer > 0 else None,
        past=kept,
        tuples=tuples[0],
    )


def _takes_positions(model: LanguageModel) -> bool:
    return "position_ids" in inspect.signature(model.hf.forward).parameters


def forward_logits(
    model: LanguageModel,
    prepared: PreparedRows,
    layer: int,
    delta: Tensor,
    rows: Tensor,
    positions: Tensor,
) -> Tensor:
    """Logits ``[num_scored, vocab]`` with ``delta[i]`` added to the projection's output at row i's lookup token.

    Args:
        delta: ``[rows, d_out]``, one per row of ``prepared``.
        rows, positions: ``[num_scored]``, scored tokens as indices into ``prepared.ids``.
    """
    columns = torch.arange(prepared.ids.shape[1], device=prepared.ids.device)
    at_lookup = (columns[None, :] == prepared.lookup[:, None])[..., None]  # [rows, tail, 1]

    def add_delta(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        added = torch.where(
            at_lookup.to(output.device), delta[:, None, :].to(output), torch.zeros((), dtype=output.dtype)
        )
        return output + added.reshape(output.shape)

    arguments: dict[str, Any] = {}
    if _takes_positions(model):
        arguments["position_ids"] = prepared.positions
    if prepared.past is not None:
        cache = DynamicCache()
        cache.layers = [_PrefixLayer(keys, values) for keys, values in prepared.past]
        arguments |= {cache_argument(model.hf): cache, "use_cache": True}
    with hooks() as handles, standing_aside(model, layer, prepared.hidden, tuples=prepared.tuples):
        handles.append(model.projection(layer).register_forward_hook(add_delta))
        return logits_at(model, prepared.ids, prepared.mask, rows, positions, **arguments)


def fits(model: LanguageModel, rows: Sequence[TokenRow], layer: int, *, tolerance: float = 1e-3) -> bool:
    """Whether the tails give the logits of the whole rows, with and without a δ.

    The tolerance is relative to the spread of the logits, wide enough for float32 rounding in another order of sums,
    far too narrow for a wrong mask, position or skipped block.
    """
    whole = prepare_plain(model, rows)
    try:
        tails = prepare_tails(model, rows, layer)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # a family without a standard key/value cache
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(rows), model.layout.d_model, generator=generator).to(model.device)
    index = torch.arange(len(rows), device=model.device)
    last = torch.tensor([len(row.ids) - 1 for row in rows], device=model.device)
    shift = torch.tensor([row.lookup for row in rows], device=model.device)
    with torch.no_grad():
        for delta in (torch.zeros_like(noise), noise):
            expected = forward_logits(model, whole, layer, delta, index, last)
            try:
                found = forward_logits(model, tails, layer, delta, index, last - shift)
            except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
                return False
            spread = (expected.max() - expected.min()).clamp_min(1e-6)
            if not bool(((found - expected).abs().max() / spread) < tolerance):
                return False
    return True
