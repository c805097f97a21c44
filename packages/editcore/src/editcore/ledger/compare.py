"""The difference between two ledgers: their facts, their batches and what they do to the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from editcore.interfaces.documented import documented
from editcore.interfaces.history import LedgerEntry, Signature
from editcore.interfaces.values import EditRequest
from editcore.ledger.ledger import Ledger
from editcore.ledger.lines import UndoLine

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Comparison", "compare", "weight_differences"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The difference between the active facts of two ledgers. Facts are the same if subject and prompt are."""

    added: tuple[tuple[EditRequest, Signature | None], ...]
    """Facts in the second ledger only, and who wrote each."""
    removed: tuple[tuple[EditRequest, Signature | None], ...]
    """Facts in the first ledger only, and who took each out of the second one, if it had been there."""
    corrected: tuple[tuple[EditRequest, EditRequest, Signature | None], ...]
    """Facts in both, with different targets, and who wrote the one in the second ledger."""
    same: int
    """Number of facts in both, with the same target."""
    same_model: bool
    """Whether both are about the same weights."""
    same_batches: int
    """Batches from the first on that both have, with the same requests and the same bits as they were first solved."""
    only_first: int
    """Further batches that only the first ledger has."""
    only_second: int
    """Further batches that only the second ledger has."""
    solved_again: tuple[int, ...]
    """Those of the same batches that are active in both with different solutions, because other edits are undone."""
    same_weights: bool
    """Whether the same changes are active in both, in the same order."""


def compare(first: Ledger, second: Ledger) -> Comparison:
    """How ``second`` differs from ``first``. Reads no tensors."""
    ours, theirs = ({fact.fact_key: fact for fact in ledger.facts()} for ledger in (first, second))
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    corrected = [(old, new) for old, new in both if old.continuation != new.continuation]
    wrote = {request.id: entry.signature for entry in second.entries for request in entry.new_requests}
    undid = {
        name: event.signature
        for event in second.events
        if isinstance(event, UndoLine) and event.kind == "undo"
        for _, name in event.edits
    }
    same = [entry.batch for entry in takewhile(lambda entry: first.is_same_batch(entry.batch, second), first.batches)]
    active = [ledger.active_hashes() for ledger in (first, second)]
    again = [
        batch for batch in same if batch in active[0] and active[0][batch] != active[1].get(batch, active[0][batch])
    ]
    return Comparison(
        added=tuple((fact, wrote.get(fact.id)) for key, fact in theirs.items() if key not in ours),
        removed=tuple((fact, undid.get(fact.id)) for key, fact in ours.items() if key not in theirs),
        corrected=tuple((old, new, wrote.get(new.id)) for old, new in corrected),
        same=len(both) - len(corrected),
        same_model=_fingerprint(first) == _fingerprint(second),
        same_batches=len(same),
        only_first=len(first.batches) - len(same),
        only_second=len(second.batches) - len(same),
        solved_again=tuple(again),
        same_weights=list(active[0].items()) == list(active[1].items()),
    )


def weight_differences(first: Ledger, second: Ledger) -> dict[str, float]:
    """By address, the Frobenius norm of the difference between the weights of two models with the same base, before
    they are rounded. Batches that are active in both with the same changes are not read.

    Raises:
        RunError: a tensor cannot be read.
    """
    entries = list(_different(first, second))
    addresses = sorted({address for entry, _ in entries for address in entry.changes})
    return {address: float(_sum(entries, address).norm()) for address in addresses}


def _different(first: Ledger, second: Ledger) -> Iterator[tuple[LedgerEntry, float]]:
    """The batches that are active in one ledger only, or otherwise in the other; with the sign of their changes."""
    hashes = [ledger.active_hashes() for ledger in (first, second)]
    for number, (ledger, sign) in enumerate(((first, -1.0), (second, 1.0))):
        for entry in ledger.history():
            other = hashes[1 - number].get(entry.batch)
            if other is None or other != hashes[number][entry.batch]:
                yield entry, sign


def _sum(entries: list[tuple[LedgerEntry, float]], address: str) -> Tensor:
    import torch

    from editcore.models.writing import in_float64

    found = [(entry.changes, sign) for entry, sign in entries if address in entry.changes]
    total = torch.zeros(found[0][0][address].shape, dtype=torch.float64)
    for changes, sign in found:
        total += sign * in_float64(changes[address], total)
    return total


def _fingerprint(ledger: Ledger) -> str | None:
    return None if ledger.header is None else ledger.header.fingerprint
