"""The editor: the method's solve inside the shared way of locate-then-edit methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editcore.locate_then_edit import LocateThenEdit

from edit_template_name.hparams import TemplateNameHParams
from edit_template_name.solve import solve

if TYPE_CHECKING:
    from editcore.locate_then_edit import LayerProblem
    from editcore.second_moments import Update

__all__ = ["TemplateNameEditor"]


class TemplateNameEditor(LocateThenEdit):
    """TEMPLATE SUMMARY"""

    name = "template-name"
    right_from_keys = True
    hparams: TemplateNameHParams

    @property
    def ridge(self) -> float:
        """λ of the solve."""
        return self.hparams.ridge

    def solve(self, problem: LayerProblem) -> Update:
        """One layer."""
        return solve(problem.keys, problem.residuals, problem.metric, problem.weights, ridge=self.ridge)
