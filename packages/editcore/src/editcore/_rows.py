"""Rows of tokens prepared so that the value optimisation computes only what δ can change.

Three things never see δ: tokens before the lookup token, blocks up to the edited one (δ joins its output), and the last
target token, which is asked for and never read. A prepared chunk keeps the keys and values of every row's prefix and
what leaves the edited block for the tokens behind it; each optimisation step runs the model from there on the tails
alone. Beginnings that rows share, which contexts give them, are run once for all. No code here knows an architecture:
the model's own forward runs, with the lower blocks standing aside. Whether a family fits is decided by comparing
logits.

Shapes: ``rows`` of one chunk, ``tail`` tokens from the lookup token on, ``past`` tokens before it (left-padded).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from editcore._forward import cache_argument, logits_at
from editcore.tracing import TokenRow, first_tensor, hooks, pad_rows, standing_aside, stop_after

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["Beginnings", "PreparedRows", "fits", "forward_logits", "passes", "prepare_plain", "prepare_tails"]

_UNFIT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a family without a standard key/value cache raises."""

KeysValues = tuple[tuple[Tensor, Tensor], ...]
"""Per block: keys and values, ``[rows, heads, tokens, width]``."""

_PASS_TOKENS = {"cpu": 70}
"""What a forward pass costs beside its tokens, in tokens, by device type: matrix products of few rows are slower per
row. On two cores products of 64 rows run at 0.65 of the rate of 512."""
_PASS_TOKENS_ELSEWHERE = 2048


def passes(
    lengths: Sequence[int], device: torch.device, *, holds: Callable[[int, int], bool] = lambda _rows, _tokens: True
) -> list[slice]:
    """Cut ascending row lengths into forward passes, each padded to its longest row, so that they cost least.

    Args:
        holds: whether a pass may have so many rows of so many tokens; one row always may.
    """
    overhead = _PASS_TOKENS.get(device.type, _PASS_TOKENS_ELSEWHERE)
    best, cut = [0], [0]
    for end in range(1, len(lengths) + 1):
        longest = lengths[end - 1]
        costs = {end - 1: best[end - 1] + longest + overhead}
        for start in range(end - 2, -1, -1):
            if not holds(end - start, longest):
                break
            costs[start] = best[start] + (end - start) * longest + overhead
        cut.append(min(costs, key=lambda start: (costs[start], start)))
        best.append(costs[cut[-1]])
    found: list[slice] = []
    end = len(lengths)
    while end:
        found.insert(0, slice(cut[end], end))
        end = cut[end]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edited:
    """What the edited block gives without δ."""

    outputs: Tensor
    """``[rows, tail, d_model]`` what leaves the block."""
    projected: Tensor
    """``[rows, d_out]`` what leaves its projection at the lookup token."""
    tuples: bool
    """Whether blocks return a tuple."""


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
    edited: _Edited | None = None
    """``None`` to run whole rows through all blocks."""
    past: KeysValues = ()

    @classmethod
    def join(cls, parts: Sequence[PreparedRows]) -> PreparedRows:
        """Rows of several preparations of one model and layer behind each other (tails only)."""
        past = max(part.past_width for part in parts)
        tail = max(part.ids.shape[1] for part in parts)
        wide = [part.take(torch.arange(len(part.ids), device=part.ids.device), past=past, tail=tail) for part in parts]
        edited = [part.edited for part in wide if part.edited is not None]
        return cls(
            ids=torch.cat([part.ids for part in wide]),
            mask=torch.cat([part.mask for part in wide]),
            positions=torch.cat([part.positions for part in wide]),
            lookup=torch.cat([part.lookup for part in wide]),
            edited=_Edited(
                outputs=torch.cat([part.outputs for part in edited]),
                projected=torch.cat([part.projected for part in edited]),
                tuples=edited[0].tuples,
            ),
            past=tuple(
                (torch.cat([keys for keys, _ in block]), torch.cat([values for _, values in block]))
                for block in zip(*(part.past for part in wide), strict=True)
            ),
        )

    @property
    def past_width(self) -> int:
        """Columns before the lookup token."""
        return self.mask.shape[1] - self.ids.shape[1]

    def take(self, rows: Tensor, *, past: int, tail: int) -> PreparedRows:
        """Some rows, in ``past`` columns before the lookup token and ``tail`` from there on (tails only)."""
        assert self.edited is not None
        # Columns to add; a negative number of them cuts padding off.
        left, right = past - self.past_width, tail - self.ids.shape[1]
        return replace(
            self,
            ids=functional.pad(self.ids[rows], (0, right)),
            mask=functional.pad(self.mask[rows], (left, right)),
            positions=functional.pad(self.positions[rows], (0, right)),
            lookup=self.lookup[rows],
            edited=replace(
                self.edited,
                outputs=functional.pad(_picked(self.edited.outputs, rows), (0, 0, 0, right)),
                projected=_picked(self.edited.projected, rows),
            ),
            past=tuple(
                (
                    functional.pad(_picked(keys, rows), (0, 0, left, 0)),
                    functional.pad(_picked(values, rows), (0, 0, left, 0)),
                )
                for keys, values in self.past
            ),
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


class _GrowingLayer(_PrefixLayer):
    """The same, keeping what is appended."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = super().update(key_states, value_states)
        return self.keys, self.values


def _cache(past: KeysValues, layer: type[_PrefixLayer] = _PrefixLayer) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [layer(keys, values) for keys, values in past]
    return cache


def _run_base(model: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> None:
    """The decoder without its head."""
    arguments: dict[str, Any] = {cache_argument(model.hf): cache, "use_cache": True}
    if _takes_positions(model):
        arguments["position_ids"] = positions
    model.hf.base_model(input_ids=ids, attention_mask=mask, **arguments)


def _takes_positions(model: LanguageModel) -> bool:
    return "position_ids" in inspect.signature(model.hf.forward).parameters


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def prepare_plain(model: LanguageModel, rows: Sequence[TokenRow]) -> PreparedRows:
    """Whole rows, right-padded: what every model can run."""
    ids, mask = pad_rows([row.ids for row in rows], model.pad_id, device=model.device)
    lookup = torch.tensor([row.lookup for row in rows], device=model.device)
    return PreparedRows(ids=ids, mask=mask, positions=_positions(mask), lookup=lookup)


class Beginnings:
    """Keys and values of what many rows begin with, on the model as it is now."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel, groups: Sequence[Sequence[TokenRow]]) -> None:
        """``groups``: rows with a beginning in common, one group per context."""
        found = [_common(rows) for rows in groups]
        self.lengths = [len(ids) for ids in found]
        self.past: KeysValues = ()
        if any(found):
            ids, mask = pad_rows(found, model.pad_id, device=model.device)
            cache = DynamicCache()
            _run_base(model, ids, mask, _positions(mask), cache)
            self.past = tuple((layer.keys, layer.values) for layer in cache.layers)

    def of(self, groups: Tensor, width: int) -> KeysValues:
        """The beginnings of rows of these groups, right-aligned in ``width`` columns."""
        lengths = torch.tensor(self.lengths, device=groups.device)[groups]  # [rows]
        return _columns(self.past, groups, torch.zeros_like(lengths), lengths, width)


def _common(rows: Sequence[TokenRow]) -> tuple[int, ...]:
    """The longest beginning that all rows share and that ends before every lookup token."""
    shared = rows[0].ids[: min(row.lookup for row in rows)]
    for row in rows[1:]:
        same = next((i for i, (a, b) in enumerate(zip(shared, row.ids, strict=False)) if a != b), len(shared))
        shared = shared[:same]
    return shared


def _columns(past: KeysValues, rows: Tensor, start: Tensor, length: Tensor, width: int) -> KeysValues:
    """``length[i]`` columns of row ``rows[i]`` from ``start[i]`` on, right-aligned in ``width`` columns."""
    column = torch.arange(width, device=rows.device) - width + length[:, None]  # [rows, width]
    picked = (start[:, None] + column).clamp_min(0)  # what stands left of the row is masked

    def gathered(tensor: Tensor) -> Tensor:
        # The two indices stand apart, so the gathered axes come first: [rows, width, heads, size].
        return tensor[rows[:, None].to(tensor.device), :, picked.to(tensor.device)].transpose(1, 2)

    return tuple((gathered(keys), gathered(values)) for keys, values in past)


def _picked(tensor: Tensor, rows: Tensor) -> Tensor:
    """``tensor[rows]``; the tensor may be on the device of a later block."""
    return tensor[rows.to(tensor.device)]


@torch.no_grad()
def prepare_tails(
    model: LanguageModel, rows: Sequence[TokenRow], layer: int, beginnings: Beginnings, groups: Sequence[int]
) -> PreparedRows:
    """The tails of the rows, with what their prefixes and the blocks up to ``layer`` computed.

    Args:
        groups: the group of each row in ``beginnings``.
    """
    device = model.device
    past = _prefixes(model, rows, beginnings, groups)
    width = past[0][0].shape[2]
    prefix = torch.tensor([row.lookup for row in rows], device=device)
    ids, tail_mask = pad_rows([row.ids[row.lookup :] for row in rows], model.pad_id, device=device)
    mask = torch.cat([_right_aligned(prefix, width), tail_mask], dim=1)
    positions = _positions(mask)[:, width:]
    return PreparedRows(
        ids=ids,
        mask=mask,
        positions=positions,
        lookup=torch.zeros(len(rows), dtype=torch.long, device=device),
        edited=_run_edited(model, layer, lambda: _run_base(model, ids, mask, positions, _cache(past))),
        past=past,
    )


def _right_aligned(length: Tensor, width: int) -> Tensor:
    """Mask ``[rows, width]`` of the last ``length[i]`` columns."""
    return (torch.arange(width, device=length.device) >= width - length[:, None]).long()


def _prefixes(
    model: LanguageModel, rows: Sequence[TokenRow], beginnings: Beginnings, groups: Sequence[int]
) -> KeysValues:
    """Keys and values before each lookup token, right-aligned; at least one column, which may be masked."""
    own = [row.lookup - beginnings.lengths[group] for row, group in zip(rows, groups, strict=True)]
    width = max(1, *(row.lookup for row in rows))
    order = sorted(range(len(rows)), key=lambda index: own[index])
    parts = [
        _prefix_pass(model, [rows[index] for index in part], beginnings, [groups[index] for index in part], width)
        for part in (order[cut] for cut in passes([own[index] for index in order], model.device))
    ]
    restore = torch.tensor(order, device=model.device).argsort()
    return tuple(
        (
            _picked(torch.cat([keys for keys, _ in block]), restore),
            _picked(torch.cat([values for _, values in block]), restore),
        )
        for block in zip(*parts, strict=True)
    )


def _prefix_pass(
    model: LanguageModel, rows: Sequence[TokenRow], beginnings: Beginnings, groups: Sequence[int], width: int
) -> KeysValues:
    """One pass over ``[padding | beginning | own tokens | padding]``, so that what a row has is in one piece."""
    group = torch.tensor(groups, device=model.device)
    lead = torch.tensor([beginnings.lengths[number] for number in groups], device=model.device)
    prefix = torch.tensor([row.lookup for row in rows], device=model.device)
    own = [row.ids[length : row.lookup] for row, length in zip(rows, lead.tolist(), strict=True)]
    widest = int(lead.max())
    past = beginnings.of(group, widest) if widest else ()
    if any(own) or not past:
        ids, own_mask = pad_rows([ids or (model.pad_id,) for ids in own], model.pad_id, device=model.device)
        own_mask[(prefix == lead).nonzero()[:, 0]] = 0
        mask = torch.cat([_right_aligned(lead, widest), own_mask], dim=1)
        cache = _cache(past, _GrowingLayer) if past else DynamicCache()
        _run_base(model, ids, mask, _positions(mask)[:, widest:], cache)
        past = tuple((entry.keys, entry.values) for entry in cache.layers)
    return _columns(past, torch.arange(len(rows), device=model.device), widest - lead, prefix, width)


def _run_edited(model: LanguageModel, layer: int, run: Callable[[], None]) -> _Edited:
    """Run the blocks up to ``layer`` and keep what it gives."""
    projected: list[Tensor] = []
    left: list[Any] = []

    def on_projection(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        projected.append(output)

    def on_block(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        left.append(output)

    with hooks() as handles:
        handles.append(model.projection(layer).register_forward_hook(on_projection))
        handles.append(model.block(layer).register_forward_hook(on_block))
        with stop_after(model, layer):
            run()
    outputs = first_tensor(left[0])
    return _Edited(
        outputs=outputs,
        projected=projected[0].reshape(*outputs.shape[:2], -1)[:, 0],
        tuples=isinstance(left[0], tuple),
    )


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
    arguments: dict[str, Any] = {}
    if _takes_positions(model):
        arguments["position_ids"] = prepared.positions
    if prepared.edited is None:
        with hooks() as handles:
            handles.append(model.projection(layer).register_forward_hook(_adding(delta, prepared)))
            return logits_at(model, prepared.ids, prepared.mask, rows, positions, **arguments)
    arguments |= {cache_argument(model.hf): _cache(prepared.past), "use_cache": True}
    hidden = _with_delta(model, layer, prepared.edited, delta)
    with standing_aside(model, layer + 1, hidden, tuples=prepared.edited.tuples):
        return logits_at(model, prepared.ids, prepared.mask, rows, positions, **arguments)


def _adding(delta: Tensor, prepared: PreparedRows) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    columns = torch.arange(prepared.ids.shape[1], device=prepared.ids.device)
    at_lookup = (columns[None, :] == prepared.lookup[:, None])[..., None]  # [rows, tail, 1]

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        added = torch.where(
            at_lookup.to(output.device), delta[:, None, :].to(output), torch.zeros((), dtype=output.dtype)
        )
        return output + added.reshape(output.shape)

    return hook


def _with_delta(model: LanguageModel, layer: int, edited: _Edited, delta: Tensor) -> Tensor:
    """What the edited block gives with δ, ``[rows, tail, d_model]``.

    The block adds its projection's output o to the residual stream, scaled or through a norm P, and nothing else reads
    o; so with δ it gives P(o + δ) − P(o) more at the lookup token, which is column 0.
    """
    projected = edited.projected
    moved = projected + delta.to(projected)
    if model.layout.post_norm:
        norm = model.hf.get_submodule(model.layout.post_norm.format(layer))
        change = norm(moved) - norm(projected)
    else:
        change = (moved - projected) * model.layout.residual_scale
    return torch.cat([edited.outputs[:, :1] + change[:, None], edited.outputs[:, 1:]], dim=1)


def fits(model: LanguageModel, groups: Sequence[Sequence[TokenRow]], layer: int) -> bool:
    """Whether the tails give the logits of the whole rows, with and without a δ.

    The tolerance is relative to the spread of the logits: wide enough for rounding in another order of sums, far too
    narrow for a wrong mask, position or skipped block.

    Args:
        groups: some rows, those with a beginning in common together.
    """
    rows = [row for group in groups for row in group]
    numbers = [number for number, group in enumerate(groups) for _ in group]
    whole = prepare_plain(model, rows)
    try:
        tails = prepare_tails(model, rows, layer, Beginnings(model, groups), numbers)
    except _UNFIT:
        return False
    tolerance = max(1e-4, 8 * torch.finfo(model.dtype).eps)
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
            except _UNFIT:
                return False
            spread = (expected.max() - expected.min()).clamp_min(1e-6)
            if not bool(((found - expected).abs().max() / spread) < tolerance):
                return False
    return True
