"""The editor: the method's solve inside the shared way of locate-then-edit methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editcore.locate_then_edit import LocateThenEdit

from edit_template_name.hparams import TemplateNameHParams
from edit_template_name.solve import solve

if TYPE_CHECKING:
    from editcore.second_moments import Metric, Update
    from torch import Tensor

__all__ = ["TemplateNameEditor"]


class TemplateNameEditor(LocateThenEdit):
    """TEMPLATE SUMMARY"""

    name = "template-name"
    hparams: TemplateNameHParams

    @property
    def ridge(self) -> float:
        """λ of the solve."""
        return self.hparams.ridge

    def solve(self, keys: Tensor, residuals: Tensor, metric: Metric, weights: Tensor) -> Update:
        """One layer."""
        return solve(keys, residuals, metric, weights, ridge=self.ridge)
