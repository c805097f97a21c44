"""Hyperparameters of replay; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Literal

from editcore import HParams
from pydantic import Field, model_validator

__all__ = ["ReplayHParams"]


class ReplayHParams(HParams):
    """How earlier facts are protected: which of them join a batch, how much they count, and which keys a batch should
    leave alone."""

    replay_mode: Literal["requests", "statistics", "both"] = "both"
    """``requests``: earlier facts join the batch and are solved for again. ``statistics``: keys of earlier facts are
    added to the second moment, C + μ Σ kkᵀ, so that the update changes little at them. ``both``: a sample is solved for
    again, and the keys of the other facts are added, if the editor can leave them alone."""
    replay_rate: Annotated[float, Field(ge=0)] | None = None
    """Replayed facts per new fact of a batch, rounded up: 0.3 adds 3 to a batch of 10, 2 adds 20, 0 adds none. The
    buffer size is the limit. Left out, it is 0 in the mode ``both`` if the editor can leave the keys of earlier facts
    alone, and no setting says which facts are replayed or how much they count; and 0.5 otherwise."""
    replay_asked: Annotated[float, Field(ge=0)] = 5.0
    """Earlier facts that the model is asked before a batch, per new fact, rounded up: 50 before a batch of 10. Those
    that it no longer says are optimised again and join the batch. All facts are asked in turn. 0 asks none."""
    replay_adaptive: bool = False
    """Adaptive merging: the number of replayed facts also grows with the buffer. It is replay_rate · √(new facts · kept
    facts), rounded up, within ``adaptive_min`` and ``adaptive_max``: at 0.5, 5 of 10 kept facts join a batch of 10, and
    36 of 500."""
    adaptive_min: Annotated[int, Field(ge=0)] = 1
    """Smallest number of replayed facts with ``replay_adaptive``."""
    adaptive_max: Annotated[int, Field(ge=0)] = 100
    """Largest number of replayed facts with ``replay_adaptive``."""
    replay_buffer_size: Annotated[int, Field(ge=1)] = 1000
    """Largest number of facts in the buffer. Each costs two float64 vectors per edited layer (a key and a value)."""
    replay_strategy: Annotated[str, Field(min_length=1)] = "random"
    """Which facts are replayed: ``random``, ``priority`` (first those that failed their last check, then those with the
    lowest strength), ``recent``, or the name of a ``replay.strategy`` that another package offers."""
    replay_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight w of a replayed fact's squared error; a new fact has 1. It matters in ridge solves only: in MEMIT, and in
    EMMET with λ > 0 (D + λ·diag(1/w)). At λ = 0 every fact is a constraint that holds exactly, and weights have no
    effect."""
    replay_statistics_weight: Annotated[float, Field(ge=0)] = 0.002
    """Weight μ of an earlier fact in the second moment: μ·‖Δk‖² for each is added in the objective to the mean of ‖Δk‖²
    over the text."""
    replay_importance: Mapping[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Importance of facts by tag, such as { capital = 2.0 }, 1 without one; a fact with several has their product. Read
    by ``priority``: importance · (1 − success)."""
    replay_eviction: Literal["fifo", "lru"] = "fifo"
    """Which fact leaves a full buffer: the one edited longest ago, or the one edited or replayed longest ago."""
    replay_duplicates: Literal["subject", "fact"] = "fact"
    """What a newer fact replaces in the buffer: every older fact of its subject, or only one with the same prompt."""
    replay_check: Literal["value", "model"] = "value"
    """How the strength of a fact is measured. ``value``: in closed form, from its stored key and value. ``model``: by
    the probability of its target, which costs a forward pass over every stored prompt after each batch."""
    replay_drift: Annotated[float, Field(ge=0)] = 0.1
    """Distance ‖Wk − v‖ / ‖v‖ above which a value has drifted. Replayed facts that drifted are solved for again."""
    replay_refresh: Annotated[float, Field(ge=0, le=1)] = 0.25
    """A replayed fact whose value has not drifted is optimised again if its target's probability has fallen below this
    share of the probability at the end of its optimisation. 0 turns this off; above 0, replayed prompts are scored
    first."""

    def asked(self, num_new: int) -> int:
        """Earlier facts that are asked before a batch of ``num_new`` facts."""
        return math.ceil(Decimal(str(self.replay_asked)) * num_new)

    def holds_keys(self, *, editor_can: bool) -> bool:
        """Whether the keys of earlier facts are added to the second moment.

        Args:
            editor_can: whether the editor can leave keys alone. In the mode ``statistics`` it is told of them anyway,
                so that the run says what is ignored.
        """
        asked = self.replay_mode == "statistics" or (self.replay_mode == "both" and editor_can)
        return asked and self.replay_statistics_weight > 0

    def rate(self, *, editor_can: bool) -> float:
        """Replayed facts per new fact.

        Args:
            editor_can: as above.
        """
        if self.replay_rate is not None:
            return self.replay_rate
        held = self.replay_mode == "both" and self.holds_keys(editor_can=editor_can)
        wanted = self.replay_adaptive or self.replay_strategy != "random" or self.replay_weight != 1
        return 0.0 if held and not wanted else 0.5

    @model_validator(mode="after")
    def _bounds(self) -> ReplayHParams:
        if self.adaptive_min > self.adaptive_max:
            raise ValueError(f"adaptive_min is {self.adaptive_min}, more than adaptive_max, {self.adaptive_max}")
        return self
