"""Token rows that begin alike as trees, so that what they share is run once.

A neighbourhood's prompts share their first words, and two targets of several tokens share their prompt. In a causal
model a token depends only on those before it. So rows are joined into a tree: each token is a node, its parent is the
token before it. A tree is run as one row of its nodes. A node attends to itself and to its ancestors alone, and its
position is its depth. Its logits are those of the row, up to the rounding of another order of sums.

Trees have few nodes, because every node computes a score with every other one of its tree, and masks most of them.

Whether a model reads trees is tested by comparing logits (:func:`reads_trees`). Models that make their own attention
biases (ALiBi) do not, and neither does a model with code of others in it, which may take a row for a text.

Shapes: ``rows`` trees of a pass, ``seq`` their padded number of nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editcore._util.memory import is_out_of_memory
from editcore.models.encoding import pad_rows
from editcore.models.forward import logits_at

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["TokenTree", "reads_trees", "run_trees", "tree_of", "trees_of"]

Ids = tuple[int, ...]

_MOST_NODES = 64
"""Measured with SmolLM2 on 100 CounterFact records: trees of 64 nodes take 3 % less time than trees of 128 or 224."""
_UNREADABLE = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Errors of models that take no mask of tokens by tokens."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Rows that share their beginnings."""

    ids: Ids
    """The token of each node; a parent comes before its children."""
    parents: tuple[int, ...]
    """The node before each node; -1 for a first token."""
    paths: tuple[tuple[int, ...], ...]
    """By row, its nodes in their order."""

    @property
    def is_plain(self) -> bool:
        """Whether it is one row, in which every token sees all that are before it."""
        return len(self.paths) == 1


def tree_of(rows: Sequence[Ids]) -> TokenTree:
    """The tree of some rows, which are in lexicographic order.

    >>> tree_of([(5, 6), (5, 7)])
    TokenTree(ids=(5, 6, 7), parents=(-1, 0, 0), paths=((0, 1), (0, 2)))
    """
    ids: list[int] = []
    parents: list[int] = []
    paths: list[tuple[int, ...]] = []
    path: tuple[int, ...] = ()
    before: Ids = ()
    for row in rows:
        path = path[: _shared(before, row)]
        for token in row[len(path) :]:
            parents.append(path[-1] if path else -1)
            path = (*path, len(ids))
            ids.append(token)
        paths.append(path)
        before = row
    return TokenTree(tuple(ids), tuple(parents), tuple(paths))


def trees_of(rows: Sequence[Ids]) -> list[list[int]]:
    """Indices of the rows of each tree. A tree has at most 64 nodes, or it is one row."""
    order = sorted(range(len(rows)), key=lambda index: rows[index])
    groups: list[list[int]] = []
    nodes = 0
    before: Ids = ()
    for index in order:
        own = len(rows[index]) - _shared(before, rows[index])
        if groups and nodes + own <= _MOST_NODES:
            groups[-1].append(index)
            nodes += own
        else:
            groups.append([index])
            nodes = len(rows[index])
        before = rows[index]
    return groups


def _shared(first: Ids, second: Ids) -> int:
    """How many tokens two rows share at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(first), len(second)))


def run_trees(model: LanguageModel, trees: Sequence[TokenTree], where: Tensor) -> Tensor:
    """The logits at some nodes, ``[num_scored, vocab]``.

    Args:
        where: ``[num_scored, 2]``, which tree and which of its nodes.
    """
    ids, mask = pad_rows([tree.ids for tree in trees], model.pad_id, device=model.device)
    if all(tree.is_plain for tree in trees):
        return logits_at(model, ids, mask, where[:, 0], where[:, 1])
    sees = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(trees), 1, 1)  # [rows, seq, seq]
    depths = torch.zeros(ids.shape, dtype=torch.long)
    for number, tree in enumerate(trees):
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                sees[number, node] |= sees[number, parent]
                depths[number, node] = depths[number, parent] + 1
    hidden = torch.finfo(model.compute_dtype).min
    allowed = torch.zeros(sees.shape, dtype=model.compute_dtype).masked_fill_(~sees, hidden).unsqueeze(1)
    return logits_at(
        model, ids, allowed.to(model.device), where[:, 0], where[:, 1], position_ids=depths.to(model.device)
    )


def reads_trees(model: LanguageModel) -> bool:
    """Whether trees give the logits of their rows, as a small tree shows. It costs the time of about 140 tokens.

    The tolerance is relative to the spread of the logits. It is four times the difference between rows run one by one
    and together, which is due to rounding.
    """
    return all(map(_is_known, model.hf.modules())) and _tree_agrees(model)


def _is_known(module: nn.Module) -> bool:
    """Whether a module is one of transformers or torch, and nothing listens to it."""
    own = type(module).__module__.partition(".")[0] in ("transformers", "torch")
    return own and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


@torch.inference_mode()
def _tree_agrees(model: LanguageModel) -> bool:
    tokens = [3 + 7 * number % max(1, model.layout.vocab_size - 3) for number in range(_MOST_NODES)]
    start, branches = tuple(tokens[:8]), [tokens[first : first + 11] for first in range(8, 8 + 5 * 11, 11)]
    rows = sorted((*start, *branch) for branch in branches)
    tree = tree_of(rows)
    paths = (tree.paths[0], tree.paths[-1])  # the second is far from the beginning that it sees
    nodes = torch.tensor([[0, node] for path in paths for node in path], device=model.device)
    places = torch.tensor([[row, place] for row, path in enumerate(paths) for place in range(len(path))])
    places = places.to(model.device)
    chains = [tree_of([row]) for row in (rows[0], rows[-1])]
    expected = run_trees(model, chains, places)
    alone = torch.cat([run_trees(model, [chain], places[: len(chain.ids)]) for chain in chains])
    try:
        found = run_trees(model, [tree], nodes)
    except _UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        return False
    spread = (expected.max() - expected.min()).clamp_min(1e-6)
    off, rounding = ((logits - expected).abs().max() / spread for logits in (found, alone))
    tolerance = max(1e-4, 4 * max(float(rounding), torch.finfo(model.compute_dtype).eps / 2))
    return bool(off < tolerance)  # false for NaN, too
