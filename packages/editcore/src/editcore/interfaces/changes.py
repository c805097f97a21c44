"""What an edit puts into a model: changes of weights, and knowledge kept beside them.

Shapes: ``d_out`` and ``d_in`` the two widths of a weight matrix, ``rank`` the inner width of a factored change.

A change is addressed by the state-dict key of its weight, with an index for one slice of a stacked parameter:
``model.layers.3.mlp.down_proj.weight``, ``model.layers.3.mlp.experts.down_proj[17]``. Matrices are always (out, in),
whatever the module stores; see :mod:`editcore.models.weights`.

This module imports no torch: tensors appear in annotations only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from editcore.interfaces.documented import documented

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Attachment",
    "Changes",
    "DenseDelta",
    "FactoredDelta",
    "VectorDelta",
    "WeightChange",
    "Written",
    "as_change",
]


@documented
@dataclass(frozen=True, slots=True)
class FactoredDelta:
    """A low-rank change of a matrix, ``left @ right``."""

    kind: ClassVar[str] = "factored"

    left: Tensor
    """``[d_out, rank]``"""
    right: Tensor
    """``[rank, d_in]``"""

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"factors of shape {tuple(self.left.shape)} and {tuple(self.right.shape)} do not multiply")

    @property
    def shape(self) -> tuple[int, ...]:
        """``(d_out, d_in)``"""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        """Inner width of the factors."""
        return int(self.left.shape[1])

    def dense(self) -> Tensor:
        """The change itself, ``[d_out, d_in]``."""
        return self.left @ self.right

    def is_finite(self) -> bool:
        """Whether no entry of the factors is NaN or infinite."""
        return bool(self.left.isfinite().all() and self.right.isfinite().all())

    def norm(self) -> float:
        """Frobenius norm, from the factors alone: ``‖LR‖² = tr((LᵀL)(RRᵀ))``."""
        gram_left = self.left.T @ self.left  # [rank, rank]
        gram_right = self.right @ self.right.T  # [rank, rank]
        return float((gram_left * gram_right).sum().clamp_min(0.0).sqrt())

    def scaled(self, factor: float) -> FactoredDelta:
        """``factor`` times the change."""
        return FactoredDelta(self.left * factor, self.right)

    def to(self, device: torch.device | str) -> FactoredDelta:
        """The same on ``device``."""
        return FactoredDelta(self.left.to(device), self.right.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; :func:`as_change` is the inverse."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True, slots=True)
class _WholeDelta:
    """A change that is kept as one tensor."""

    kind: ClassVar[str]

    value: Tensor
    """The change itself. Its shape is that of the weight it changes; a matrix is ``[d_out, d_in]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``value``."""
        return tuple(self.value.shape)

    def dense(self) -> Tensor:
        """The change itself."""
        return self.value

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return bool(self.value.isfinite().all())

    def norm(self) -> float:
        """Frobenius norm; for a vector, the Euclidean norm."""
        return float(self.value.double().norm())

    def scaled(self, factor: float) -> Self:
        """``factor`` times the change."""
        return type(self)(self.value * factor)

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        return type(self)(self.value.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; :func:`as_change` is the inverse."""
        return {self.kind: self.value}


@documented
@dataclass(frozen=True, slots=True)
class DenseDelta(_WholeDelta):
    """A change of a whole matrix, ``value [d_out, d_in]``, or of a whole parameter with three or more axes, in the
    shape in which that is stored."""

    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        if self.value.ndim < 2:
            raise ValueError(f"a dense change has two axes or more, found the shape {tuple(self.value.shape)}")


@documented
@dataclass(frozen=True, slots=True)
class VectorDelta(_WholeDelta):
    """A change of a bias, of a norm's scale, or of any other parameter with one axis or none; ``value`` has the
    parameter's shape, ``[d]`` or ``[]``."""

    kind: ClassVar[str] = "vector"

    def __post_init__(self) -> None:
        if self.value.ndim > 1:
            raise ValueError(f"a change of a vector has one axis at most, found the shape {tuple(self.value.shape)}")


WeightChange = FactoredDelta | DenseDelta | VectorDelta
"""A change of one weight. The union is closed: backends, ledger and packs know its three members."""
Changes = Mapping[str, WeightChange]
"""Changes by the address of their weight."""


def as_change(tensors: Mapping[str, Tensor]) -> WeightChange:
    """The change whose ``tensors()`` these are.

    Raises:
        ValueError: the names are those of no kind of change.
    """
    match sorted(tensors):
        case ["left", "right"]:
            return FactoredDelta(tensors["left"], tensors["right"])
        case ["dense"]:
            return DenseDelta(tensors["dense"])
        case ["vector"]:
            return VectorDelta(tensors["vector"])
        case names:
            raise ValueError(f"no change of a weight is made of {' and '.join(names) or 'nothing'}")


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """Knowledge kept beside the weights: a gated memory, a codebook, a text to put before prompts.

    It is data alone. The class announced for its ``kind`` (:class:`editcore.AttachmentSpec`) installs a sequence of
    attachments into a model and takes them out again.
    """

    kind: str
    """The name of its :class:`editcore.AttachmentSpec`."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """By name; kept in the ledger beside the batch."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Everything else, as JSON has it: texts, numbers, lists and mappings of them."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one batch puts into the model, and what its editor wants kept with it."""

    changes: Changes = field(default_factory=dict)
    """By the address of their weight."""
    attachment: Attachment | None = None
    """Knowledge kept beside the weights."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors by name that the editor reads back from the ledger; see :class:`editcore.Remembers`."""
