"""Rows of tokens prepared so that the value optimisation computes only what δ can change.

Three things never see δ: tokens before the lookup token, blocks up to the edited one (δ joins its output), and the last
target token, which is asked for and never read. What is kept of a row is the keys and values of its prefix and what
leaves the edited block for the tokens behind it; each optimisation step runs the model from there on the tails alone.
Beginnings that rows share, which contexts give them, are run and kept once for all. No code here knows an architecture:
the model's own forward runs, with the lower blocks standing aside. Whether a family fits is decided by comparing
logits.

Shapes: ``rows`` of one pass, ``tail`` tokens from the lookup token on, ``past`` tokens before it (left-padded).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer

from editcore._util.memory import is_out_of_memory
from editcore.models.forward import logits_at
from editcore.models.passes import first_tensor, hooks, standing_aside, stop_after
from editcore.models.tokens import TokenRow, pad_rows

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["PreparedRows", "RowName", "Tails", "fits", "forward_logits", "passes", "prepare_plain"]

_UNFIT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a family without a standard key/value cache raises."""

Result = TypeVar("Result")

RowName = tuple[int, int]
"""(fact, number of the row in it)"""

KeysValues = Sequence[tuple[Tensor, Tensor]]
"""Per block: keys and values of tokens without padding, ``[tokens, heads, width]``."""

_PASS_TOKENS = {"cpu": 70}
"""What a forward pass costs beside its tokens, in tokens, by device type: matrix products of few rows are slower per
row. On two cores products of 64 rows run at 0.65 of the rate of 512."""
_PASS_TOKENS_ELSEWHERE = 2048


def passes(
    lengths: Sequence[int], device: torch.device, *, holds: Callable[[int, int], bool] = lambda _start, _end: True
) -> list[slice]:
    """Cut ascending row lengths into forward passes, each padded to its longest row, so that they cost least.

    Args:
        holds: whether the rows from a start up to an end may be one pass; a single row always may.
    """
    overhead = _PASS_TOKENS.get(device.type, _PASS_TOKENS_ELSEWHERE)
    best, cut = [0], [0]
    for end in range(1, len(lengths) + 1):
        longest = lengths[end - 1]
        costs = {end - 1: best[end - 1] + longest + overhead}
        for start in range(end - 2, -1, -1):
            if not holds(start, end):
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
class _Past:
    """What stands before the tails, gathered block by block while a pass runs."""

    blocks: KeysValues
    slots: Tensor
    """``[rows, past]`` tokens of ``blocks``; any one where the mask is 0."""


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
    edited: _Edited | None = None
    """``None`` to run whole rows through all blocks."""
    past: _Past | None = None


class _PrefixLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of a prefix, to which a forward pass appends its own without keeping them."""

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slots = keys, values, slots
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def get_seq_length(self, *_args: Any) -> int:
        return self.slots.shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        slots = self.slots.to(self.keys.device)  # a later block may be elsewhere
        keys, values = (tokens[slots].transpose(1, 2) for tokens in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class _NotingLayer(_PrefixLayer):
    """The same; notes what the pass appends, ``[rows, heads, tokens, width]`` each."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.appended = key_states, value_states
        return super().update(key_states, value_states)


def _cache(past: _Past, layer: type[_PrefixLayer] = _PrefixLayer) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [layer(keys, values, past.slots) for keys, values in past.blocks]
    return cache


def _run_base(model: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> None:
    """The decoder without its head."""
    arguments: dict[str, Any] = {model.cache_argument: cache, "use_cache": True}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tail:
    """What is kept of one row beside keys and values."""

    row: TokenRow
    beginning: range
    """Tokens of :class:`Tails` that its prefix shares with other rows."""
    own: range
    """And those up to the lookup token that are its own."""
    outputs: Tensor
    """``[tail, d_model]`` what leaves the edited block."""
    projected: Tensor
    """``[d_out]`` what leaves its projection at the lookup token."""


class Tails:
    """Rows of which all that never sees δ has been computed, on the model as it is now.

    Keys and values of prefixes lie packed, without padding: for the blocks above the edited one of every row, for those
    below only of the beginnings that rows share.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, groups: Sequence[Sequence[TokenRow]], layer: int) -> None:
        """``groups``: all rows there will be, by their number in their fact; those of one number may begin alike."""
        self.model, self.layer = model, layer
        self._tails: dict[RowName, _Tail] = {}
        self._tuples = False
        common = [_common(rows) for rows in groups]
        # A group without one has a token here that no row refers to, so that there always is a token.
        ids, mask = pad_rows([tokens or (model.pad_id,) for tokens in common], model.pad_id, device=model.device)
        cache = DynamicCache()
        _run_base(model, ids, mask, _positions(mask), cache)
        self._blocks: list[tuple[Tensor, Tensor]] = [_packed(mask, entry.keys, entry.values) for entry in cache.layers]
        starts = (mask.sum(1).cumsum(0) - mask.sum(1)).tolist()
        self._beginnings = [range(start, start + len(ids)) for start, ids in zip(starts, common, strict=True)]
        self._shared = int(mask.sum())

    @torch.no_grad()
    def replace(self, kept: Sequence[RowName], new: Mapping[RowName, TokenRow], *, most: int) -> None:
        """Forget all rows but ``kept`` and prepare ``new`` ones.

        Args:
            most: tokens of a pass, padding included.
        """
        order = sorted(new, key=lambda name: self._own_length(name, new[name]))
        lengths = [self._own_length(name, new[name]) for name in order]
        cuts = passes(lengths, self.model.device, holds=lambda start, end: (end - start) * lengths[end - 1] <= most)
        parts = [self._prepare({name: new[name] for name in order[cut]}) for cut in cuts]
        tails = {name: self._tails[name] for name in kept}
        places = torch.tensor([*range(self._shared), *(slot for tail in tails.values() for slot in tail.own)])
        for number in range(self.layer + 1, len(self._blocks)):
            # One block after the other, so that only one is there twice.
            fresh = [blocks.pop(0) for _, blocks in parts]
            self._blocks[number] = (
                torch.cat([_picked(self._blocks[number][0], places), *(keys for keys, _ in fresh)]),
                torch.cat([_picked(self._blocks[number][1], places), *(values for _, values in fresh)]),
            )
        for prepared, _ in parts:
            tails |= prepared
        self._tails, end = {}, self._shared
        for name, tail in tails.items():
            self._tails[name] = replace(tail, own=range(end, end + len(tail.own)))
            end += len(tail.own)

    def take(self, names: Sequence[RowName]) -> PreparedRows:
        """Rows of one pass, padded to the longest of them."""
        tails = [self._tails[name] for name in names]
        return self._padded(
            [tail.row for tail in tails],
            self._blocks,
            [[*tail.beginning, *tail.own] for tail in tails],
            _Edited(
                outputs=pad_sequence([tail.outputs for tail in tails], batch_first=True),
                projected=torch.stack([tail.projected for tail in tails]),
                tuples=self._tuples,
            ),
        )

    def _own_length(self, name: RowName, row: TokenRow) -> int:
        return row.lookup - len(self._beginnings[name[1]])

    def _padded(
        self, rows: Sequence[TokenRow], blocks: KeysValues, slots: Sequence[Sequence[int]], edited: _Edited | None
    ) -> PreparedRows:
        """The tails of ``rows``, with the tokens ``slots[i]`` of ``blocks`` before those of row i."""
        device = self.model.device
        ids, tail_mask = pad_rows([row.ids[row.lookup :] for row in rows], self.model.pad_id, device=device)
        before, past_mask = pad_rows(slots, 0, device=device, side="left")
        mask = torch.cat([past_mask, tail_mask], dim=1)
        return PreparedRows(
            ids=ids,
            mask=mask,
            positions=_positions(mask)[:, before.shape[1] :],
            lookup=torch.zeros(len(rows), dtype=torch.long, device=device),
            edited=edited,
            past=_Past(blocks=blocks, slots=before),
        )

    def _prepare(self, new: Mapping[RowName, TokenRow]) -> tuple[dict[RowName, _Tail], list[tuple[Tensor, Tensor]]]:
        """Rows of one pass, and the keys and values of their own tokens in the blocks above the edited one."""
        rows = list(new.values())
        shared = [self._beginnings[number] for _, number in new]
        own, end = [], self._shared
        for name, row in new.items():
            own.append(range(end, end + self._own_length(name, row)))
            end = own[-1].stop
        fresh = self._own_tokens(rows, shared)
        lower, upper = fresh[: self.layer + 1], fresh[self.layer + 1 :]
        blocks = [
            (torch.cat([keys, more[0]]), torch.cat([values, more[1]]))
            for (keys, values), more in zip(self._blocks, lower, strict=False)
        ] + self._blocks[self.layer + 1 :]  # which this pass does not reach
        whole = self._padded(rows, blocks, [[*a, *b] for a, b in zip(shared, own, strict=True)], None)
        edited = _run_edited(self.model, self.layer, whole)
        self._tuples = edited.tuples
        return {
            name: _Tail(
                row=row,
                beginning=shared[place],
                own=own[place],
                outputs=edited.outputs[place, : len(row.ids) - row.lookup].clone(),
                projected=edited.projected[place].clone(),
            )
            for place, (name, row) in enumerate(new.items())
        }, upper

    def _own_tokens(self, rows: Sequence[TokenRow], shared: Sequence[range]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, in all blocks, of the tokens between each row's shared beginning and its lookup token."""
        reading = [place for place, row in enumerate(rows) if row.lookup > len(shared[place])]
        if not reading:
            return [(keys[:0], values[:0]) for keys, values in self._blocks]
        device = self.model.device
        own = [rows[place].ids[len(shared[place]) : rows[place].lookup] for place in reading]
        ids, own_mask = pad_rows(own, self.model.pad_id, device=device)
        before, past_mask = pad_rows([shared[place] for place in reading], 0, device=device, side="left")
        mask = torch.cat([past_mask, own_mask], dim=1)
        cache = _cache(_Past(blocks=self._blocks, slots=before), _NotingLayer)
        _run_base(self.model, ids, mask, _positions(mask)[:, before.shape[1] :], cache)
        return [_packed(own_mask, *entry.appended) for entry in cache.layers]


def _packed(mask: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, heads, tokens, width]`` as ``[tokens where the mask is 1, heads, width]``, row after row."""
    where = mask.bool().to(keys.device)
    return keys.transpose(1, 2)[where], values.transpose(1, 2)[where]


def _common(rows: Sequence[TokenRow]) -> tuple[int, ...]:
    """The longest beginning that all rows share and that ends before every lookup token."""
    shared = rows[0].ids[: min(row.lookup for row in rows)]
    for row in rows[1:]:
        same = next((i for i, (a, b) in enumerate(zip(shared, row.ids, strict=False)) if a != b), len(shared))
        shared = shared[:same]
    return shared


def _picked(tensor: Tensor, places: Tensor) -> Tensor:
    """``tensor[places]``; the tensor may be on the device of a later block."""
    return tensor[places.to(tensor.device)]


def _run_edited(model: LanguageModel, layer: int, rows: PreparedRows) -> _Edited:
    """Run the blocks up to ``layer`` on tails and keep what it gives."""
    assert rows.past is not None
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
            _run_base(model, rows.ids, rows.mask, rows.positions, _cache(rows.past))
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
    if prepared.edited is None or prepared.past is None:
        with hooks() as handles:
            handles.append(model.projection(layer).register_forward_hook(_adding(delta, prepared)))
            return logits_at(model, prepared.ids, prepared.mask, rows, positions, **arguments)
    arguments |= {model.cache_argument: _cache(prepared.past), "use_cache": True}
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

    The tolerance is relative to the spread of the logits, and four times what rounding in another order of sums makes
    of the whole rows themselves, one by one instead of padded together: wide enough for that, far too narrow for a
    wrong mask, position or skipped block.

    Args:
        groups: some rows, those with a beginning in common together.

    Raises:
        RuntimeError, MemoryError: memory ran out, which says nothing of the model.
    """
    named = {(fact, number): row for number, group in enumerate(groups) for fact, row in enumerate(group)}
    rows = list(named.values())
    whole, alone = prepare_plain(model, rows), [prepare_plain(model, [row]) for row in rows]

    def prepared() -> PreparedRows:
        store = Tails(model, groups, layer)
        store.replace([], named, most=8192)
        return store.take(list(named))

    tails = _unless_unfit(prepared)
    if tails is None:
        return False
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(rows), model.layout.d_model, generator=generator).to(model.device)
    index = torch.arange(len(rows), device=model.device)
    last = torch.tensor([len(row.ids) - 1 for row in rows], device=model.device)
    shift = torch.tensor([row.lookup for row in rows], device=model.device)
    with torch.no_grad():
        for delta in (torch.zeros_like(noise), noise):
            expected = forward_logits(model, whole, layer, delta, index, last)
            again = [
                forward_logits(model, row, layer, delta[place, None], index[:1], last[place, None])
                for place, row in enumerate(alone)
            ]
            found = _unless_unfit(functools.partial(forward_logits, model, tails, layer, delta, index, last - shift))
            if found is None:
                return False
            spread = (expected.max() - expected.min()).clamp_min(1e-6)
            off, rounding = ((one - expected).abs().max() / spread for one in (found, torch.cat(again)))
            tolerance = max(1e-4, 4 * max(float(rounding), torch.finfo(model.dtype).eps / 2))
            if not bool(off < tolerance):  # NaN is not
                return False
    return True


def _unless_unfit(work: Callable[[], Result]) -> Result | None:
    """What the work gives; ``None`` if the model has no standard key/value cache for it."""
    try:
        return work()
    except _UNFIT as error:
        if is_out_of_memory(error):
            raise
        return None
