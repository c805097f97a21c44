"""A run's edited model as a GGUF file: the file of the base, with the edited weights in place of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from editcore import LanguageModel, ModelError, OverlaysWeights, Plugins, Progress, RunError
from editcore.interfaces import silent
from editcore.models import EditedModel, split_address
from editcore.runs import RunRecord, open_run, replacing
from torch import Tensor

from edit_lora.gguf_file import GgufFile, check_base
from edit_lora.gguf_kind import refuse_existing_file
from edit_lora.gguf_names import GgufLayout

__all__ = ["ReplacedTensor", "export_gguf_model"]

_TYPES: Mapping[str, gguf.GGMLQuantizationType] = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_BLOCK = 32
"""Numbers of a row to which q8_0 gives one scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacedTensor:
    """One tensor that was replaced."""

    name: str
    """Its name in the file."""
    was: str
    """Its type in the base's file."""
    now: str
    """Its type in the new file."""
    rounding: float
    """‖written − edited‖ / ‖edit‖: what its new type loses, in units of the edit."""


def export_gguf_model(
    run: Path,
    out: Path,
    *,
    base: Path,
    dtype: str | None = None,
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> list[ReplacedTensor]:
    """Write the GGUF file of the base again, with the weights that the run edited.

    Args:
        base: the GGUF file of the unedited model, of any quantisation. Its other tensors are copied as they are.
        dtype: of the edited matrices, ``f32``, ``f16`` or ``q8_0``. ``None``: the type that they have in ``base`` if it
            is one of these, else ``q8_0``. Vectors are always float32.

    Raises:
        RunError: there is no run, it has no active edits, or its model is not the one at hand.
        ModelError: some of its edits are kept beside the weights, or have no place in the file; or ``base`` is another
            model.
        StorageError: ``out`` is there already, or cannot be written.
    """
    refuse_existing_file(out)
    RunRecord.read(run)
    file = GgufFile.read(base)
    edited, ledger = open_run(run, plugins=plugins, progress=progress)
    edited.check_all_in_weights("written into a GGUF file")
    addresses = sorted({address for entry in ledger.history() for address in entry.changes})
    if not addresses:
        raise RunError(f"{run} has no active edits; there is nothing to export.")
    _refuse_slices(addresses)
    layout = GgufLayout.of(edited.model.hf.config)
    with edited.unedited():
        before = _weights(edited.model, addresses)
    check_base(file, layout, before)
    after = _edited_weights(edited, addresses)
    data, report = {}, []
    for address in addresses:
        for name in _places(file, layout, edited.model, address):
            target = layout.reordered(address, after[address])
            if target.ndim == 1:  # some norms are kept with 1 added
                target = file.weight(name) + layout.reordered(address, after[address] - before[address])
            found = file.tensors[name].tensor_type
            kind = _type_for(found, target, dtype)
            numbers = gguf.quantize(target.float().numpy(), kind)
            lost = (torch.from_numpy(gguf.dequantize(numbers, kind)).double() - target).norm()
            edit = (after[address] - before[address]).norm()
            data[name] = (numbers, kind)
            report.append(ReplacedTensor(name=name, was=found.name, now=kind.name, rounding=float(lost / edit)))
    with replacing(out) as temporary:
        file.write(temporary, data)
    return report


def _refuse_slices(addresses: Sequence[str]) -> None:
    if found := next((address for address in addresses if split_address(address)[1] is not None), None):
        raise ModelError(
            f"The edits change '{found}', one slice of a stack of experts, and such a change is not written into GGUF "
            "files. Write the whole model with --format merged, and convert it with llama.cpp."
        )


def _weights(model: LanguageModel, addresses: Sequence[str]) -> dict[str, Tensor]:
    """Copies in float64, matrices as (out, in)."""
    return {address: model.as_out_in(address, model.weight(address)).double().clone() for address in addresses}


def _edited_weights(edited: EditedModel, addresses: Sequence[str]) -> dict[str, Tensor]:
    with edited.backend.written() if isinstance(edited.backend, OverlaysWeights) else nullcontext():
        return _weights(edited.model, addresses)


def _places(file: GgufFile, layout: GgufLayout, model: LanguageModel, address: str) -> Iterator[str]:
    """The tensors that have a weight: tied embeddings may be there once or twice."""
    yield layout.name(address)
    for other, canonical in model.weights.tied().items():
        if canonical == address and (name := layout.name(other)) in file.tensors:
            yield name


def _type_for(found: gguf.GGMLQuantizationType, target: Tensor, asked: str | None) -> gguf.GGMLQuantizationType:
    if target.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    kind = _TYPES[asked] if asked is not None else found if found in _TYPES.values() else _TYPES["q8_0"]
    return _TYPES["f16"] if kind is _TYPES["q8_0"] and target.shape[-1] % _BLOCK else kind
