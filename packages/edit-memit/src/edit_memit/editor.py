"""The editor: MEMIT's solve inside the shared way of locate-then-edit methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editcore import EditBatch, EditContext, FactoredDelta, Proposal
from editcore.linalg import Metric, Update, solve_update
from editcore.locate_then_edit import Prepared, prepare, propose, resolve

from edit_memit.hparams import MemitHParams

if TYPE_CHECKING:
    from editcore import LanguageModel
    from torch import Tensor

__all__ = ["MemitEditor"]

_RIDGE = 1.0
"""λ of the shared solve: MEMIT's strength is in the weight of C alone."""


class MemitEditor:
    """Mass editing over several layers: in each, ΔW = R Kᵀ (w·C + KKᵀ)⁻¹, MEMIT's equation 14.

    ``R`` holds an equal share of what is left of each fact's residual for this layer and those above it, ``K`` the mean
    keys over the context templates, both measured with the layers below already changed; ``C`` is the second moment of
    the unedited model's keys.

    Departures from the reference code: the residual is measured where the projection writes, before any norm behind it;
    the n × n form of the same solve is used while a batch is smaller than the projection is wide.
    """

    def __init__(self, hparams: MemitHParams) -> None:
        self.hparams = hparams
        self._prepared: Prepared | None = None

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Fetch second moments and context templates from the unedited model."""
        self._prepared = prepare(model, self.hparams, context, owner="memit")
        return self._prepared.provenance()

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Solve one batch on the model as it is now, layer by layer."""
        if self._prepared is None:
            self.prepare(model, context)
        assert self._prepared is not None
        return propose(model, batch, context, hparams=self.hparams, prepared=self._prepared, solve=_solve, ridge=_RIDGE)

    def resolve(
        self,
        model: LanguageModel,
        batch: EditBatch,
        deltas: Mapping[str, FactoredDelta],
        rows: Sequence[int],
        context: EditContext,
    ) -> Mapping[str, FactoredDelta] | None:
        """Solve a batch of one layer again without some of its facts."""
        if self._prepared is None:
            self.prepare(model, context)
        assert self._prepared is not None
        return resolve(
            model,
            batch,
            deltas,
            rows,
            hparams=self.hparams,
            prepared=self._prepared,
            solve=_solve,
            ridge=_RIDGE,
        )


def _solve(keys: Tensor, residuals: Tensor, metric: Metric, weights: Tensor) -> Update:
    return solve_update(keys, residuals, metric, ridge=_RIDGE, weights=weights)
