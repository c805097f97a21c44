"""Running means and variances, which can be joined and rebuilt in any order of undoing.

Shapes: ``tokens`` rows, ``width`` of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EPSILON", "Moments"]

EPSILON = 1e-8
"""Added to the standard deviation, so that what never varies does not divide by zero."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and summed squared deviation of rows; float64 on the CPU."""

    count: int
    mean: Tensor
    """``[width]``"""
    deviation: Tensor
    """Σ (z − mean)², ``[width]``"""

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Of ``rows [tokens, width]``."""
        rows = rows.double().cpu()
        mean = rows.mean(dim=0)
        return cls(len(rows), mean, (rows - mean).square().sum(dim=0))

    def joined(self, other: Moments) -> Moments:
        """Of the rows of both (Chan et al. 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        between = shift.square() * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), self.deviation + other.deviation + between)

    def normalised(self, rows: Tensor) -> Tensor:
        """(z − mean) / (σ + ε) with the sample variance σ², ``[tokens, width]`` float64. All zero for one row alone."""
        sigma = (self.deviation / max(self.count - 1, 1)).sqrt()
        return (rows.double() - self.mean.to(rows.device)) / (sigma + EPSILON).to(rows.device)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As the ledger keeps them, under ``name``."""
        count = torch.tensor([self.count])
        return {f"{name}.count": count, f"{name}.mean": self.mean, f"{name}.deviation": self.deviation}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], name: str) -> Moments:
        """The inverse of :meth:`tensors`."""
        return cls(int(tensors[f"{name}.count"]), tensors[f"{name}.mean"], tensors[f"{name}.deviation"])
