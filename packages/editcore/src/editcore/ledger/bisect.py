"""Finds the batch after which a model no longer gives an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RequestError
from editcore.interfaces.history import LedgerEntry
from editcore.models.edited import EditedModel

__all__ = ["Bisection", "bisect"]

_MORE_TOKENS = 4
"""Tokens that are generated beyond the expected text, so that a reader sees more of the answer."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """Where an answer changed."""

    entry: LedgerEntry
    """The batch after which the model says something else."""
    before: str
    """What it says without this batch and all later ones."""
    after: str
    """What it says with this batch and without later ones."""
    tried: int
    """Number of model states that were asked."""


def bisect(edited: EditedModel, history: Sequence[LedgerEntry], prompt: str, expect: str) -> Bisection:
    """Find a batch before which the greedy continuation of ``prompt`` begins with ``expect``, but not after it.

    A binary search runs between a state that gives the answer and the present one, which does not. The first state is
    the unedited model, or if that does not give the answer either, the state after the last batch that wrote a fact
    with this prompt. If the answer came and went several times, one of the places is found. All of ``history`` is
    active at the end.

    Raises:
        RequestError: the model gives the answer now, or no state is known in which it did.
    """
    if not expect.strip():
        raise RequestError("--expect is empty; give the beginning of the answer that the prompt should have.")
    model = edited.model
    length = len(model.read_text(f" {expect.strip()}")) + _MORE_TOKENS
    answers: dict[int, str] = {}

    def says(count: int) -> bool:
        if count not in answers:
            edited.rebuild([entry.written for entry in history[:count]])
            [answers[count]] = model.generate([prompt], max_new_tokens=length)
        return answers[count].strip().startswith(expect.strip())

    try:
        if says(len(history)):
            raise RequestError(
                f"There is nothing to search for: the model says '{_line(answers[len(history)])}' after '{prompt}'."
            )
        writers = [
            at + 1 for at, entry in enumerate(history) if any(request.text == prompt for request in entry.new_requests)
        ]
        good = next((count for count in (0, *reversed(writers)) if says(count)), None)
        if good is None:
            raise RequestError(
                f"No known state of the model says '{expect.strip()}' after '{prompt}': unedited, it says "
                f"'{_line(answers[0])}', and "
                + ("the batches that wrote this fact did not change that." if writers else "no batch wrote this fact.")
            )
        bad = len(history)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if says(middle) else (good, middle)
    finally:
        edited.rebuild([entry.written for entry in history])
    return Bisection(entry=history[bad - 1], before=answers[good], after=answers[bad], tried=len(answers))


def _line(text: str) -> str:
    return " ".join(text.split())
