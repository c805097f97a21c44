"""A run's edits as a llama.cpp adapter: one GGUF file.

llama.cpp adds ``scale · α / r · B (A x)`` to what a projection gives, with r the rows of A and one α for all tensors.
So all tensors get one rank, filled up with zeros, and α is that rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from editcore import FactoredDelta, HParamsError, ModelError, Plugins, Progress
from editcore.interfaces import silent
from editcore.runs import replacing

from edit_lora.adapter import Adapter
from edit_lora.export import AS_THE_RUN_SAYS, AdapterSize, BuiltAdapter, Exported, build_adapter
from edit_lora.factors import balanced, padded, rounding
from edit_lora.gguf_file import GgufFile, check_base, gguf_writer
from edit_lora.gguf_kind import refuse_existing_file
from edit_lora.gguf_names import GgufLayout
from edit_lora.targets import Target

__all__ = ["GgufForm", "export_gguf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufForm:
    """How an adapter is written."""

    size: AdapterSize = AS_THE_RUN_SAYS
    """Its rank."""
    half: bool = False
    """Whether the factors are kept in float16 rather than in float32."""
    base: Path | None = None
    """The GGUF file that the adapter will be used with. It is compared with the run's base."""


EXACT = GgufForm()


def export_gguf(
    run: Path,
    out: Path,
    form: GgufForm = EXACT,
    *,
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write a run's active edits as an adapter that ``llama-server --lora`` loads.

    Raises:
        RunError: there is no run, or it has no active edits.
        ModelError: llama.cpp has no place for some of the edits, or the base of ``form`` is another model.
        HParamsError: a factor does not fit float16.
        StorageError: ``out`` is there already, or cannot be written.
    """
    refuse_existing_file(out)
    file = None if form.base is None else GgufFile.read(form.base)
    built = build_adapter(run, size=form.size, plugins=plugins, progress=progress)
    layout = GgufLayout.of(built.base.model.hf.config)
    ends = [end for targets in built.ends.values() for end in targets]
    _refuse_embeddings(ends)
    if file is not None:
        model = built.base.model
        weights = {name: model.as_out_in(name, model.weight(name)).double() for name in built.ends}
        check_base(file, layout, weights)
    tensors, lost = _tensors(built.adapter, layout, ends, half=form.half)
    with replacing(out) as temporary, gguf_writer(temporary, layout.architecture) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(built.adapter.rank))
        writer.add_name(out.stem)
        _add_origin(writer, built)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
    return Exported(rank=built.adapter.rank, modules=built.modules, edits=built.edits, rounding=lost)


def _refuse_embeddings(ends: Sequence[Target]) -> None:
    if found := next((end.path for end in ends if end.kind == "embedding"), None):
        raise ModelError(
            f"The edits change '{found}', and adapters for llama.cpp are written for linear modules only. Write the "
            "whole model with --format gguf-model."
        )


def _tensors(
    adapter: Adapter, layout: GgufLayout, ends: Sequence[Target], *, half: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """The factors by their names in the file, and by module what their type loses."""
    tensors, lost = {}, {}
    for end in sorted(ends, key=lambda end: end.path):
        address = f"{end.path}.weight"
        even = padded(balanced(adapter.factors[end.path]), adapter.rank)
        factors = {"lora_a": even.right, "lora_b": layout.reordered(address, even.left)}
        for side, factor in factors.items():
            tensor = factor.numpy().astype(np.float16 if half else np.float32)
            if not np.isfinite(tensor).all():
                raise HParamsError(f"The edits of '{end.path}' are too large for f16; take --dtype f32.")
            tensors[f"{layout.name(address)}.{side}"] = tensor
        down, up = (torch.from_numpy(tensors[f"{layout.name(address)}.{side}"]).double() for side in factors)
        lost[end.path] = rounding(FactoredDelta(factors["lora_b"], factors["lora_a"]), FactoredDelta(up, down))
    return tensors, lost


def _add_origin(writer: gguf.GGUFWriter, built: BuiltAdapter) -> None:
    """Say in the file which base the adapter is for."""
    model = built.record.model
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, model.name if model.hub is None else model.hub.id)
    if model.hub is not None:
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{model.hub.id}")
    writer.add_string("editcore.base_fingerprint", model.fingerprint)
    writer.add_uint32("editcore.edits", built.edits)
