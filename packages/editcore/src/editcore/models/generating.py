"""Text written token by token, many rows together, on the model's own cache.

Rows are padded on the left, so that the last token of each is in the last column. Every step writes one token to each
row. A greedy row that has ended leaves the batch with its part of the cache, so one long answer does not keep the short
ones running. Sampled rows stay to the end: what is drawn for a row depends on how many rows draw.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from editcore.models.encoding import pad_rows
from editcore.models.options import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["StopRule", "Writer", "continue_rows"]

_ROWS = 128
"""Rows that are written together, where the vocabulary is small."""
_LOGITS = 2**24
"""Logits of one step. Drawing from them takes three times their memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """When rows end."""

    limits: Sequence[int]
    """The most new tokens, one number per row."""
    at_end_token: bool
    """End a row at an end token, which is left out of it."""
    enough: Callable[[int, Sequence[int]], bool] | None
    """Whether a row (its index, its new tokens so far) needs no further token."""

    def is_complete(self, index: int, new: Sequence[int]) -> bool:
        """Whether a row needs no further token."""
        return len(new) >= self.limits[index] or (self.enough is not None and self.enough(index, new))


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """The model that writes, and what must be known of it."""

    hf: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    pad_id: int
    end_ids: frozenset[int]
    cache_argument: str
    """The name under which its forward pass takes and returns the key-value cache."""
    positions: int | None
    """The most tokens that it reads at once; ``None`` for any number."""


def continue_rows(
    writer: Writer,
    rows: Sequence[Sequence[int]],
    *,
    stop: StopRule,
    sampling: Sampling | None,
    advance: Callable[[int], None],
) -> list[list[int]]:
    """The new tokens of each row; see ``LanguageModel.generate_ids``.

    Args:
        advance: called after every step with the number of tokens just written.
    """
    answers: list[list[int]] = [[] for _ in rows]
    choose = _greedy if sampling is None else _drawing(sampling)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # stable: equal lengths keep their order
    for members in _together(writer, order, rows, stop.limits):
        batch = _Batch(writer, rows, members, answers)
        for _ in range(max(stop.limits[index] for index in members)):
            batch.step(choose, stop_at_end=stop.at_end_token)
            advance(len(batch.members))
            if sampling is None:
                batch.drop_ended(lambda index: stop.is_complete(index, answers[index]))
            if bool(batch.ended.all()):
                break
    return [answer[:limit] for answer, limit in zip(answers, stop.limits, strict=True)]


def _together(
    writer: Writer, order: Sequence[int], rows: Sequence[Sequence[int]], limits: Sequence[int]
) -> Iterator[list[int]]:
    """Groups of ``order`` that are written together."""
    # A padding token on the left may attend to no token at all. Eager attention takes its softmax in float32, where
    # the smallest float64, which masks, becomes -inf, and such a row NaN. In float64, only rows of one length are
    # written together.
    alike = (lambda index: len(rows[index])) if writer.dtype == torch.float64 else (lambda index: 0)
    most = max(1, min(_ROWS, _LOGITS // writer.vocab_size))
    for _, group in itertools.groupby(order, key=alike):
        members: list[int] = []
        for index in group:
            # In some families (GPT-Neo, MPT) padding takes positions too, and a row that has ended is padded further.
            longest = len(rows[index]) + max(limits[member] for member in (*members, index)) - 1
            if members and (len(members) == most or (writer.positions is not None and longest > writer.positions)):
                yield members
                members = []
            members.append(index)
        yield members


class _Batch:
    """Rows that are written together, and their key-value cache."""

    def __init__(
        self, writer: Writer, rows: Sequence[Sequence[int]], members: Sequence[int], answers: list[list[int]]
    ) -> None:
        self.members = list(members)
        """The index of each row of the batch."""
        self._writer = writer
        self._answers = answers
        texts = [rows[index] for index in members]
        # Both [rows, seq]: what the next step reads, and the mask of all tokens so far.
        self._next, self._mask = pad_rows(texts, writer.pad_id, device=writer.device, side="left")
        self._ends = torch.tensor(sorted(writer.end_ids), device=writer.device)
        self._cache: Any = None
        self._takes = frozenset(inspect.signature(writer.hf.forward).parameters)
        self.ended = torch.zeros(len(members), dtype=torch.bool, device=writer.device)

    @torch.inference_mode()
    def step(self, choose: Callable[[Tensor], Tensor], *, stop_at_end: bool) -> None:
        """Write one token to every row that has not ended."""
        writer, mask = self._writer, self._mask
        arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": True, "return_dict": True}
        if "position_ids" in self._takes:
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -self._next.shape[1] :]
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = 1
        if self._cache is not None:
            arguments[writer.cache_argument] = self._cache
        output = writer.hf(input_ids=self._next, **arguments)
        self._cache = getattr(output, writer.cache_argument, None)
        chosen = choose(output.logits[:, -1]).to(writer.device)  # [rows]
        if stop_at_end:
            self.ended |= torch.isin(chosen, self._ends)
        chosen = chosen.masked_fill(self.ended, writer.pad_id)
        for index, token, ended in zip(self.members, chosen.tolist(), self.ended.tolist(), strict=True):
            if not ended:
                self._answers[index].append(token)
        new = chosen.unsqueeze(1)  # [rows, 1]
        self._next = new if self._cache is not None else torch.cat([self._next, new], dim=1)
        self._mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)

    def drop_ended(self, is_complete: Callable[[int], bool]) -> None:
        """End the rows that are complete. Rows that have ended leave the batch where the cache allows it."""
        now = [ended or is_complete(index) for index, ended in zip(self.members, self.ended.tolist(), strict=True)]
        self.ended = torch.tensor(now, device=self._writer.device)
        staying = [place for place, ended in enumerate(now) if not ended]
        if not staying or len(staying) == len(now) or not _rows_can_leave(self._cache):
            return
        chosen = torch.tensor(staying, device=self._writer.device)
        self._cache.batch_select_indices(chosen)
        self._mask, self._next, self.ended = self._mask[chosen], self._next[chosen], self.ended[chosen]
        self.members = [self.members[place] for place in staying]


def _rows_can_leave(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: every layer keeps keys and values of tokens, and nothing else."""
    layers = getattr(cache, "layers", None) or ()
    return len(layers) > 0 and all(isinstance(layer, DynamicLayer) for layer in layers)


def _greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, ``[rows]``."""
    return logits.argmax(dim=-1)


def _drawing(sampling: Sampling) -> Callable[[Tensor], Tensor]:
    """A function that draws the next token of each row, ``[rows]``, from the logits, ``[rows, vocab]``."""
    generator = torch.Generator().manual_seed(sampling.seed)

    def draw(logits: Tensor) -> Tensor:
        scores = logits.float().cpu()
        if sampling.top_k is None:
            drawn = torch.multinomial((scores / sampling.temperature).softmax(dim=-1), 1, generator=generator)
            return drawn[:, 0]
        best, tokens = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1)  # [rows, top_k]
        drawn = torch.multinomial((best / sampling.temperature).softmax(dim=-1), 1, generator=generator)
        return tokens.gather(-1, drawn).squeeze(-1)

    return draw
