"""The parameters of a model by address, and how each stores its matrix.

An address is a state-dict key, with an index for one slice of a stacked parameter:
``model.layers.3.mlp.experts.down_proj[17]``. A matrix is read and written as (out, in): a vector x goes in, W x comes
out. How a module stores it is known from its class and never guessed from a shape, because a square matrix fits both
ways:

* ``nn.Linear`` stores (out, in), as does every module that is not named here;
* ``Conv1D`` (GPT-2) stores (in, out);
* ``nn.Embedding`` stores one row per token, which is (in, out) for one-hot tokens;
* a stack of experts says it in ``is_transposed``, as those of transformers do.

Parameters with at most one axis are vectors. Stacks without an index are changed in the shape that is stored.
"""

from __future__ import annotations

import difflib
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editcore.interfaces.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Weights", "split_address"]

_ADDRESS = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<index>\d+)\])?")
_STACKS_IN_OUT = {"Llama4TextExperts"}
"""Classes of transformers that store a stack of (in, out) matrices without ``is_transposed``."""


@dataclass(frozen=True, slots=True)
class _Parameter:
    tensor: Tensor
    owner: nn.Module


def split_address(address: str) -> tuple[str, int | None]:
    """The state-dict key of an address, and its index if it has one.

    >>> split_address("model.layers.3.mlp.experts.down_proj[17]")
    ('model.layers.3.mlp.experts.down_proj', 17)

    Raises:
        ModelError: it is no address.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ModelError(f"'{address}' is not the address of a weight; one looks like 'name.weight' or 'name[3]'.")
    return match["name"], None if match["index"] is None else int(match["index"])


class Weights:
    """Every parameter of a model, each under one name.

    Tied parameters have the name of the input embedding, or else the first of their names. Names are read when the
    object is made: a backend that wraps modules later does not change them.
    """

    def __init__(self, hf: Any, *, model_name: str) -> None:
        self._model_name = model_name
        self._parameters: dict[str, _Parameter] = {}
        self._tied: dict[str, str] = {}
        embedding = hf.get_input_embeddings()
        first: dict[int, str] = {}
        if embedding is not None:
            first = {
                id(embedding.weight): name
                for name, parameter in hf.named_parameters(remove_duplicate=False)
                if parameter is embedding.weight and hf.get_submodule(name.rpartition(".")[0]) is embedding
            }
        for path, module in hf.named_modules(remove_duplicate=False):
            for own, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{own}" if path else own
                canonical = first.setdefault(id(parameter), name)
                if canonical == name:
                    self._parameters[name] = _Parameter(parameter, module)
                else:
                    self._tied[name] = canonical
        self._types = {name: entry.tensor.dtype for name, entry in self._parameters.items()}

    def names(self) -> tuple[str, ...]:
        """The name of every parameter."""
        return tuple(self._parameters)

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter that holds floating-point numbers, each once."""
        return (entry.tensor for entry in self._parameters.values() if entry.tensor.is_floating_point())

    def type_of(self, address: str) -> torch.dtype:
        """The type whose numbers a parameter has, and to which what is written is rounded. Its tensor may be of a
        larger type (:meth:`widen`).

        Raises:
            ModelError: as :meth:`stored`.
        """
        self.stored(address)
        return self._types[split_address(address)[0]]

    def widen(self) -> None:
        """Put parameters of fewer digits than float32 into float32. They keep their numbers and :meth:`type_of`."""
        for weight in self.parameters():
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))

    @contextmanager
    def held_as(self, dtype: torch.dtype, *, only_lossless: bool) -> Iterator[None]:
        """The parameters in another type, inside the block only; afterwards they have their old bits.

        Args:
            only_lossless: parameters that would lose digits keep their own type.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        types = dict(self._types)
        try:
            for name, entry in self._parameters.items():
                weight = entry.tensor
                if not weight.is_floating_point():
                    continue
                rounded = weight.data.to(dtype)
                if not only_lossless or torch.equal(rounded.to(weight.dtype), weight.data):
                    kept.append((weight, weight.data))
                    weight.data = rounded
                    self._types[name] = dtype
            yield
        finally:
            self._types = types
            for weight, bits in kept:
                weight.data = bits

    def tied(self) -> Mapping[str, str]:
        """By the further names of tied parameters, the one under which they are addressed."""
        return dict(self._tied)

    def stored(self, address: str) -> Tensor:
        """The parameter, or the slice of it, as it is stored: a view.

        Raises:
            ModelError: there is none, it is tied to another one, or it holds no floating-point numbers.
        """
        name, index = split_address(address)
        if name in self._tied:
            raise ModelError(
                f"'{name}' of {self._model_name} is tied to '{self._tied[name]}': they are one weight. Address it as "
                f"'{self._tied[name]}'; a change reaches both ends."
            )
        if name not in self._parameters:
            near = difflib.get_close_matches(name, self._parameters, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ModelError(f"{self._model_name} has no weight '{name}'.{hint}")
        tensor = self._parameters[name].tensor
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"'{name}' of {self._model_name} holds numbers of type {kind}; load the model without quantisation to "
                "edit it."
            )
        if index is None:
            return tensor
        if tensor.ndim < 2 or index >= tensor.shape[0]:
            raise ModelError(
                f"'{address}' of {self._model_name} is not there: '{name}' has the shape {tuple(tensor.shape)}"
                + (f", with slices 0 to {tensor.shape[0] - 1}." if tensor.ndim > 1 else " and no slices.")
            )
        return tensor[index]

    def as_out_in(self, address: str, tensor: Tensor) -> Tensor:
        """``tensor``, which has the shape of the stored weight, as (out, in), or back: a view.

        Vectors, and stacks without an index, stay as they are.

        Raises:
            ModelError: as :meth:`stored`, or it is not known how the module stores a slice.
        """
        stored = self.stored(address)
        if stored.ndim != 2:
            return tensor
        return tensor.T if self._stores_in_out(address) else tensor

    def _stores_in_out(self, address: str) -> bool:
        name, index = split_address(address)
        owner = self._parameters[name].owner
        if index is not None:
            says = getattr(owner, "is_transposed", None)
            if isinstance(says, bool):
                return says
            if type(owner).__name__ in _STACKS_IN_OUT:
                return True
            raise ModelError(
                f"'{name}' belongs to a {type(owner).__name__}, which does not say whether it stores its slices (out, "
                "in) or (in, out), and editcore will not guess."
            )
        return isinstance(owner, Conv1D | nn.Embedding)
