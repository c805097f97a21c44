"""How large the change of each weight is, as a share of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editcore.runs.running_sums import KeepsSums
from editcore.second_moments.linalg import norm_of_sum

if TYPE_CHECKING:
    from editcore.interfaces.changes import Written
    from editcore.models.edited import EditedModel

__all__ = ["RelativeChanges"]


class RelativeChanges:
    """‖ΔW‖ / ‖W‖ of every changed weight. Norms of unedited weights are computed once."""

    def __init__(self, edited: EditedModel) -> None:
        self._edited = edited
        self.norms: dict[str, float] = {}
        """By address, the Frobenius norm of each unedited weight that was looked at."""

    def of(self, active: Sequence[Written]) -> dict[str, float]:
        """By address, the Frobenius norm of the sum of the changes over that of the unedited weight.

        Args:
            active: what the active batches write; they are in the model.
        """
        names = sorted({address for written in active for address in written.changes})
        if new := [name for name in names if name not in self.norms]:
            with self._edited.unedited():
                self.norms |= {name: float(self._edited.model.weight(name).double().norm()) for name in new}
        return {
            name: self._norm(name, active) / self.norms[name]
            for name in names
            if self.norms[name] > 0  # a weight of zeros has no relative change
        }

    def _norm(self, name: str, active: Sequence[Written]) -> float:
        backend = self._edited.backend
        change = backend.change_of(name) if isinstance(backend, KeepsSums) else None
        if change is not None:
            return float(change.norm())
        return norm_of_sum([written.changes[name] for written in active if name in written.changes])
