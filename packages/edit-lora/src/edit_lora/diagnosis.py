"""Looks for the one fault of an adapter that explains what a server answers.

Each fault is tried on the run's model in memory: the edits at another strength, without the edit of one weight, or with
that edit transposed. The fault whose model answers as the server does is named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from editcore import Changes, FactoredDelta, Written
from editcore.evaluation import log_probabilities_after
from editcore.models import EditedModel

from edit_lora.comparison import Compared, Stage

__all__ = ["diagnose"]

_PROMPTS = 8
"""Prompts that the faults are tried on: those that deviate most."""
_EXPLAINS = 0.25
"""Share of the deviation that a fault may leave unexplained. A quantised base leaves more, as much as without edits."""
_NOTICED = 0.05
"""Difference of the strength from 1 that counts as one."""
_STRENGTHS = (0.0, 0.125, 0.25, 0.5, 1.5, 2.0, 4.0, 8.0)
_STEPS = 8
"""Steps in which the best strength is narrowed down."""


@dataclass(frozen=True, slots=True)
class _Fault:
    sentence: str
    changes: Changes


def diagnose(
    edited: EditedModel, changes: Mapping[str, FactoredDelta], stage: Stage, base: Stage | None = None
) -> str | None:
    """A sentence about the fault that explains a stage with the edits; ``None`` if none of those that are tried does.

    Args:
        edited: the run's model.
        changes: what the run's adapter changes, by weight.
        base: the stage without the edits.
    """
    told = [compared for compared in stage.compared if compared.deviation is not None]
    told = sorted(told, key=lambda compared: -(compared.deviation or 0.0))[:_PROMPTS]
    if not told:
        return None
    usual = _distance(edited, told)
    with edited.unedited():
        asked = {compared.prompt.row for compared in told}
        noise = (
            _distance(edited, [compared for compared in base.compared if compared.prompt.row in asked])
            if base is not None
            else 0.0
        )

        def left(tried: Changes) -> float:
            if not tried:
                return _distance(edited, told)
            with edited.trial(Written(changes=tried)):
                return _distance(edited, told)

        found = [(left(fault.changes), fault.sentence) for fault in _faults(changes)]
        found += _strength(changes, left)
    least, sentence = min(found)
    return sentence if least <= max(_EXPLAINS * usual, min(1.5 * noise, usual / 2)) else None


def _faults(changes: Mapping[str, FactoredDelta]) -> Iterator[_Fault]:
    for name, delta in changes.items():
        others = {other: change for other, change in changes.items() if other != name}
        if others:
            yield _Fault(f"The edit of {name} is missing.", others)
        if delta.shape[0] == delta.shape[1]:
            turned = FactoredDelta(delta.right.T.contiguous(), delta.left.T.contiguous())
            yield _Fault(f"The edit of {name} is transposed.", {**others, name: turned})


def _strength(changes: Mapping[str, FactoredDelta], left: Callable[[Changes], float]) -> Iterator[tuple[float, str]]:
    """How much the strength of all edits together that explains most leaves, by golden-section search. Nothing if that
    strength is the right one."""

    @functools.cache
    def at(strength: float) -> float:
        return left({name: delta.scaled(strength) for name, delta in changes.items()} if strength else {})

    best = min(_STRENGTHS, key=at)
    place = _STRENGTHS.index(best)
    low, high = _STRENGTHS[max(place - 1, 0)], _STRENGTHS[min(place + 1, len(_STRENGTHS) - 1)]
    for _ in range(_STEPS):
        first, second = low + 0.382 * (high - low), high - 0.382 * (high - low)
        low, high = (low, second) if at(first) <= at(second) else (first, high)
    found = min((best, (low + high) / 2), key=at)
    yield at(0.0), "The edits are not there: the server answers as the base does."
    if found > _NOTICED and abs(found - 1) > _NOTICED:
        yield at(found), f"The edits are {found:.2f} times as strong as they should be: compare α, rank and scale."


def _distance(edited: EditedModel, told: Sequence[Compared]) -> float:
    """The mean difference, in nats, of the log-probabilities that the server lists."""
    ours = log_probabilities_after(edited.model, [compared.prompt.row for compared in told])
    differences = []
    for values, compared in zip(ours, told, strict=True):
        listed = compared.found.likeliest or {}
        differences += [abs(float(values[token]) - value) for token, value in listed.items()]
    return float(torch.tensor(differences).mean())
