"""How long the values of facts are on the unedited model: μ of the setting ``v_norms``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editcore.interfaces.protocols import EditContext
from editcore.interfaces.values import EditRequest
from editcore.locate_then_edit.preparation import prepare
from editcore.locate_then_edit.side_by_side import KnownOfLayer
from editcore.locate_then_edit.targets import optimise_targets
from editcore.locate_then_edit.token_rows import fact_rows
from editcore.models.tokens import lookup_row

if TYPE_CHECKING:
    from editcore.locate_then_edit.hparams import LocateThenEditHParams
    from editcore.models import LanguageModel

__all__ = ["measure_value_norms", "trimmed_mean"]

_TRIMMED = 0.05
"""Share of the values, the longest, that does not count. NAS: 0.05."""


def measure_value_norms(
    model: LanguageModel,
    requests: Sequence[EditRequest],
    *,
    hparams: LocateThenEditHParams,
    context: EditContext,
    owner: str,
) -> dict[int, float]:
    """μ by block, for every block at which ``hparams`` optimise values: the mean of ‖v₀ + δ‖ over facts, without the
    longest 5 %. NAS takes 1,000 facts.

    Facts whose lookup token is the first of all tokens are left out if ``first_token_layers`` are for them; the result
    is empty if no fact is left.

    Args:
        model: unedited.
        owner: the editor's name, for messages.

    Raises:
        HParamsError: the settings do not fit the model.
        RequestError, SubjectNotFoundError: as :func:`editcore.models.lookup_row`.
        NumericalError: a loss becomes NaN or Inf.
    """
    hparams = hparams.model_copy(update={"v_norm_anchor": False})
    prepared = prepare(model, hparams, context, owner=owner)
    usual = [
        request
        for request in requests
        if not prepared.first_token or lookup_row(model, request, fact_token=hparams.fact_token).lookup
    ]
    if not usual:
        return {}
    rows = [[fact] for fact in fact_rows(model, usual, prepared.templates, hparams)]
    return {
        layer: trimmed_mean(
            optimise_targets(
                model,
                rows,
                layer=layer,
                hparams=hparams,
                known=KnownOfLayer(inverse_metric=prepared.inverse_metrics.get(layer)),
                progress=context.progress,
            ).norms
        )
        for layer in hparams.value_layers
    }


def trimmed_mean(lengths: Sequence[float]) -> float:
    """The mean without the longest 5 %, rounded down to whole numbers of lengths.

    >>> trimmed_mean([*[1.0] * 19, 100.0])
    1.0
    """
    kept = sorted(lengths)[: len(lengths) - int(_TRIMMED * len(lengths))]
    return sum(kept) / len(kept)
