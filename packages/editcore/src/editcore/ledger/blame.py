"""The contribution of each edit to the answer to a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from editcore.interfaces.changes import Changes, FactoredDelta, Written
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RequestError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import EditRequest
from editcore.models.edited import EditedModel
from editcore.models.forward import logits_at
from editcore.models.tokens import join_continuation

__all__ = ["Blame", "Contribution", "blame"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What an edit adds to one token's score after a prompt."""

    requests: tuple[EditRequest, ...]
    """The fact; or all facts of a batch whose factors do not belong to single facts."""
    batches: tuple[int, ...]
    """The batches in which it was written and replayed."""
    logit: float
    """The token's logit with all edits, minus its logit without this one."""
    log_probability: float
    """The same difference of log p(token | prompt), in nats."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """Contributions to one token, the largest in size first."""

    token: str
    """The first token of the answer."""
    probability: float
    """p(token | prompt) with all edits."""
    contributions: tuple[Contribution, ...]
    """One per edit or batch that can be told apart."""


def blame(
    edited: EditedModel,
    history: Sequence[LedgerEntry],
    prompt: str,
    *,
    answer: str | None = None,
    progress: Progress = silent,
) -> Blame:
    """Rank edits by how much an answer loses if each of them is left out.

    A factored change Δ = Σ lᵢ rᵢᵀ is a sum over the facts of its batch if the batch has a key of each
    (:attr:`editcore.Proposal.known`). Leaving fact i out takes lᵢ rᵢᵀ from every weight, in every batch that wrote or
    replayed the fact. For this the backend adds −lᵢ rᵢᵀ to the model on trial. A batch whose changes are not such sums
    (dense changes, vectors, attachments) is left out as a whole. The rest of a batch is not solved again. So the result
    is the share of what was written, which differs from ``undo`` of one of several facts. Effects do not add up,
    because edits may matter together and not alone.

    Args:
        edited: the model with ``history`` active.
        answer: the answer whose first token is scored; left out, the token that the model would say.

    Raises:
        RequestError: the prompt or the answer has no token, or there are no edits.
    """
    if not history:
        raise RequestError("No edit is active, so none can be blamed.")
    model = edited.model
    text = model.asked(prompt) if prompt else ""
    ids = model.read_prompt(text)[0] if text else ()
    token = None
    if answer is not None and ids:
        join = next((request.join for entry in history for request in entry.requests if request.text == prompt), None)
        joined, start = join_continuation(model, text, ids, answer, join=join)
        ids, token = joined[:start], joined[start] if start < len(joined) else None
    if not ids or (answer is not None and token is None):
        raise RequestError("The prompt or the answer has no token; give some text.")
    full = _logits(edited, ids)
    chosen = int(full.argmax()) if token is None else token
    terms = list(_terms(history))
    found: list[Contribution] = []
    with progress.task("leaving out", len(terms)) as advance:
        for term in terms:
            with term.left_out(edited, history):
                logits = _logits(edited, ids)
            found.append(
                Contribution(
                    requests=term.requests,
                    batches=term.batches,
                    logit=float(full[chosen] - logits[chosen]),
                    log_probability=float(full.log_softmax(0)[chosen] - logits.log_softmax(0)[chosen]),
                )
            )
            advance(1)
    return Blame(
        token=model.tokenizer.decode([chosen]),
        probability=float(full.softmax(0)[chosen]),
        contributions=tuple(sorted(found, key=lambda contribution: -abs(contribution.logit))),
    )


@dataclass(frozen=True, slots=True)
class _Term:
    """A part of the edits that is left out together."""

    requests: tuple[EditRequest, ...]
    batches: tuple[int, ...]
    changes: Changes | None
    """Changes to take from the weights; ``None`` to leave ``batches`` out as a whole."""

    def left_out(self, edited: EditedModel, history: Sequence[LedgerEntry]) -> AbstractContextManager[None]:
        """Inside the block, the model is without this part."""
        if self.changes is None:
            return _without_batches(edited, history, self.batches)
        negative = {address: change.scaled(-1.0) for address, change in self.changes.items()}
        return edited.trial(Written(changes=negative))


@contextmanager
def _without_batches(edited: EditedModel, history: Sequence[LedgerEntry], batches: Sequence[int]) -> Iterator[None]:
    edited.rebuild([entry.written for entry in history if entry.batch not in batches])
    try:
        yield
    finally:
        edited.rebuild([entry.written for entry in history])


def _is_sum_over_requests(entry: LedgerEntry) -> bool:
    """Whether column i of every factor belongs to request i. This is so if the editor keeps a key of each request."""
    return (
        entry.attachment is None
        and all(request.id in entry.known for request in entry.requests)
        and all(
            isinstance(change, FactoredDelta) and change.rank == len(entry.requests)
            for change in entry.changes.values()
        )
    )


def _terms(history: Sequence[LedgerEntry]) -> Iterator[_Term]:
    """One term per fact, over all batches that it is part of; one per batch whose changes are not a sum over its
    requests."""
    parts: dict[str, list[tuple[int, str, Tensor, Tensor]]] = {}
    facts: dict[str, EditRequest] = {}
    for entry in history:
        if not _is_sum_over_requests(entry):
            yield _Term(entry.requests, (entry.batch,), None)
            continue
        for row, request in enumerate(entry.requests):
            facts[request.id] = request
            for address, change in entry.changes.items():
                assert isinstance(change, FactoredDelta)
                parts.setdefault(request.id, []).append((entry.batch, address, change.left[:, row], change.right[row]))
    for name, pieces in parts.items():
        addresses: Mapping[str, None] = dict.fromkeys(address for _, address, _, _ in pieces)
        changes = {
            address: FactoredDelta(
                torch.stack([left for _, owner, left, _ in pieces if owner == address], dim=1),
                torch.stack([right for _, owner, _, right in pieces if owner == address]),
            )
            for address in addresses
        }
        yield _Term((facts[name],), tuple(dict.fromkeys(batch for batch, *_ in pieces)), changes)


@torch.inference_mode()
def _logits(edited: EditedModel, ids: Sequence[int]) -> Tensor:
    """Logits behind the prompt, ``[vocab]`` float64 on the CPU."""
    model = edited.model
    input_ids = torch.tensor([list(ids)], device=model.device)
    row, last = (torch.tensor([place], device=model.device) for place in (0, len(ids) - 1))
    return logits_at(model, input_ids, None, row, last)[0].double().cpu()
