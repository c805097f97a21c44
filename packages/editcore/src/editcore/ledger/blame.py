"""What each edit does to the answer to a prompt.

Shapes: ``rows`` copies of the prompt, each without one edit, ``seq`` its tokens, ``rank`` the factors of an edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editcore.interfaces.errors import RequestError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import EditRequest, FactoredDelta
from editcore.models.forward import logits_at
from editcore.models.passes import first_tensor, hooks
from editcore.models.tokens import join_continuation

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["Blame", "Contribution", "blame"]

_ROWS = 32
"""Edits that are left out in one forward pass, each in a row of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What an edit adds to one token's score after a prompt."""

    requests: tuple[EditRequest, ...]
    """The fact; all facts of a batch whose factors do not belong to single facts."""
    batches: tuple[int, ...]
    """Where it was written and replayed."""
    logit: float
    """The token's logit with all edits, minus its logit without this one."""
    log_probability: float
    """The same of log p(token | prompt), in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """Contributions to one token, the largest in size first."""

    token: str
    """The first token of the answer."""
    probability: float
    """p(token | prompt) with all edits."""
    contributions: tuple[Contribution, ...]


def blame(
    model: LanguageModel,
    history: Sequence[LedgerEntry],
    prompt: str,
    *,
    answer: str | None = None,
    progress: Progress = silent,
) -> Blame:
    """Rank edits by what leaving each of them out would take from an answer.

    A change Δ = Σ lᵢ rᵢᵀ is a sum over the facts of its batch. Leaving fact i out subtracts lᵢ rᵢᵀx from what the
    edited projection gives for each input x, in every batch that wrote or replayed it and in every layer, and the model
    runs on from there: exact, not a first-order estimate, at one row of a forward pass per edit. The rest of the batch
    is not solved again, so this is the share of the written change, and not what ``undo`` of one of several facts would
    give. Effects do not add up: edits may matter together and not alone.

    Args:
        model: with the edits of ``history`` applied.
        answer: whose first token is scored; left out, the token that the model would say.

    Raises:
        RequestError: the prompt or the answer has no token, or there are no edits.
    """
    if not history:
        raise RequestError("No edit is active, so none can be blamed.")
    ids = tuple(model.tokenizer(prompt)["input_ids"]) if prompt else ()
    token = None
    if answer is not None and ids:
        joined, start = join_continuation(model, prompt, ids, answer)
        ids, token = joined[:start], joined[start] if start < len(joined) else None
    if not ids or (answer is not None and token is None):
        raise RequestError("The prompt or the answer has no token; give some text.")
    [full] = _log_scores(model, ids, [{}])
    chosen = int(full.argmax()) if token is None else token
    terms = list(_terms(history))
    found: list[Contribution] = []
    with progress.task("leaving out", len(terms)) as advance:
        for first in range(0, len(terms), _ROWS):
            chunk = terms[first : first + _ROWS]
            for term, logits in zip(chunk, _log_scores(model, ids, [term.factors for term in chunk]), strict=True):
                less = full - logits  # [vocab]
                found.append(
                    Contribution(
                        requests=term.requests,
                        batches=term.batches,
                        logit=float(less[chosen]),
                        log_probability=float(full.log_softmax(0)[chosen] - logits.log_softmax(0)[chosen]),
                    )
                )
            advance(len(chunk))
    return Blame(
        token=model.tokenizer.decode([chosen]),
        probability=float(full.softmax(0)[chosen]),
        contributions=tuple(sorted(found, key=lambda one: -abs(one.logit))),
    )


@dataclass(frozen=True, slots=True)
class _Term:
    """What is left out together."""

    requests: tuple[EditRequest, ...]
    batches: tuple[int, ...]
    factors: Mapping[str, FactoredDelta]


def _terms(history: Sequence[LedgerEntry]) -> Iterator[_Term]:
    """One per fact, over all batches that it is part of; one per batch where factors are not one per request."""
    parts: dict[str, list[tuple[int, str, Tensor, Tensor]]] = {}
    facts: dict[str, EditRequest] = {}
    for entry in history:
        if any(delta.rank != len(entry.requests) for delta in entry.deltas.values()):
            yield _Term(entry.requests, (entry.batch,), entry.deltas)
            continue
        for row, request in enumerate(entry.requests):
            facts[request.id] = request
            for name, delta in entry.deltas.items():
                parts.setdefault(request.id, []).append((entry.batch, name, delta.left[:, row], delta.right[row]))
    for name, pieces in parts.items():
        weights = dict.fromkeys(weight for _, weight, _, _ in pieces)
        factors = {
            weight: FactoredDelta(
                torch.stack([left for _, owner, left, _ in pieces if owner == weight], dim=1),
                torch.stack([right for _, owner, _, right in pieces if owner == weight]),
            )
            for weight in weights
        }
        yield _Term((facts[name],), tuple(dict.fromkeys(batch for batch, *_ in pieces)), factors)


@torch.inference_mode()
def _log_scores(model: LanguageModel, ids: Sequence[int], left_out: Sequence[Mapping[str, FactoredDelta]]) -> Tensor:
    """Logits behind the prompt, ``[rows, vocab]`` float64 on the CPU, row i without ``left_out[i]``."""
    rows = len(left_out)
    input_ids = torch.tensor([list(ids)] * rows, device=model.device)

    def subtract(name: str) -> Any:
        left, right = _stacked([deltas.get(name) for deltas in left_out])

        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            given = first_tensor(output)
            inputs = args[0].reshape(rows, len(ids), -1).double()  # [rows, seq, d_in]
            along = torch.einsum("nsi,nri->nsr", inputs, right.to(inputs))  # [rows, seq, rank]
            change = torch.einsum("nsr,nor->nso", along, left.to(inputs)).reshape(given.shape)
            return given - change.to(given) if given is output else (given - change.to(given), *output[1:])

        return hook

    with hooks() as handles:
        for name in {name for deltas in left_out for name in deltas}:
            handles.append(model.projection(model.layout.layer_of(name)).register_forward_hook(subtract(name)))
        last = torch.full((rows,), len(ids) - 1, device=model.device)
        return logits_at(model, input_ids, None, torch.arange(rows, device=model.device), last).double().cpu()


def _stacked(deltas: Sequence[FactoredDelta | None]) -> tuple[Tensor, Tensor]:
    """Factors of every row, ``[rows, d_out, rank]`` and ``[rows, rank, d_in]``, with zeros where a row has fewer."""
    some = next(delta for delta in deltas if delta is not None)
    rank = max(delta.rank for delta in deltas if delta is not None)
    left = torch.zeros(len(deltas), some.left.shape[0], rank, dtype=torch.float64)
    right = torch.zeros(len(deltas), rank, some.right.shape[1], dtype=torch.float64)
    for row, delta in enumerate(deltas):
        if delta is not None:
            left[row, :, : delta.rank], right[row, : delta.rank] = delta.left, delta.right
    return left, right
