"""The difference between the facts of two ledgers."""

from __future__ import annotations

from dataclasses import dataclass

from editcore.interfaces.documented import documented
from editcore.interfaces.values import EditRequest
from editcore.ledger.ledger import Ledger

__all__ = ["Comparison", "compare"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The difference between the active facts of two ledgers. Facts are the same if subject and prompt are."""

    added: tuple[EditRequest, ...]
    """Facts in the second ledger only."""
    removed: tuple[EditRequest, ...]
    """Facts in the first ledger only."""
    changed: tuple[tuple[EditRequest, EditRequest], ...]
    """Facts in both, with different targets."""
    same: int
    """Number of facts in both, with the same target."""


def compare(first: Ledger, second: Ledger) -> Comparison:
    """How the facts of ``second`` differ from those of ``first``. Their weights are not compared."""
    ours, theirs = ({fact.fact_key: fact for fact in ledger.facts()} for ledger in (first, second))
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    changed = tuple((old, new) for old, new in both if old.continuation != new.continuation)
    return Comparison(
        added=tuple(fact for key, fact in theirs.items() if key not in ours),
        removed=tuple(fact for key, fact in ours.items() if key not in theirs),
        changed=changed,
        same=len(both) - len(changed),
    )
