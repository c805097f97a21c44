"""``check.json``: what a check of an edited model found. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from editcore._util.records import Record, read_record
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError

__all__ = ["CHECK_NAME", "Answers", "CheckLimits", "CheckRecord", "LostFact", "perplexity_in_words"]

CHECK_NAME = "check.json"


class LostFact(Record):
    """An active fact whose target is not what the model says at once."""

    id: str
    """Of the edit."""
    prompt: str
    target_new: str
    probability: float
    """Of the target: exp of the mean log-probability of its tokens."""
    said: str
    """What the model says instead."""
    in_answer: bool
    """Whether that contains the target."""


class Answers(Record):
    """What the unedited and the edited model say to one prompt."""

    prompt: str
    before: str
    after: str


@documented
class CheckRecord(Record):
    """What a check found."""

    time: str
    """In UTC, as ISO 8601 writes it."""
    changes: int
    """How often the directory was changed before: batches, and calls of undo and redo."""
    facts: int
    """Active facts, all of which were asked."""
    lost: tuple[LostFact, ...]
    """Facts that are not said."""
    neighbours: int
    """Prompts about other subjects that were asked before and after."""
    moved: tuple[Answers, ...]
    """Those to which the likeliest next token is another one than before."""
    subjects: int
    """Prompts about the edited subjects that no edit is about."""
    subjects_moved: tuple[Answers, ...]
    """As ``moved``."""
    text: str
    """What identifies the text that no edit is about."""
    tokens: int
    """Of that text."""
    perplexity_ratio: float
    """Of the text: the edited model's perplexity over that of the unedited one."""
    samples: tuple[Answers, ...]
    """Longer continuations."""

    @classmethod
    def last(cls, directory: Path) -> Self | None:
        """The last check of a directory; ``None`` if there was none, or its record cannot be read."""
        try:
            return read_record(directory / CHECK_NAME, cls)
        except RunError:
            return None

    @property
    def said(self) -> float:
        """Percent of the facts that are said; 100 if there are none."""
        return _percent(self.facts - len(self.lost), self.facts, otherwise=100.0)

    @property
    def neighbours_moved(self) -> float:
        """Percent of the neighbours whose answer is another one; 0 if there are none."""
        return _percent(len(self.moved), self.neighbours, otherwise=0.0)

    def passed_limits(self, limits: CheckLimits) -> Iterator[str]:
        """A sentence for each limit that is passed."""
        if self.said < limits.min_said:
            yield f"{self.said:.1f} % of the facts are said; at least {limits.min_said:g} % are wanted (--min-said)."
        if self.perplexity_ratio > limits.max_perplexity:
            yield (
                f"The perplexity is {self.perplexity_ratio:.3f} times that of the unedited model; at most "
                f"{limits.max_perplexity:g} is wanted (--max-perplexity)."
            )
        if self.neighbours_moved > limits.max_moved:
            yield (
                f"{self.neighbours_moved:.1f} % of the neighbours moved; at most {limits.max_moved:g} % are wanted "
                "(--max-moved)."
            )


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckLimits:
    """What a check must find."""

    min_said: float = 95.0
    """Percent of the facts that are said, at least."""
    max_perplexity: float = 1.05
    """The perplexity ratio, at most."""
    max_moved: float = 5.0
    """Percent of the neighbours whose answer is another one, at most."""


def perplexity_in_words(ratio: float) -> str:
    """A perplexity ratio in a word or two.

    >>> perplexity_in_words(1.004), perplexity_in_words(1.04), perplexity_in_words(1.5)
    ('as before', 'slightly worse', 'badly worse')
    """
    if ratio != ratio:
        return "not a number"
    if ratio <= _AS_BEFORE:
        return "as before"
    return "slightly worse" if ratio <= _SLIGHTLY else "badly worse"


_AS_BEFORE, _SLIGHTLY = 1.01, 1.1


def _percent(part: int, whole: int, *, otherwise: float) -> float:
    return 100.0 * part / whole if whole else otherwise
