"""What a server answers, compared with what a run answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from editcore import LanguageModel
from editcore.evaluation import log_probabilities_after

from edit_lora.answers import Answer, Served, answers_of

__all__ = ["EXACT", "Compared", "Grade", "Prompt", "Stage", "compare"]

EXACT = 0.02
"""Difference of a log-probability, in nats, that two programs have on the same float32 weights at the most."""
_COMPARED = 5
"""Of the run's likeliest first tokens: those whose log-probabilities are compared, if they are likely at all."""
_LIKELY = -4.0
"""Log-probability of a token from which on it is likely. Rounding moves others by more, and no answer needs them."""
_CLOSE = 0.25
"""Difference, in nats, that the rounding of a 16-bit or 8-bit engine may make."""
_ANOTHER_MODEL = 0.7
"""Median difference from which on two models are not copies of one, whatever the quantisation of one of them."""
_QUANTILE = 0.9
Grade = Literal["equal", "close", "different"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt of the comparison."""

    kind: Literal["fact", "neighbour", "text"]
    text: str
    row: tuple[int, ...]
    """Its token ids, as the run reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One prompt with both answers."""

    prompt: Prompt
    expected: Answer
    """The run's."""
    found: Answer
    """The server's."""
    deviation: float | None
    """Largest difference, in nats, of a log-probability of the run's likely first tokens; ``None`` where the server
    gives none."""
    gap: float | None
    """Where the tokens part: by how much the run prefers its own token, in nats. ``None`` if they do not, or the server
    gives no tokens."""
    grade: Grade

    @property
    def same_text(self) -> bool:
        """Whether both write the same tokens."""
        return _same(self.expected, self.found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """All prompts, with the adapter off or on."""

    edited: bool
    compared: Sequence[Compared]
    limit: float
    """The difference up to which two answers count as close, in nats."""

    @property
    def grade(self) -> Grade:
        """With the edits: the worst grade of a prompt. Without: ``close`` includes quantised copies of the base."""
        grades = {compared.grade for compared in self.compared}
        worst: Grade = "different" if "different" in grades else "close" if "close" in grades else "equal"
        if self.edited or worst != "different":
            return worst
        if self.usual is None:
            return "close" if self.same >= len(self.compared) / 2 else "different"
        return "close" if self.usual <= _ANOTHER_MODEL else "different"

    @property
    def same(self) -> int:
        """Prompts to which both write the same tokens."""
        return sum(compared.same_text for compared in self.compared)

    @property
    def worst(self) -> Compared:
        """The prompt with the worst grade, and of these the one that deviates most."""
        order = ("equal", "close", "different")
        return max(
            self.compared,
            key=lambda compared: (order.index(compared.grade), compared.gap or 0.0, compared.deviation or 0.0),
        )

    @property
    def usual(self) -> float | None:
        """The median deviation; ``None`` where the server gives no log-probabilities."""
        told = [compared.deviation for compared in self.compared if compared.deviation is not None]
        return statistics.median(told) if told else None


def compare(
    model: LanguageModel,
    served: Served,
    *,
    prompts: Sequence[Prompt],
    tokens: int,
    edited: bool,
    base: Stage | None = None,
) -> Stage:
    """Compare a server with a model in memory.

    Args:
        model: the run's, in the state that the server should be in.
        tokens: the most tokens of an answer.
        edited: whether that state has the edits.
        base: the same without the edits. What a quantised base deviates there is not put down to the edits.
    """
    rows = [prompt.row for prompt in prompts]
    expected = answers_of(model, rows, tokens=tokens)
    found = served.answers(rows, tokens=tokens, edited=edited)
    deviations = [_deviation(ours, theirs) for ours, theirs in zip(expected, found, strict=True)]
    limit = base.limit if base is not None else _limit(deviations, edited=edited)
    gaps = _gaps(model, rows, expected, found)
    compared = [
        Compared(
            prompt=prompt,
            expected=ours,
            found=theirs,
            deviation=deviation,
            gap=gap,
            grade=_grade(_same(ours, theirs), deviation, gap, limit),
        )
        for prompt, ours, theirs, deviation, gap in zip(prompts, expected, found, deviations, gaps, strict=True)
    ]
    return Stage(edited=edited, compared=compared, limit=limit)


def _limit(deviations: Sequence[float | None], *, edited: bool) -> float:
    """What counts as close. The rounding of a quantised base is measured without the edits."""
    told = sorted(deviation for deviation in deviations if deviation is not None)
    if edited or not told or statistics.median(told) > _ANOTHER_MODEL:
        return _CLOSE
    return max(_CLOSE, 2 * told[min(int(_QUANTILE * len(told)), len(told) - 1)])


def _grade(same: bool, deviation: float | None, gap: float | None, limit: float) -> Grade:
    if (deviation or 0.0) > limit:
        return "different"
    if same:
        return "equal" if (deviation or 0.0) <= EXACT else "close"
    # Both log-probabilities of a choice may be off by the limit.
    return "close" if gap is not None and gap <= 2 * limit else "different"


def _same(ours: Answer, theirs: Answer) -> bool:
    if theirs.tokens is None:
        return ours.text.strip() == theirs.text.strip()
    return ours.tokens == theirs.tokens


def _deviation(ours: Answer, theirs: Answer) -> float | None:
    """The largest difference at the run's likely tokens. One that the server does not list is less likely there than
    those that it lists."""
    if ours.likeliest is None or not theirs.likeliest:
        return None
    least = min(theirs.likeliest.values())
    first, *others = sorted(ours.likeliest.items(), key=lambda item: -item[1])[:_COMPARED]
    return max(
        abs(value - theirs.likeliest[token]) if token in theirs.likeliest else max(0.0, value - least)
        for token, value in (first, *(item for item in others if item[1] >= _LIKELY))
    )


def _gaps(
    model: LanguageModel, rows: Sequence[Sequence[int]], expected: Sequence[Answer], found: Sequence[Answer]
) -> list[float | None]:
    """Where the tokens of two answers part, how much likelier the model's own token is to it than the other."""
    gaps: list[float | None] = [None] * len(rows)
    parted: list[tuple[int, tuple[int, ...], int, int]] = []
    for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours.tokens is None or theirs.tokens is None or ours.tokens == theirs.tokens:
            continue
        pairs = list(zip(ours.tokens, theirs.tokens, strict=False))
        place = next((place for place, (own, served) in enumerate(pairs) if own != served), None)
        if place is None:  # one of them ends where the other writes on
            gaps[index] = 0.0 if min(len(ours.tokens), len(theirs.tokens)) else float("inf")
            continue
        parted.append((index, (*rows[index], *ours.tokens[:place]), *pairs[place]))
    if parted:
        after = log_probabilities_after(model, [row for _, row, _, _ in parted])
        for (index, _, own, served), values in zip(parted, after, strict=True):
            gaps[index] = max(0.0, float(values[own] - values[served]))
    return gaps
