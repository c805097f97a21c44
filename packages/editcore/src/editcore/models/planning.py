"""How many rows, tokens and logits go through a model at once.

Everything that runs many texts asks here: value optimisation, keys, scoring, divergence, second moments, tracing. A
:class:`PassBudget` says what one forward pass may hold on the model's device. :func:`plan_passes` divides token rows
into passes at the least cost: rows of similar length share a pass, because each row is padded to the longest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from editcore._util.memory import free_memory_bytes
from editcore.interfaces.documented import documented

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["PassBudget", "plan_passes"]


@dataclass(frozen=True, slots=True)
class _Device:
    """Limits of a pass on a kind of device, as measured."""

    forward_tokens: int
    """Tokens of a forward pass. More make it no faster per token."""
    backward_tokens: int
    """The same for a forward and backward pass."""
    forward_logits: int
    """Numbers in the logits of a forward pass."""
    backward_logits: int
    """The same for a forward and backward pass, which holds the logits and their gradient."""
    overhead: int
    """Fixed cost of a pass, in tokens."""


_CPU = _Device(2048, 512, 2**25, 3 * 2**22, 70)
"""Two cores: passes of 256 to 2048 tokens take the same time per token. Matrix products of 64 rows run at 0.65 of the
speed of 512 rows."""
_ACCELERATOR = _Device(16384, 8192, 2**25, 2**27, 2048)

_CPU_ACTIVATION_BYTES = 2**29
"""Memory for the activations that the backward pass needs, on a CPU."""
_CPU_BYTES_PER_WORD = 2**10
"""Memory of the tokenizer for each word of its vocabulary. It is subtracted from that for activations, of which at
least half stays."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class PassBudget:
    """What one forward pass may hold. A pass of a single row is always allowed."""

    tokens: int
    """Tokens, padding included."""
    logits: int
    """Numbers in the logits: scored positions times the vocabulary."""
    overhead: int
    """Fixed cost of a pass, in tokens."""
    vocab: int
    """Logits of one scored position."""

    @classmethod
    def forward(cls, model: LanguageModel) -> PassBudget:
        """For passes without a backward pass, which keep no activations."""
        device = _CPU if model.device.type == "cpu" else _ACCELERATOR
        return cls(
            tokens=device.forward_tokens,
            logits=device.forward_logits,
            overhead=device.overhead,
            vocab=model.layout.vocab_size,
        )

    @classmethod
    def backward(cls, model: LanguageModel, layer: int) -> PassBudget:
        """For passes that go backward down to block ``layer``. Activations of the blocks above it fit the memory."""
        layout, on_cpu = model.layout, model.device.type == "cpu"
        device = _CPU if on_cpu else _ACCELERATOR
        if on_cpu:
            left = _CPU_ACTIVATION_BYTES - _CPU_BYTES_PER_WORD * layout.vocab_size
            memory = max(_CPU_ACTIVATION_BYTES // 2, left)
        else:
            memory = free_memory_bytes(model.device) // 2
        per_token = (layout.num_layers - layer) * numbers_per_token(model) * model.compute_dtype.itemsize
        return cls(
            tokens=max(1, min(device.backward_tokens, memory // per_token)),
            logits=device.backward_logits,
            overhead=device.overhead,
            vocab=layout.vocab_size,
        )

    def rows(self, length: int, *, scored: int = 0) -> int:
        """How many rows of one length fit a pass, at least one.

        Args:
            length: tokens of a row.
            scored: positions of a row whose logits are wanted.
        """
        most = self.tokens // max(1, length)
        if scored:
            most = min(most, self.logits // (scored * self.vocab))
        return max(1, most)

    def positions(self) -> int:
        """How many scored positions fit a pass, at least one."""
        return max(1, self.logits // self.vocab)

    def with_tokens(self, tokens: int) -> PassBudget:
        """The same for another number of tokens."""
        return replace(self, tokens=tokens)


def numbers_per_token(model: LanguageModel) -> int:
    """Numbers that a block keeps per token for the backward pass: about 12 · d_model + 4 · d_ff."""
    return 12 * model.layout.d_model + 4 * model.layout.d_ff


def plan_passes(
    lengths: Sequence[int], budget: PassBudget, *, scored: Sequence[int] | None = None, past: float = 0.0
) -> list[list[int]]:
    """Divide rows into forward passes, each padded to its longest row, at the least cost.

    A pass of n rows costs n times the length of its longest row, plus :attr:`PassBudget.overhead`. Rows are sorted by
    length. A pass of the best plan ends where the length changes, or where it is full: otherwise it could take one more
    row of the same length at no cost. So only these ends are tried.

    Args:
        lengths: tokens of each row.
        scored: positions of each row whose logits are wanted; left out, none.
        past: tokens of a cached prefix, which count in ``budget.tokens`` for each row.

    Returns:
        Indices of rows, pass by pass; within and across passes in ascending length.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    ascending = [lengths[index] for index in order]
    wanted = [0, *accumulate(scored[index] for index in order)] if scored is not None else None
    changes = [place for place in range(1, len(order)) if ascending[place] != ascending[place - 1]] + [len(order)]

    def fits(start: int, end: int) -> bool:
        if end - start == 1:
            return True
        if (end - start) * (ascending[end - 1] + past) > budget.tokens:
            return False
        return wanted is None or (wanted[end] - wanted[start]) * budget.vocab <= budget.logits

    def ends(start: int) -> list[int]:
        """Where a pass that starts at a row may end: at changes of length, and where it is full."""
        low, high = start + 1, start + max(1, budget.tokens // max(1, ascending[start]))
        high = min(high, len(order))
        while low < high:  # the last end that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(start, middle) else (low, middle - 1)
        first = bisect_right(changes, start)
        return [*changes[first : bisect_right(changes, low - 1)], low]

    # By end of a pass: the least cost so far, and the start of that pass. Ends are visited in ascending order.
    cost: dict[int, float] = {0: 0.0}
    before: dict[int, int] = {}
    reached = [0]
    while (start := heappop(reached)) < len(order):
        for end in ends(start):
            total = cost[start] + (end - start) * ascending[end - 1] + budget.overhead
            if end not in cost:
                heappush(reached, end)
            if end not in cost or total < cost[end]:
                cost[end], before[end] = total, start
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(before[cuts[-1]])
    cuts.reverse()
    return [order[start:end] for start, end in pairwise(cuts)]
