"""Which value a memory gives for an input: NeuralDB's gate and GRACE's codebook.

Shapes: ``slots`` keys, ``d_in`` and ``d_out`` the widths of the projection, ``...`` any number of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Codebook", "Gated", "Slots"]

_EQUAL = 1e-5
"""Relative difference below which two keys are equally near: how rows are padded shows in the last bits of an input."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Facts at one projection, the oldest first."""

    keys: Tensor
    """``[slots, d_in]``"""
    values: Tensor
    """``[slots, d_out]``"""
    labels: Sequence[str]
    """The target of each fact."""


class Gated:
    """NeuralDB: W x + r_j for the key k_j with the largest cosine to x, if that is above a gate; else W x.

    Args:
        slots: ``values`` are residuals r.
        gate: the least cosine.
    """

    def __init__(self, slots: Slots, gate: float) -> None:
        # Newest first: of equally near keys, the first one is taken.
        self._keys = torch.nn.functional.normalize(slots.keys.flip(0), dim=-1)
        self._residuals, self._gate = slots.values.flip(0), gate

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The output with what the memory adds, ``[..., d_out]``.

        Args:
            inputs: ``[..., d_in]``
            outputs: ``[..., d_out]``
        """
        cosines = torch.nn.functional.normalize(inputs.float(), dim=-1) @ self._keys.to(inputs.device).T  # [..., slots]
        best = cosines.amax(dim=-1, keepdim=True)
        slot = (cosines > best - _EQUAL).int().argmax(dim=-1)  # [...], the first of them
        added = self._residuals.to(outputs)[slot]  # [..., d_out]
        return torch.where(best > self._gate, outputs + added, outputs)


class Codebook:
    """GRACE: v_j for the key k_j nearest to x, if ‖x − k_j‖ ≤ ε_j; else W x.

    Facts enter one after the other (algorithm 1). d is the distance of a new key to its nearest key j.

    * d > ε_j + ε, or there is no key yet: the key is added with the radius ε.
    * Otherwise, if both facts have the same target: ε_j becomes max(ε_j, d), and no key is added.
    * Otherwise: the key is added, and both radii become d/2.

    Args:
        slots: ``values`` are outputs v.
        radius: ε of a new key.
    """

    def __init__(self, slots: Slots, radius: float) -> None:
        kept: list[int] = []
        radii: list[float] = []
        for row, key in enumerate(slots.keys):
            if not kept:
                kept, radii = [row], [radius]
                continue
            distances = (slots.keys[kept] - key).norm(dim=-1)
            nearest = int(distances.argmin())
            distance = float(distances[nearest])
            if distance > radii[nearest] + radius:
                kept.append(row)
                radii.append(radius)
            elif slots.labels[kept[nearest]] == slots.labels[row]:
                radii[nearest] = max(radii[nearest], distance)
            else:
                radii[nearest] = distance / 2
                kept.append(row)
                radii.append(distance / 2)
        self._keys, self._values = slots.keys[kept].flip(0), slots.values[kept].flip(0)
        self.radii = torch.tensor(radii, dtype=slots.keys.dtype).flip(0)  # [slots], the newest first

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The output, or the value of the memory instead, ``[..., d_out]``.

        Args:
            inputs: ``[..., d_in]``
            outputs: ``[..., d_out]``
        """
        flat = inputs.float().reshape(-1, inputs.shape[-1])
        keys = self._keys.to(flat)
        # Without the product of both: it loses the digits of small distances.
        distances = torch.cdist(flat, keys, compute_mode="donot_use_mm_for_euclid_dist")  # [n, slots]
        best = distances.amin(dim=-1, keepdim=True)
        slot = (distances <= best + _EQUAL * keys.norm(dim=-1)).int().argmax(dim=-1)  # [n], the first of them
        near = best[:, 0] <= self.radii.to(flat)[slot] + _EQUAL * keys.norm(dim=-1)[slot]
        values = self._values.to(outputs)[slot].reshape(outputs.shape)
        return torch.where(near.reshape(*inputs.shape[:-1], 1), values, outputs)
