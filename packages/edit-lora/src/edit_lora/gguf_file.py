"""GGUF files: the base of a run is read and compared with the run's weights, and new files are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from editcore import ModelError
from torch import Tensor

from edit_lora.gguf_kind import field_of, open_gguf
from edit_lora.gguf_names import GgufLayout

__all__ = ["GgufFile", "Tensors", "check_base", "gguf_writer"]

Tensors = Mapping[str, tuple[Any, gguf.GGMLQuantizationType]]
"""Tensors by name as numpy arrays, with the type that they are stored in."""
_FAR = 0.5
"""‖file − model‖ / ‖model‖ of a weight from which on the file is another model. 2-bit types stay below 0.35; a weight
with its rows in another order is at 1.4."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file of a whole model."""

    path: Path
    architecture: str
    fields: Mapping[str, Any]
    """The metadata, by name."""
    tensors: Mapping[str, Any]
    """What the ``gguf`` package knows of each tensor, by name; the numbers stay on the disk."""
    alignment: int

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """The file at a path.

        Raises:
            ModelError: there is none, it is damaged, an adapter, or one part of several.
        """
        reader = open_gguf(path)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        if field_of(fields, gguf.Keys.General.TYPE) == gguf.GGUFType.ADAPTER:
            raise ModelError(f"{path} is an adapter; --base-gguf is the file of the model that it is for.")
        if (parts := field_of(fields, gguf.Keys.Split.LLM_KV_SPLIT_COUNT) or 1) > 1:
            raise ModelError(f"{path} is one of {parts} parts. Join them first: llama-gguf-split --merge.")
        return cls(
            path=path,
            architecture=str(field_of(fields, gguf.Keys.General.ARCHITECTURE)),
            fields=fields,
            tensors={tensor.name: tensor for tensor in reader.tensors},
            alignment=int(reader.alignment),
        )

    def weight(self, name: str) -> Tensor:
        """A tensor in float64, matrices as (out, in)."""
        found = self.tensors[name]
        return torch.from_numpy(np.array(gguf.dequantize(found.data, found.tensor_type), dtype=np.float64))

    def write_widened(self, path: Path) -> None:
        """Write the file again with the same numbers in float32."""
        kind = gguf.GGMLQuantizationType.F32
        self.write(path, {name: (self.weight(name).float().numpy(), kind) for name in self.tensors})

    def write(self, path: Path, replaced: Tensors) -> None:
        """Write the file again with some tensors replaced."""
        with gguf_writer(path, self.architecture) as writer:
            if self.alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
                writer.data_alignment = self.alignment
            for name, field in self.fields.items():
                if name == gguf.Keys.General.ARCHITECTURE:
                    continue
                kind, *parts = field.types
                writer.add_key_value(name, field.contents(), kind, sub_type=parts[-1] if parts else None)
            for name, tensor in self.tensors.items():
                data, kind = replaced.get(name, (tensor.data, tensor.tensor_type))
                writer.add_tensor(name, data, raw_dtype=kind)


def check_base(file: GgufFile, layout: GgufLayout, weights: Mapping[str, Tensor]) -> None:
    """Refuse a file that is not the model of a run, quantised or not.

    Args:
        weights: those that the run edited, by address: of the unedited model, float64, matrices as (out, in).

    Raises:
        ModelError: architecture, names, shapes or numbers differ.
    """
    if file.architecture != layout.architecture:
        raise ModelError(
            f"{file.path} is a model of the architecture '{file.architecture}', and the run's is "
            f"'{layout.architecture}'. Give the GGUF file of the run's base."
        )
    for address, weight in weights.items():
        name = layout.name(address)
        if name not in file.tensors:
            raise ModelError(f"{file.path} has no tensor '{name}'; give the GGUF file of the run's base.")
        expected, found = layout.reordered(address, weight), file.weight(name)
        if found.shape != expected.shape:
            raise ModelError(
                f"'{name}' of {file.path} has the shape {tuple(found.shape)}, that of the run's base has "
                f"{tuple(expected.shape)}. Give the GGUF file of the run's base."
            )
        if expected.ndim > 1 and (far := float((found - expected).norm() / expected.norm())) > _FAR:
            raise ModelError(
                f"{file.path} is not the run's base: its '{name}' differs from the run's by {far:.0%} of its size; a "
                f"quantised copy differs by less than {_FAR:.0%}."
            )


@contextmanager
def gguf_writer(path: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """A writer whose file is complete when the block ends."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
