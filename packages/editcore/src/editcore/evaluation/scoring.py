"""How well a model predicts given continuations. Every metric that scores a target is computed here.

Every (prompt, target) pair needs the log-probabilities of the target's tokens, each given the tokens before it. Most of
that work is shared: a prompt is scored with two targets, a target of one token needs only the logits of its prompt, and
records repeat their neighbourhood prompts. So pairs become token sequences. A sequence that is the beginning of a
longer one needs no row of its own. Many rows that begin alike are joined into trees, in which what they share is run
once (:mod:`editcore.evaluation.token_trees`). Rows are grouped by length, and the head runs only at the scored
positions.

An alternative is to prefill each prompt into a key/value cache and to continue it with both targets. It saves the
second row if both targets have several tokens, but costs a second, short forward pass. Measured with SmolLM2 on 10
CounterFact records (260 pairs, prompts of 10.6 tokens, three targets in four a single token), in CPU seconds on one
core: a row per pair 15.6, cache 9.1, covering rows 8.3. Covering rows are fastest, and also work for models without
such a cache.

Shapes: ``rows`` token rows of ``seq`` tokens, ``slots`` scored positions of a pass, ``vocab``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore._util.memory import in_halves
from editcore.evaluation.token_trees import TokenTree, reads_trees, run_trees, tree_of, trees_of
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RequestError
from editcore.interfaces.progress import Progress, silent
from editcore.models.planning import PassBudget, plan_passes
from editcore.models.tokens import join_continuation

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["TargetScore", "score_targets"]

Ids = tuple[int, ...]


@documented
@dataclass(frozen=True, slots=True)
class TargetScore:
    """How well the model predicts one continuation."""

    nll: float
    """Mean over the target's tokens of −log p(token | everything before it)."""
    correct: bool
    """True if every token of the target is the most probable one at its position (teacher forcing)."""
    num_tokens: int
    """Number of tokens of the target, its leading space included."""
    hits: int
    """How many of them are the most probable one at their position (teacher forcing)."""
    predicted: tuple[int, ...]
    """The most probable token at the position of each of them."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """A prompt continued by a target, as tokens: ``ids[start:]`` is the target."""

    ids: Ids
    start: int

    @property
    def inputs(self) -> Ids:
        """The tokens that the model reads: all but the last target token."""
        return self.ids[:-1]


def score_targets(
    model: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    joins: Sequence[str | None] | None = None,
    progress: Progress = silent,
    description: str = "Scoring",
) -> list[TargetScore]:
    """Score ``targets[i]`` as the continuation of ``prompts[i]``, in the order given.

    Prompt and target are joined, and become tokens, as :func:`editcore.models.join_continuation` says. Special tokens
    that the tokenizer puts in front (BOS) are kept; those that it appends are dropped.

    Args:
        joins: the text between ``prompts[i]`` and ``targets[i]``, as in :attr:`editcore.EditRequest.join`; for
            ``None``, the prompt's last character decides.

    Raises:
        RequestError: a prompt or a target has no token, a text is longer than the model's positions, or the model has
            no embedding of a token.
    """
    pairs = _tokenise(model, prompts, targets, joins or [None] * len(prompts))
    scores = _kept(model, pairs)
    missing = [index for index in range(len(pairs)) if index not in scores]
    rows, row_of = covering_rows(pairs[index].inputs for index in missing)
    trees, places = _as_trees(model, rows)
    readers: list[list[int]] = [[] for _ in trees]
    for index in missing:
        readers[places[row_of[pairs[index].inputs]][0]].append(index)

    def score_trees(chunk: Sequence[int]) -> list[tuple[int, TargetScore]]:
        indices = [index for tree in chunk for index in readers[tree]]
        number = {tree: place for place, tree in enumerate(chunk)}
        found_at = [places[row_of[pairs[index].inputs]] for index in indices]
        owners = [(number[tree], path) for tree, path in found_at]
        found = _score_pass(model, [trees[tree] for tree in chunk], [pairs[index] for index in indices], owners)
        return list(zip(indices, found, strict=True))

    with torch.inference_mode(), progress.task(description, len(rows)) as advance:
        for plain in (True, False):  # a pass is all of one kind
            kind = [index for index, tree in enumerate(trees) if tree.is_plain == plain]
            scored = [sum(len(pairs[index].ids) - pairs[index].start for index in readers[tree]) for tree in kind]
            lengths = [len(trees[tree].ids) for tree in kind]
            for chunk in plan_passes(lengths, PassBudget.forward(model), scored=scored):
                found = dict(in_halves(score_trees, [kind[index] for index in chunk]))
                _keep(model, pairs, found)
                scores |= found
                advance(sum(len(trees[kind[index]].paths) for index in chunk))
    return [scores[index] for index in range(len(pairs))]


_TARGET = "target"


def _question(pair: _Pair) -> list[object]:
    return [list(pair.ids), pair.start]


def _kept(model: LanguageModel, pairs: Sequence[_Pair]) -> dict[int, TargetScore]:
    """The scores that the model's store of answers has, by the index of the pair."""
    if model.answers is None:
        return {}
    known = model.answers.known(_TARGET, [_question(pair) for pair in pairs])
    found = {
        index: TargetScore(**{**answer, "predicted": tuple(answer["predicted"])})
        for index, answer in enumerate(known)
        if answer is not None
    }
    model.answers.count(asked=len(pairs) - len(found), found=len(found))
    return found


def _keep(model: LanguageModel, pairs: Sequence[_Pair], scores: Mapping[int, TargetScore]) -> None:
    """Put scores, by the index of the pair, into the model's store of answers."""
    if model.answers is not None:
        finite = [(index, found) for index, found in scores.items() if math.isfinite(found.nll)]
        model.answers.keep(_TARGET, [(_question(pairs[index]), asdict(found)) for index, found in finite])


_LEAST_SAVED = 2000
"""Tokens that trees must save. Fewer do not pay for the test whether the model reads trees."""


def _as_trees(model: LanguageModel, rows: Sequence[Ids]) -> tuple[list[TokenTree], list[tuple[int, tuple[int, ...]]]]:
    """Trees, and for each row its tree and its nodes. Where trees save little, or the model does not read them, each
    row is a tree of its own."""
    groups = trees_of(rows)
    trees = [tree_of([rows[index] for index in group]) for group in groups]
    saved = sum(map(len, rows)) - sum(len(tree.ids) for tree in trees)
    if saved < _LEAST_SAVED or not reads_trees(model):
        groups = [[index] for index in range(len(rows))]
        trees = [tree_of([row]) for row in rows]
    found: dict[int, tuple[int, tuple[int, ...]]] = {}
    for number, (group, tree) in enumerate(zip(groups, trees, strict=True)):
        found |= {index: (number, path) for index, path in zip(group, tree.paths, strict=True)}
    return trees, [found[index] for index in range(len(rows))]


def _tokenise(
    model: LanguageModel, prompts: Sequence[str], targets: Sequence[str], joins: Sequence[str | None]
) -> list[_Pair]:
    prompt_ids: dict[str, Ids] = {}
    pairs: dict[tuple[str, str, str | None], _Pair] = {}
    continuations = list(zip(prompts, targets, joins, strict=True))
    for prompt, target, join in continuations:
        if (prompt, target, join) in pairs:
            continue
        asked = model.asked(prompt)
        if asked not in prompt_ids:
            prompt_ids[asked] = model.read_prompt(asked)[0]
        ids, start = join_continuation(model, asked, prompt_ids[asked], target, join=join)
        if start == 0 or start >= len(ids):
            raise RequestError(f"Cannot score {target!r} after {prompt!r}: a prompt and a target need a token each.")
        pairs[prompt, target, join] = _Pair(ids, start)
    return [pairs[continuation] for continuation in continuations]


def covering_rows(sequences: Iterable[Ids]) -> tuple[list[Ids], dict[Ids, int]]:
    """The fewest rows that contain every sequence as a beginning, shortest first, and the row of each sequence.

    In a causal model a position's logits depend only on the tokens before it, so a row serves all its beginnings.
    """
    ordered = sorted(set(sequences))
    cover: dict[Ids, Ids] = {}
    following: Ids = ()
    for sequence in reversed(ordered):  # sorted, so sequences that extend this one follow it directly
        extended = following[: len(sequence)] == sequence and bool(following)
        cover[sequence] = cover[following] if extended else sequence
        following = sequence
    rows = sorted(set(cover.values()), key=lambda row: (len(row), row))
    index_of = {row: index for index, row in enumerate(rows)}
    return rows, {sequence: index_of[row] for sequence, row in cover.items()}


def _score_pass(
    model: LanguageModel,
    trees: Sequence[TokenTree],
    pairs: Sequence[_Pair],
    owners: Sequence[tuple[int, tuple[int, ...]]],
) -> list[TargetScore]:
    """Score the pairs in one forward pass. ``owners[i]`` is the tree of ``pairs[i]``, and the nodes of a row that
    begins with it."""
    wanted = [  # (tree, node, token), one per target token
        (tree, path[position - 1], pair.ids[position])
        for (tree, path), pair in zip(owners, pairs, strict=True)
        for position in range(pair.start, len(pair.ids))
    ]
    places = sorted({(tree, node) for tree, node, _ in wanted})
    slot_of = {place: slot for slot, place in enumerate(places)}
    logits = run_trees(model, trees, torch.tensor(places, device=model.device)).float()  # [slots, vocab]
    slots = torch.tensor([slot_of[tree, node] for tree, node, _ in wanted], device=logits.device)
    tokens = torch.tensor([token for _, _, token in wanted], device=logits.device)
    losses, best = token_losses(logits, slots, tokens)
    hits = best == tokens.cpu()
    lengths = [len(pair.ids) - pair.start for pair in pairs]
    parts = (torch.split(values, lengths) for values in (losses, best, hits))
    return [
        TargetScore(
            nll=float(loss.mean()),
            correct=bool(hit.all()),
            num_tokens=len(hit),
            hits=int(hit.sum()),
            predicted=tuple(token.tolist()),
        )
        for loss, token, hit in zip(*parts, strict=True)
    ]


def token_losses(logits: Tensor, slots: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``(−log p of tokens[i], argmax)`` under ``logits[slots[i]]``: float64 and int64 on the CPU."""
    log_z = logits.logsumexp(dim=-1)  # [slots]
    best = logits.argmax(dim=-1)  # [slots]
    losses = log_z[slots] - logits[slots, tokens]
    return losses.double().cpu(), best[slots].cpu()
