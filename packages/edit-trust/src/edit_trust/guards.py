"""Guards: any proposed change is made smaller, where it would disturb the weight most.

    Δ ← Δ (I − α U Uᵀ)                       SPHERE: U, the directions that the rows of W use most
    Δ ← Δ · min(1, limit · ‖W‖ / ‖Δ‖)        a limit on the relative change of a weight

W is the weight before the batch. Of a factored change, only the right factor changes, so that the columns of the left
one stay those of the requests.

Shapes: ``d_out`` and ``d_in`` the widths of a weight, ``rank`` of a change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from editcore import Changes, DenseDelta, FactoredDelta, Rework, WeightChange
from torch import Tensor

from edit_trust.hparams import TrustHParams

if TYPE_CHECKING:
    from editcore import LanguageModel

__all__ = ["guarded", "limited", "most_used_directions", "projected"]


@dataclass(slots=True)
class _Figures:
    """What the guards did to the changes of a batch."""

    directions: int = 0
    """Largest number of directions."""
    kept: float = 1.0
    """Smallest ‖Δ‖ after the projection over before."""
    scale: float = 1.0
    """Smallest factor of the limit."""


@torch.no_grad()
def guarded(model: LanguageModel, changes: Changes, hparams: TrustHParams) -> Rework | None:
    """What the guards that are set leave of some changes; ``None`` if none is set."""
    if not hparams.trust_project and hparams.trust_max_change is None:
        return None
    figures, notes, found = _Figures(), list[str](), dict[str, WeightChange]()
    for address, proposed in changes.items():
        change, weight = proposed, model.as_out_in(address, model.weight(address)).double()
        if hparams.trust_project and len(change.shape) == 2:
            directions = most_used_directions(weight, share=hparams.trust_project_share)
            change = projected(change, directions, strength=hparams.trust_project)
            figures.directions = max(figures.directions, directions.shape[1])
            if proposed.norm() > 0:
                figures.kept = min(figures.kept, change.norm() / proposed.norm())
        norm = float(weight.norm())
        if hparams.trust_max_change is not None and norm > 0:
            ratio = change.norm() / norm
            if ratio > hparams.trust_max_change:
                change = limited(change, hparams.trust_max_change / ratio)
                figures.scale = min(figures.scale, hparams.trust_max_change / ratio)
                notes.append(
                    f"The change of {address} is {ratio:.3g} times as long as the weight; trust_max_change scales it "
                    f"to {hparams.trust_max_change:g}."
                )
        found[address] = change
    diagnostics: dict[str, float] = {}
    if hparams.trust_project:
        diagnostics |= {"guard_directions": float(figures.directions), "guard_kept": figures.kept}
    if hparams.trust_max_change is not None:
        diagnostics["guard_scale"] = figures.scale
    return Rework(changes=found, diagnostics=diagnostics, notes=tuple(notes))


def most_used_directions(weight: Tensor, *, share: float) -> Tensor:
    """U: the leading eigenvectors of M = ŴᵀŴ / d_out, as many as together have at most ``share`` of its trace.

    Ŵ has the rows of W at length 1 (SPHERE).

    Args:
        weight: W, ``[d_out, d_in]`` float64.

    Returns:
        ``[d_in, n]``; n may be 0.
    """
    rows = weight / weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    wide = rows.shape[0] < rows.shape[1]
    gram = rows @ rows.T if wide else rows.T @ rows  # the smaller of the two, which have the same eigenvalues
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    count = int((values.cumsum(0) <= share * values.sum()).sum())
    leading: Tensor = vectors[:, :count]
    return (rows.T @ leading) / values[:count].sqrt() if wide else leading


def projected(change: WeightChange, directions: Tensor, *, strength: float) -> WeightChange:
    """Δ (I − α U Uᵀ), with α the ``strength`` and U the ``directions [d_in, n]``; a change that is no matrix is left as
    it is."""
    if isinstance(change, FactoredDelta):
        return FactoredDelta(change.left, _without(change.right, directions, strength))
    if isinstance(change, DenseDelta) and change.value.ndim == 2:
        return DenseDelta(_without(change.value, directions, strength))
    return change


def _without(rows: Tensor, directions: Tensor, strength: float) -> Tensor:
    """``rows [n, d_in]`` with less of their part along the directions."""
    basis = directions.to(rows)
    return rows - strength * (rows @ basis) @ basis.T


def limited(change: WeightChange, factor: float) -> WeightChange:
    """A change times ``factor``; of a factored one, the right factor."""
    if isinstance(change, FactoredDelta):
        return FactoredDelta(change.left, factor * change.right)
    return change.scaled(factor)
