"""The closed form of UltraEdit.

Shapes: ``tokens``, ``d_in`` and ``d_out`` the widths of a module.
"""

from __future__ import annotations

import torch
from editcore import FactoredDelta
from torch import Tensor

from edit_ultra.activations import ModuleTokens
from edit_ultra.moments import Moments

__all__ = ["solve"]


def solve(
    tokens: ModuleTokens, moments: Moments, *, learning_rate: float, ridge: float, weights: Tensor
) -> FactoredDelta:
    """Δ = Vᵀ (H Hᵀ + ridge · diag(1/w))⁻¹ H, with the rows h of H, and v = −η ‖ĥ‖² ĝ of V.

    ĥ and ĝ are the parts of (z − μ) / (σ + ε), z = [h; g]. It is the least-squares solution of Δ h = v.

    Args:
        moments: of z.
        weights: w, one per token, ``[tokens]``.
    """
    normalised = moments.normalised(torch.cat([tokens.inputs, tokens.gradients], dim=1))
    inputs, gradients = torch.split(normalised, [tokens.inputs.shape[1], tokens.gradients.shape[1]], dim=1)
    values = -learning_rate * inputs.square().sum(dim=1, keepdim=True) * gradients  # [tokens, d_out]
    gram = tokens.inputs @ tokens.inputs.T + torch.diag(ridge / weights.to(tokens.inputs))  # [tokens, tokens]
    left = torch.linalg.solve(gram, values)  # [tokens, d_out]
    return FactoredDelta(left.T.contiguous(), tokens.inputs)
