"""The editor: EMMET's solve inside the shared way of locate-then-edit methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editcore import EditBatch, EditContext, FactoredDelta, Proposal
from editcore.linalg import Metric, Update, solve_update
from editcore.locate_then_edit import Prepared, prepare, propose, resolve

from edit_emmet.hparams import EmmetHParams

if TYPE_CHECKING:
    from editcore import LanguageModel
    from torch import Tensor

__all__ = ["EmmetEditor"]


class EmmetEditor:
    """Equality-constrained mass editing: ΔW = R (KᵀC'⁻¹K + λ·diag(1/w))⁻¹ KᵀC'⁻¹, C' = w₂·C + update_norm_lambda·I.

    ``R`` holds what each fact asks of the projection's output, ``K`` its mean key over the context templates, ``C`` the
    second moment of the unedited model's keys. With λ = 0 this is the paper's closed form (eq. 13).

    Departures from the reference code: λ is the same for one fact and for many; the residual is measured where the
    projection writes, before any norm behind it; C' is factorised, never inverted.
    """

    def __init__(self, hparams: EmmetHParams) -> None:
        self.hparams = hparams
        self._prepared: Prepared | None = None

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Fetch second moments and context templates from the unedited model."""
        self._prepared = prepare(model, self.hparams, context, owner="emmet")
        return self._prepared.provenance()

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Solve one batch on the model as it is now."""
        if self._prepared is None:
            self.prepare(model, context)
        assert self._prepared is not None
        return propose(
            model,
            batch,
            context,
            hparams=self.hparams,
            prepared=self._prepared,
            solve=self._solve,
            ridge=self.hparams.emmet_lambda,
            objective=self.hparams.calculate_objective_value,
        )

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
            solve=self._solve,
            ridge=self.hparams.emmet_lambda,
        )

    def _solve(self, keys: Tensor, residuals: Tensor, metric: Metric, weights: Tensor) -> Update:
        return solve_update(keys, residuals, metric, ridge=self.hparams.emmet_lambda, weights=weights)
