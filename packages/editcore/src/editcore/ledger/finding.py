"""Finds edits by what people know of them: the subject, the day, or the facts themselves."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from editcore.interfaces.errors import RequestError, RunError
from editcore.interfaces.values import EditRequest
from editcore.ledger.ledger import Ledger
from editcore.ledger.states import Edit

__all__ = ["edits_of_facts", "edits_of_subject", "edits_since", "moment"]


def edits_of_subject(ledger: Ledger, subject: str) -> tuple[Edit, ...]:
    """Every edit about a subject, whatever is undone. Case and Unicode form do not count.

    Raises:
        RunError: there is none; the message names the nearest subjects.
    """
    found = ledger.edits_about([EditRequest(subject=subject, prompt="{}", target_new="-")])
    if found:
        return found
    known = sorted({request.subject for request in ledger.written() if request.subject})
    near = difflib.get_close_matches(subject, known, n=3)
    hint = f" Near: {', '.join(near)}." if near else " 'editctl ledger RUN show --edits' lists them."
    raise RunError(f"No edit is about '{subject}'.{hint}")


def edits_since(ledger: Ledger, since: datetime) -> tuple[Edit, ...]:
    """Every edit whose batch was signed at a time or later. Batches of 'editctl run' are not signed.

    Raises:
        RunError: there is none.
    """
    found = tuple(
        (entry.batch, name)
        for entry in ledger.entries
        if entry.signature is not None and datetime.fromisoformat(entry.signature.time) >= since
        for name in entry.new_ids
    )
    if not found:
        raise RunError(
            f"No edit was written since {since.isoformat(timespec='seconds')}. Edits of 'editctl run' have no time of "
            "their own and are not meant; name them by id, batch or subject."
        )
    return found


def moment(text: str) -> datetime:
    """A date or a time as ISO 8601 writes it, in UTC where it names no zone.

    Raises:
        RequestError: it is neither.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise RequestError(
            f"'{text}' is no date and no time; write 2026-03-31, or 2026-03-31T09:00, which is UTC."
        ) from error
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def edits_of_facts(ledger: Ledger, requests: Iterable[EditRequest]) -> tuple[Edit, ...]:
    """Every edit of the given facts: the same subject and prompt, whatever the target.

    Raises:
        RunError: a fact was never written; the message names it.
    """
    written: dict[tuple[str, str], list[Edit]] = {}
    for entry in ledger.entries:
        for request in entry.new_requests:
            written.setdefault(request.fact_key, []).append((entry.batch, request.id))
    return tuple(_each(written, requests))


def _each(written: dict[tuple[str, str], list[Edit]], requests: Iterable[EditRequest]) -> Iterator[Edit]:
    for request in requests:
        if request.fact_key not in written:
            raise RunError(f"'{request.text}' was never written here, so nothing was undone.")
        yield from written[request.fact_key]
