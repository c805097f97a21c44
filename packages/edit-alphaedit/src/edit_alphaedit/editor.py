"""The editor: AlphaEdit's solve, within the steps that all locate-then-edit methods share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from editcore import EditContext, HParamsError
from editcore.locate_then_edit import LocateThenEdit
from editcore.second_moments import Metric, SubspaceMetric
from torch import Tensor

from edit_alphaedit.hparams import AlphaEditHParams

if TYPE_CHECKING:
    from editcore import LanguageModel

__all__ = ["AlphaEditEditor", "null_dimensions"]

_log = logging.getLogger(__name__)

_FEW, _MANY = 0.05, 0.98
"""Shares of the dimensions outside which a null space is reported."""


class AlphaEditEditor(LocateThenEdit):
    """Null-space constrained editing: ΔW = R KᵀP (K KᵀP + K_pK_pᵀP + L2·I)⁻¹, AlphaEdit's equation 14.

    P = UUᵀ projects onto the eigenvectors of C with small eigenvalues, along which the keys of ordinary text hardly
    reach. ``R`` holds what each fact asks of the projection's output, ``K`` its mean key over the context templates,
    ``K_p`` the keys of the facts before. The same solve is R K̃ᵀ (K̃K̃ᵀ + K̃_pK̃_pᵀ + L2·I)⁻¹Uᵀ with K̃ = UᵀK, which is
    symmetric: an :class:`editcore.second_moments.Accumulator` with the prior L2·I in the null space.

    Departures from the reference code: the null space ends at a multiple of the median eigenvalue, unless
    ``nullspace_threshold`` is given; ``K_p`` holds keys as they were solved, not measured again after the batch; the
    residual is measured where the projection writes, before any norm that follows; the solve runs in float64, in its
    symmetric form.
    """

    name = "alphaedit"
    right_from_keys = True
    hparams: AlphaEditHParams

    def __init__(self, hparams: AlphaEditHParams) -> None:
        super().__init__(hparams)
        self._null_spaces: dict[int, Metric] = {}

    @property
    def ridge(self) -> float:
        """1: the solve is regularised by L2 alone."""
        return 1.0

    @property
    def prior_weight(self) -> float | Literal["auto"]:
        """L2."""
        return self.hparams.L2

    @property
    def low_fraction_advice(self) -> str:
        """What weakens the solve: L2, and a null space that is too small for the keys."""
        return "Lower L2 or set it to 'auto', or raise nullspace_ratio."

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """As for all; and the null space of every layer.

        Raises:
            HParamsError: a null space has no dimension.
        """
        found, width = super().prepare(model, context), model.layout.d_ff
        layers = self.prepared(model, context).layers
        spaces = {layer: self.prior(model, layer, context).subspace for layer in layers}
        kept = {str(layer): space[0].shape[1] for layer, space in spaces.items() if space is not None}
        for layer, count in kept.items():
            if not _FEW * width <= count <= _MANY * width:
                _log.warning(
                    "%s: the null space of layer %s has %d of %d dimensions. With few of them facts are hardly "
                    "written, with nearly all of them text is not protected: set nullspace_ratio.",
                    self.name, layer, count, width,
                )  # fmt: skip
        return {**found, "null_space_dimensions": kept, "dimensions": width}

    def prior(self, model: LanguageModel, layer: int, context: EditContext) -> Metric:
        """I in the null space of C, infinite outside."""
        if layer not in self._null_spaces:
            moment = self.moment(model, layer, context)
            first = "" if layer in self.prepared(model, context).layers else "first-token-"
            spectrum = context.statistics.derived(layer, f"{first}spectrum", lambda _: _spectrum(moment.matrix))
            count = null_dimensions(spectrum["values"], self.hparams)
            if count == 0:
                raise HParamsError(
                    f"{self.name}: no direction of layer {layer} of {model.name} is in the null space; its smallest "
                    f"eigenvalue is {float(spectrum['values'][0]):.3g}. Raise "
                    f"{'nullspace_ratio' if self.hparams.nullspace_threshold is None else 'nullspace_threshold'}."
                )
            self._null_spaces[layer] = SubspaceMetric(spectrum["vectors"][:, :count].contiguous())
        return self._null_spaces[layer]


def null_dimensions(values: Tensor, hparams: AlphaEditHParams) -> int:
    """How many of the eigenvalues of C, ``[d_in]`` in ascending order, are those of its null space."""
    threshold = hparams.nullspace_threshold
    if threshold is None:
        threshold = hparams.nullspace_ratio * float(values.median())
    return int((values < threshold).sum())


def _spectrum(moment: Tensor) -> dict[str, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    return {"values": values, "vectors": vectors}
