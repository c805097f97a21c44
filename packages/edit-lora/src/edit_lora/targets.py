"""Which modules of a model can take an adapter, and which of them share one weight.

``nn.Linear``, ``Conv1D`` and ``nn.Embedding`` can. Where the input embedding and the output head are tied, a change of
their weight needs an adapter at both of these ends. To the embedding the weight is ``[d_model, vocab]`` (out, in), to
the head ``[vocab, d_model]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from editcore import FactoredDelta, ModelError
from editcore.models import split_address
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from edit_lora.factors import energy, residual

__all__ = ["Target", "Targets", "seen_from"]

Kind = Literal["linear", "conv1d", "embedding"]

_SAME = 1e-10
"""‖difference‖² / ‖change‖² up to which the factors at two ends of a weight count as one change: float32 rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A module that can take an adapter."""

    path: str
    shape: tuple[int, int]
    """``(d_out, d_in)``, however the module stores it; for an embedding ``(d_model, vocab)``."""
    kind: Kind


def seen_from(delta: FactoredDelta, here: Target, there: Target) -> FactoredDelta:
    """Turn a change of a shared weight from the orientation (out, in) of one module to that of another."""
    if (here.kind == "linear") == (there.kind == "linear"):
        return delta
    return FactoredDelta(delta.right.T, delta.left.T)


class Targets:
    """The modules of a model. Made while the model has no adapter."""

    def __init__(self, hf: Any) -> None:
        self._name = type(hf).__name__
        self._modules: dict[str, Any] = dict(hf.named_modules(remove_duplicate=False))
        self._places: dict[int, list[str]] = {}
        self._sharing: dict[int, list[str]] = {}
        self._kinds: dict[str, Kind | None] = {}
        for path, module in self._modules.items():
            self._places.setdefault(id(module), []).append(path)
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and self._places[id(module)] == [path]:
                self._sharing.setdefault(id(weight), []).append(path)
        embedding = hf.get_input_embeddings()
        for paths in self._sharing.values():  # the input embedding gives a tied weight its name
            paths.sort(key=lambda path: self._modules[path] is not embedding)

    def find(self, path: str) -> Target:
        """The module of that path.

        Raises:
            ModelError: there is none, or it is of a class that takes no adapter.
        """
        if path not in self._modules:
            raise ModelError(f"{self._name} has no module '{path}'.")
        module = self._modules[path]
        kind = self._kind(path)
        if kind is None:
            raise ModelError(
                f"'{path}' is a {type(module).__name__}; adapters go onto nn.Linear, Conv1D and nn.Embedding."
            )
        rows, columns = module.weight.shape
        return Target(path=path, shape=(rows, columns) if kind == "linear" else (columns, rows), kind=kind)

    def module(self, path: str) -> Any:
        """The module itself, without a wrapper that was put around it since."""
        return self._modules[path]

    def places(self, path: str) -> Sequence[str]:
        """Every path of the module: one object may stand in several places of the model."""
        return self._places[id(self._modules[path])]

    def ends(self, path: str) -> tuple[Target, ...]:
        """The module of that path and all that share its weight; the input embedding comes first.

        Raises:
            ModelError: one of them takes no adapter.
        """
        self.find(path)
        return tuple(self.find(other) for other in self._sharing[id(self._modules[path].weight)])

    def of_weight(self, address: str) -> tuple[Target, ...]:
        """The modules that need an adapter if a weight changes; the module that names the weight comes first.

        Raises:
            ModelError: an adapter cannot change that weight.
        """
        name, index = split_address(address)
        path, _, own = name.rpartition(".")
        if index is not None:
            what = "a slice of a stack"
        elif own != "weight" or path not in self._modules:
            what = "no weight of a module"
        elif any(self._kind(other) is None for other in self._sharing.get(id(self._weight(path)), [path])):
            what = f"a weight of a {type(self._modules[path]).__name__}"
        else:
            return tuple(sorted(self.ends(path), key=lambda end: end.path != path))
        raise ModelError(
            f"An adapter cannot change '{address}' of {self._name}, {what}: it goes onto whole modules of the classes "
            "nn.Linear, Conv1D and nn.Embedding. The backend raw changes any weight."
        )

    def by_module(self, factors: Mapping[str, FactoredDelta]) -> dict[str, FactoredDelta]:
        """Changes by the first path of each module, for modules that stand in several places."""
        return {self.places(path)[0]: delta for path, delta in factors.items()}

    def changed_alike(self, factors: Mapping[str, FactoredDelta], ends: Sequence[Target]) -> bool:
        """Whether the changes at all ends of a shared weight are the same change of that weight."""
        first = factors.get(ends[0].path)
        return (
            first is not None
            and all(end.path in factors for end in ends)
            and all(_is_one_change(seen_from(first, ends[0], end), factors[end.path]) for end in ends[1:])
        )

    def one_per_weight(self, factors: Mapping[str, FactoredDelta]) -> dict[str, FactoredDelta]:
        """The changes with one for each weight: of modules that share a weight only the first is kept.

        Args:
            factors: by module path.

        Raises:
            ModelError: the ends of one weight are changed differently, or only one of them is.
        """
        found: dict[str, FactoredDelta] = {}
        factors = self.by_module(factors)
        for path in factors:
            ends = self.ends(path)
            if ends[0].path in found:
                continue
            if not self.changed_alike(factors, ends):
                others = " and ".join(f"'{end.path}'" for end in ends if end.path != path)
                raise ModelError(
                    f"The adapter changes '{path}' otherwise than {others}, and in {self._name} they are one weight, "
                    "which cannot hold both. It can be attached beside a run's edits ('editctl adapters attach') or "
                    "merged into a model whose ends are untied ('editctl adapters merge'), but not become an edit."
                )
            found[ends[0].path] = factors[ends[0].path]
        return found

    def _kind(self, path: str) -> Kind | None:
        if path not in self._kinds:
            self._kinds[path] = _kind(self._modules[path])
        return self._kinds[path]

    def _weight(self, path: str) -> Any:
        return getattr(self._modules[path], "weight", None)


def _is_one_change(first: FactoredDelta, second: FactoredDelta) -> bool:
    return energy(residual(first, second)) <= _SAME * energy(first)


def _kind(module: Any) -> Kind | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        plain = type(module) is nn.Linear or _answers(module, weight.T)
        called = not isinstance(module, NonDynamicallyQuantizableLinear)  # torch's attention does not call it
        return "linear" if plain and called else None
    if isinstance(module, Conv1D):
        return "conv1d" if type(module) is Conv1D or _answers(module, weight) else None
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return "embedding" if type(module) is nn.Embedding or _looks_up(module) else None
    return None


def _answers(module: Any, matrix: Tensor) -> bool:
    """Whether a subclass of a linear module multiplies by its weight and adds its bias, as peft takes it to do.

    Args:
        matrix: ``[d_in, d_out]``
    """
    inputs = torch.linspace(-1, 1, matrix.shape[0]).to(matrix)[None]
    expected = inputs @ matrix + (0 if module.bias is None else module.bias)
    return _gives(module, inputs, expected)


def _looks_up(module: Any) -> bool:
    """Whether a subclass of an embedding returns rows of its weight, times ``embed_scale`` if it has that, as peft
    takes it to do. Embeddings of positions often ignore the ids and count positions themselves."""
    ids = torch.arange(min(4, module.weight.shape[0]), device=module.weight.device)
    return _gives(module, ids[None], module.weight[ids][None] * getattr(module, "embed_scale", 1.0))


@torch.no_grad()
def _gives(module: Any, inputs: Tensor, expected: Tensor) -> bool:
    try:
        found = module.forward(inputs)
    except Exception:  # noqa: BLE001  any error of a foreign module called with unexpected arguments
        return False
    close: bool = (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found.double(), expected.double(), rtol=2e-2, atol=2e-2)
    )
    return close
