"""Token rows whose prefix, the tokens before the lookup token, has been run once.

δ is added to the output of the edited block at the lookup token. So it changes nothing at earlier tokens, and nothing
in the blocks up to the edited one. The keys and values of every prefix are therefore kept, as is the output of the
edited block for the tokens behind the prefix (the tail). Each step of the optimisation runs only the blocks above, on
the tails. The last target token is predicted and never read. Rows of one context begin with the same tokens, and these
are run and kept once for all of them.

Whether a model's family allows this is tested by comparing logits (:func:`prefixes_fit`).

Shapes: ``rows`` of one pass, ``tail`` tokens from the lookup token on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from editcore._util.memory import is_out_of_memory
from editcore.locate_then_edit.prepared_rows import (
    EditedBlock,
    KeysValues,
    Prefixes,
    PreparedRows,
    logits_with_delta,
    positions_of,
    run_new_tokens,
    run_to_edited_block,
    whole_rows,
)
from editcore.locate_then_edit.token_rows import RowName
from editcore.models.encoding import pad_rows
from editcore.models.planning import PassBudget, plan_passes
from editcore.models.tokens import TokenRow

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["CachedPrefixes", "prefixes_fit"]

_UNCACHEABLE = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Errors that a family without a standard key/value cache raises."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class _CachedRow:
    """The cached part of one row."""

    row: TokenRow
    beginning: range
    """Slots of the first tokens, which all rows of its context share."""
    own: range
    """Slots of the other tokens of its prefix."""
    outputs: Tensor
    """``[tail, d_model]`` output of the edited block."""
    projected: Tensor
    """``[d_out]`` output of its projection at the lookup token."""


class CachedPrefixes:
    """The rows of the values that are being optimised, with the keys and values of their prefixes.

    Keys and values of all tokens are stored one after the other, without padding. A token's *slot* is its place there.
    The shared beginnings come first, and every block keeps them. The other tokens of the prefixes follow; only the
    blocks above the edited one keep them.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, contexts: Mapping[int, Sequence[TokenRow]], *, layer: int) -> None:
        """``contexts``: all rows that will be cached, by the context of their name. Rows of one context may begin with
        the same tokens."""
        self.model, self.layer = model, layer
        self._rows: dict[RowName, _CachedRow] = {}
        self._returns_tuple = False
        shared = {context: _common_beginning(rows) for context, rows in contexts.items()}
        # A context whose rows share nothing gets one padding token, because the cache must not be empty.
        ids, mask = pad_rows(
            [tokens or (model.pad_id,) for tokens in shared.values()], model.pad_id, device=model.device
        )
        self._blocks = [_packed(mask, keys, values) for keys, values in run_new_tokens(model, ids, mask)]
        starts = (mask.sum(1).cumsum(0) - mask.sum(1)).tolist()
        self._beginnings = {
            context: range(start, start + len(tokens))
            for start, (context, tokens) in zip(starts, shared.items(), strict=True)
        }
        self._shared = int(mask.sum())

    @torch.no_grad()
    def replace(self, kept: Sequence[RowName], new: Mapping[RowName, TokenRow], budget: PassBudget) -> None:
        """Forget all rows but ``kept``, and run the prefixes of the ``new`` rows in passes within ``budget``."""
        names = list(new)
        cuts = plan_passes([self._own_length(name, new[name]) for name in names], budget)
        passes = [self._prepare({names[index]: new[names[index]] for index in members}) for members in cuts]
        rows = {name: self._rows[name] for name in kept}
        places = torch.tensor([*range(self._shared), *(slot for row in rows.values() for slot in row.own)])
        for number in range(self.layer + 1, len(self._blocks)):
            # Block by block, so that only one of them is held twice.
            fresh = [blocks.pop(0) for _, blocks in passes]
            self._blocks[number] = (
                torch.cat([_picked(self._blocks[number][0], places), *(keys for keys, _ in fresh)]),
                torch.cat([_picked(self._blocks[number][1], places), *(values for _, values in fresh)]),
            )
        for prepared, _ in passes:
            rows |= prepared
        self._rows, end = {}, self._shared
        for name, row in rows.items():
            self._rows[name] = replace(row, own=range(end, end + len(row.own)))
            end += len(row.own)

    def take(self, names: Sequence[RowName]) -> PreparedRows:
        """Rows of one pass, padded to the longest of them."""
        rows = [self._rows[name] for name in names]
        return self._padded(
            [row.row for row in rows],
            self._blocks,
            [[*row.beginning, *row.own] for row in rows],
            EditedBlock(
                outputs=pad_sequence([row.outputs for row in rows], batch_first=True),
                projected=torch.stack([row.projected for row in rows]),
                returns_tuple=self._returns_tuple,
            ),
        )

    def _own_length(self, name: RowName, row: TokenRow) -> int:
        return row.lookup - len(self._beginnings[name.context])

    def _padded(
        self,
        rows: Sequence[TokenRow],
        blocks: KeysValues,
        slots: Sequence[Sequence[int]],
        edited: EditedBlock | None,
    ) -> PreparedRows:
        """The tails of ``rows``, with the tokens ``slots[i]`` of ``blocks`` before those of row i."""
        device = self.model.device
        ids, tail_mask = pad_rows([row.ids[row.lookup :] for row in rows], self.model.pad_id, device=device)
        before, past_mask = pad_rows(slots, 0, device=device, side="left")
        mask = torch.cat([past_mask, tail_mask], dim=1)
        return PreparedRows(
            ids=ids,
            mask=mask,
            positions=positions_of(mask)[:, before.shape[1] :],
            lookup=torch.zeros(len(rows), dtype=torch.long, device=device),
            edited=edited,
            prefixes=Prefixes(blocks=blocks, slots=before),
        )

    def _prepare(
        self, new: Mapping[RowName, TokenRow]
    ) -> tuple[dict[RowName, _CachedRow], list[tuple[Tensor, Tensor]]]:
        """Rows of one pass, and the keys and values of their own tokens in the blocks above the edited one."""
        rows = list(new.values())
        beginnings = [self._beginnings[name.context] for name in new]
        own, end = [], self._shared
        for name, row in new.items():
            own.append(range(end, end + self._own_length(name, row)))
            end = own[-1].stop
        fresh = self._own_tokens(rows, beginnings)
        lower, upper = fresh[: self.layer + 1], fresh[self.layer + 1 :]
        blocks = [
            (torch.cat([keys, own_keys]), torch.cat([values, own_values]))
            for (keys, values), (own_keys, own_values) in zip(self._blocks, lower, strict=False)
        ] + self._blocks[self.layer + 1 :]  # this pass ends below these blocks
        slots = [[*shared, *rest] for shared, rest in zip(beginnings, own, strict=True)]
        edited = run_to_edited_block(self.model, self.layer, self._padded(rows, blocks, slots, None))
        self._returns_tuple = edited.returns_tuple
        return {
            name: _CachedRow(
                row=row,
                beginning=beginnings[place],
                own=own[place],
                outputs=edited.outputs[place, : len(row.ids) - row.lookup].clone(),
                projected=edited.projected[place].clone(),
            )
            for place, (name, row) in enumerate(new.items())
        }, upper

    def _own_tokens(self, rows: Sequence[TokenRow], beginnings: Sequence[range]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, in all blocks, of the tokens between each row's beginning and its lookup token."""
        reading = [place for place, row in enumerate(rows) if row.lookup > len(beginnings[place])]
        if not reading:
            return [(keys[:0], values[:0]) for keys, values in self._blocks]
        device = self.model.device
        own = [rows[place].ids[len(beginnings[place]) : rows[place].lookup] for place in reading]
        ids, own_mask = pad_rows(own, self.model.pad_id, device=device)
        before, past_mask = pad_rows([beginnings[place] for place in reading], 0, device=device, side="left")
        mask = torch.cat([past_mask, own_mask], dim=1)
        found = run_new_tokens(self.model, ids, mask, Prefixes(blocks=self._blocks, slots=before))
        return [_packed(own_mask, keys, values) for keys, values in found]


def prefixes_fit(model: LanguageModel, contexts: Mapping[int, Sequence[TokenRow]], *, layer: int) -> bool:
    """Whether cached prefixes give the same logits as whole rows, with and without a δ.

    The tolerance is relative to the spread of the logits. It is four times the difference between whole rows run one by
    one and the same rows padded together, which is due to rounding. That is wide enough for another order of sums, and
    far too narrow for a wrong mask, position or skipped block.

    Args:
        contexts: some rows, by context; rows of one context may begin with the same tokens.

    Raises:
        RuntimeError, MemoryError: memory ran out, so the test has no result.
    """
    named = {RowName(value, context): row for context, group in contexts.items() for value, row in enumerate(group)}
    rows = list(named.values())
    whole, alone = whole_rows(model, rows), [whole_rows(model, [row]) for row in rows]

    def prepared() -> PreparedRows:
        cached = CachedPrefixes(model, contexts, layer=layer)
        cached.replace([], named, PassBudget.forward(model))
        return cached.take(list(named))

    tails = _none_if_uncacheable(prepared)
    if tails is None:
        return False
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(rows), model.layout.d_model, generator=generator).to(model.device)
    index = torch.arange(len(rows), device=model.device)
    last = torch.tensor([len(row.ids) - 1 for row in rows], device=model.device)
    lookup = torch.tensor([row.lookup for row in rows], device=model.device)
    run = functools.partial(logits_with_delta, model, layer=layer)
    with torch.no_grad():
        for delta in (torch.zeros_like(noise), noise):
            expected = run(whole, delta=delta, rows=index, positions=last)
            again = [
                run(row, delta=delta[place, None], rows=index[:1], positions=last[place, None])
                for place, row in enumerate(alone)
            ]
            found = _none_if_uncacheable(
                functools.partial(run, tails, delta=delta, rows=index, positions=last - lookup)
            )
            if found is None:
                return False
            spread = (expected.max() - expected.min()).clamp_min(1e-6)
            off, rounding = ((logits - expected).abs().max() / spread for logits in (found, torch.cat(again)))
            tolerance = max(1e-4, 4 * max(float(rounding), torch.finfo(model.compute_dtype).eps / 2))
            if not bool(off < tolerance):  # also true for NaN
                return False
    return True


def _none_if_uncacheable(work: Callable[[], Result]) -> Result | None:
    """The result of ``work``; ``None`` if the model does not have the standard key/value cache that it needs."""
    try:
        return work()
    except _UNCACHEABLE as error:
        if is_out_of_memory(error):
            raise
        return None


def _packed(mask: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, heads, tokens, width]`` as ``[kept tokens, heads, width]``, row after row; tokens with mask 0 are
    dropped."""
    where = mask.bool().to(keys.device)
    return keys.transpose(1, 2)[where], values.transpose(1, 2)[where]


def _picked(tensor: Tensor, places: Tensor) -> Tensor:
    """``tensor[places]``; the tensor may be on the device of a later block."""
    return tensor[places.to(tensor.device)]


def _common_beginning(rows: Sequence[TokenRow]) -> tuple[int, ...]:
    """The longest beginning that all rows share. It ends before every lookup token."""
    shared = rows[0].ids[: min(row.lookup for row in rows)]
    for row in rows[1:]:
        pairs = enumerate(zip(shared, row.ids, strict=False))
        shared = shared[: next((place for place, (ours, theirs) in pairs if ours != theirs), len(shared))]
    return shared
