"""Undo and redo of edits in a ledger: finds the edits that are meant, and solves their batches without them.

An id means the edit in every batch that wrote it. A batch means all edits that it wrote. A replayed fact belongs to the
batch that wrote it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from editcore.interfaces.changes import Written
from editcore.interfaces.errors import RunError
from editcore.interfaces.history import LedgerEntry, Signature
from editcore.interfaces.values import EditBatch, EditRequest
from editcore.ledger.ledger import Ledger
from editcore.ledger.states import Edit, LeftOut

__all__ = ["Solver", "change", "changing", "edits_named", "named", "requests_of"]

Solver = Callable[[LedgerEntry, LeftOut], tuple[Written, EditBatch | None]]
"""``(batch, what to leave out)`` -> what the batch writes without them, and what was solved for it
(:meth:`Ledger.revise`)."""


def named(
    ledger: Ledger, kind: Literal["undo", "redo"], edits: Sequence[str], batches: Sequence[int] = ()
) -> tuple[Edit, ...]:
    """The edits that ids and batches name, and whose state ``kind`` would change.

    Args:
        edits: ids of edits.
        batches: indices of batches; all their edits are meant.

    Raises:
        RunError: there is no such edit or batch, or nothing would change.
    """
    return changing(ledger, kind, edits_named(ledger, edits, batches))


def edits_named(ledger: Ledger, edits: Sequence[str], batches: Sequence[int] = ()) -> tuple[Edit, ...]:
    """Every edit that ids and batches name, whatever is undone.

    Raises:
        RunError: there is no such edit or batch.
    """
    return (*_by_id(ledger, edits), *_by_batch(ledger, batches))


def changing(ledger: Ledger, kind: Literal["undo", "redo"], edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Those of the edits whose state ``kind`` would change, each once.

    Raises:
        RunError: there is none.
    """
    meant = dict.fromkeys(edits)
    if not meant:
        raise RunError(f"There is nothing to {kind}: no edit was named.")
    changed = tuple((batch, name) for batch, name in meant if (name in ledger.undone(batch)) == (kind == "redo"))
    if not changed:
        state = "undone already" if kind == "undo" else "active"
        raise RunError(f"There is nothing to {kind}: {_in_words(meant)} {state}.")
    return changed


def change(
    ledger: Ledger,
    kind: Literal["undo", "redo"],
    edits: Sequence[Edit],
    *,
    solve: Solver,
    signature: Signature | None = None,
    as_if_never: bool = False,
) -> tuple[EditRequest, ...]:
    """Undo or redo edits in the ledger. The change is durable, and the model is not touched.

    Args:
        edits: as :func:`named` finds them.
        solve: called for each batch that keeps some of its edits, builds on one of those meant, or comes after one that
            is undone as if it had never been solved, unless the ledger has that solution already.
        signature: who changes them, and why.
        as_if_never: whether later batches become what they would have been if the edits had never been solved.

    Returns:
        The requests of ``edits``.

    Raises:
        NumericalError, StorageError: nothing was changed.
    """
    state = ledger.state_after(kind, edits, as_if_never=as_if_never)
    for batch in ledger.unsolved(state):  # a batch that builds on another one is solved behind it
        _solve(ledger, batch, ledger.left_out(batch, state), solve)
    ledger.mark(kind, edits, signature, as_if_never=as_if_never)
    return requests_of(ledger, edits)


def _solve(ledger: Ledger, batch: int, out: LeftOut, solve: Solver) -> None:
    """Solve a batch without some edits; before it, what it needs of the batches before it."""
    if ledger.is_solved(batch, out):
        return
    for earlier, without in ledger.needed_for(batch, out):
        _solve(ledger, earlier, without, solve)
    ledger.revise(batch, out, *solve(ledger.batch(batch), out))


def requests_of(ledger: Ledger, edits: Iterable[Edit]) -> tuple[EditRequest, ...]:
    """The requests of edits, in their order."""
    requests = {(entry.batch, request.id): request for entry in ledger.entries for request in entry.new_requests}
    return tuple(requests[edit] for edit in edits)


def _by_id(ledger: Ledger, edits: Sequence[str]) -> Iterator[tuple[int, str]]:
    for name in edits:
        found = [(entry.batch, name) for entry in ledger.entries if name in entry.new_ids]
        if not found:
            raise RunError(_no_edit(ledger, name))
        yield from found


def _by_batch(ledger: Ledger, batches: Sequence[int]) -> Iterator[tuple[int, str]]:
    by_index = {entry.batch: entry for entry in ledger.batches}
    for batch in batches:
        if batch not in by_index:
            span = f"{min(by_index)} to {max(by_index)}" if by_index else "none"
            raise RunError(f"There is no batch {batch} in the ledger. Its batches: {span}.")
        if not by_index[batch].applied:
            raise RunError(f"Batch {batch} was rejected ({by_index[batch].reason}); it is not in the model.")
        yield from ((batch, name) for name in by_index[batch].new_ids)


def _no_edit(ledger: Ledger, name: str) -> str:
    for entry in ledger.batches:
        if not entry.applied and name in entry.new_ids:
            return f"The edit '{name}' was rejected with batch {entry.batch} ({entry.reason}); it is not in the model."
        for rejection in entry.rejected:
            if rejection.request.id == name:
                return f"The edit '{name}' was rejected ({rejection.by}: {rejection.reason}); it is not in the model."
    near = difflib.get_close_matches(name, [known for entry in ledger.entries for known in entry.new_ids], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else " 'editctl ledger RUN show --edits' lists them."
    return f"There is no edit '{name}' in the ledger.{hint}"


def _in_words(edits: Mapping[tuple[int, str], None]) -> str:
    (_, first), *rest = edits
    return f"'{first}' is" if not rest else f"all {len(edits)} edits are"
