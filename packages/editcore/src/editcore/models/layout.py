"""Where the MLP output projections of a model are, found by running it and not by its name.

How it is found: :mod:`editcore.models.layout_probes`. How it is checked: :mod:`editcore.models.layout_check`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import ModelError
from editcore.models.layout_probes import (
    block_calls,
    is_norm,
    is_projection,
    model_type,
    module_at,
    probe_block,
    probe_logits,
    readings_of,
)
from editcore.models.module_hooks import hooks

__all__ = ["ModelLayout", "attention_output", "detect_layout", "override_names", "stored_orientation"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """The modules of a decoder that editing needs. Paths are names of ``model.hf.named_modules()``."""

    blocks: str
    """Path of a decoder block, with ``{}`` for its index: ``"model.layers.{}"``."""
    projection: str
    """Path of the MLP output projection, with ``{}``. It maps ``d_ff`` to ``d_model``; edits change its weight."""
    final_norm: str
    """Path of the norm before the head; empty where there is none."""
    head: str
    """Path of the output embedding."""
    num_layers: int
    """How many decoder blocks there are."""
    d_model: int
    """Width of the residual stream."""
    d_ff: int
    """Width of the MLP's hidden layer."""
    vocab_size: int
    """Rows of the output embedding, which may be more than the tokenizer's."""
    orientation: Literal["out_in", "in_out"]
    """How the projection stores its weight, by its class: ``nn.Linear`` (out, in), ``Conv1D`` (in, out)."""
    has_bias: bool
    """Whether the projection adds a bias."""
    norm_placement: Literal["pre", "post"]
    """``"post"`` if there is a norm between the projection and the residual stream (Gemma 2 and 3, OLMo 2)."""
    post_norm: str = ""
    """Path of that norm, with ``{}``; empty for ``"pre"``."""
    residual_scale: float = 1.0
    """The block multiplies the output of the MLP by it before adding it (Granite's ``residual_multiplier``)."""

    def weight_name(self, layer: int) -> str:
        """The key of the projection's weight in the state dict: ``"model.layers.3.mlp.down_proj.weight"``."""
        return self.projection.format(layer) + ".weight"

    def layer_of(self, weight_name: str) -> int:
        """The block of a projection's weight; the inverse of :meth:`weight_name`.

        Raises:
            ModelError: it is no projection's weight.
        """
        before, _, after = (self.projection + ".weight").partition("{}")
        match = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), weight_name)
        if match is None or int(match[1]) >= self.num_layers:
            raise ModelError(
                f"'{weight_name}' is not an MLP output projection of this model. "
                f"They are named {self.weight_name(0)} to {self.weight_name(self.num_layers - 1)}."
            )
        return int(match[1])


def override_names() -> tuple[str, ...]:
    """The fields that a model family may set: ``blocks``, ``projection``, ``final_norm``, ``head``."""
    return ("blocks", "projection", "final_norm", "head")


def detect_layout(hf_model: Any, *, overrides: Mapping[str, str] | None = None) -> ModelLayout:
    """The layout of a causal language model, from its modules and one short forward pass.

    Args:
        overrides: paths by field name, from the announcement of a model family. They are used as given.

    Raises:
        ModelError: a part of the structure is not found, or the model routes tokens to experts.
    """
    given = dict(overrides or {})
    if unknown := sorted(set(given) - set(override_names())):
        raise ModelError(
            f"A model family may set {', '.join(override_names())}; found '{unknown[0]}' "
            f"(model type {model_type(hf_model)})."
        )
    _refuse_experts(hf_model)
    head_path, head = _head(hf_model, given.get("head"))
    blocks, num_layers = _blocks(hf_model, given.get("blocks"))
    projection, d_model = _projection(hf_model, blocks, given.get("projection"))
    module: Any = module_at(hf_model, projection.format(0))
    orientation = stored_orientation(module, projection)
    d_out, d_in = module.weight.shape if orientation == "out_in" else reversed(module.weight.shape)
    if d_out != d_model:
        raise ModelError(f"'{projection}' writes {d_out} numbers, but the residual stream has {d_model}.")
    _same_in_all_blocks(hf_model, projection, num_layers, module)
    (call,) = block_calls(hf_model, blocks, [0])
    probe = probe_block(module_at(hf_model, blocks.format(0)), call, projection.removeprefix(f"{blocks}."))
    return ModelLayout(
        blocks=blocks,
        projection=projection,
        final_norm=given.get("final_norm", _final_norm(hf_model, blocks.format(num_layers - 1), head_path, d_model)),
        head=head_path,
        num_layers=num_layers,
        d_model=d_model,
        d_ff=d_in,
        vocab_size=head.weight.shape[0],
        orientation=orientation,
        has_bias=getattr(module, "bias", None) is not None,
        norm_placement="post" if probe.norm else "pre",
        post_norm=f"{blocks}.{probe.norm}" if probe.norm else "",
        residual_scale=probe.scale,
    )


def _refuse_experts(hf_model: Any) -> None:
    """Refuse a mixture of experts: a three-dimensional parameter, or a list of equal MLPs, inside a block."""
    for name, module in hf_model.named_modules():
        inside_block = re.search(r"\.\d+\.", name) is not None
        stacked = not isinstance(module, nn.modules.conv._ConvNd) and any(
            parameter.ndim >= 3 and parameter.shape[0] > 1 for parameter in module.parameters(recurse=False)
        )
        listed = isinstance(module, nn.ModuleList) and len(module) > 1 and any(True for _ in module[0].children())
        if inside_block and (stacked or listed):
            raise ModelError(
                f"{type(hf_model).__name__} ({model_type(hf_model)}) routes tokens to experts ('{name}'), and "
                "mixture-of-experts models are not supported yet. Choose a dense model."
            )


def _head(hf_model: Any, given: str | None) -> tuple[str, Any]:
    head = module_at(hf_model, given) if given else hf_model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(
            f"{type(hf_model).__name__} has no output embedding; editcore edits causal language models "
            "(a class that ends in ForCausalLM)."
        )
    path = given or next((name for name, module in hf_model.named_modules() if module is head), "")
    return path, head


def _blocks(hf_model: Any, given: str | None) -> tuple[str, int]:
    """The path of the decoder blocks, and how many there are.

    They are the longest list of equal modules that a forward pass on text runs, and not inside another list.
    """
    if given:
        prefix, _, rest = given.partition(".{}")
        modules = module_at(hf_model, prefix)
        if rest or not isinstance(modules, nn.ModuleList):
            raise ModelError(f"'{given}' must be the path of a list of blocks followed by '.{{}}'.")
        return given, len(modules)
    lists = [
        (name, module)
        for name, module in hf_model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(block) for block in module}) == 1
        and re.search(r"\.\d+\.", name) is None
    ]
    if len(lists) > 1:
        ran: set[str] = set()
        with hooks() as handles:
            for name, module in lists:
                handles.append(module[0].register_forward_hook(lambda *_, name=name: ran.add(name)))
            with torch.no_grad():
                probe_logits(hf_model)
        lists = [(name, module) for name, module in lists if name in ran]
    if not lists:
        raise ModelError(
            f"{type(hf_model).__name__} has no list of equal decoder blocks, so its layers cannot be found. "
            "A plugin can name them with a ModelFamilySpec."
        )
    name, module = max(lists, key=lambda item: len(item[1]))
    return f"{name}.{{}}", len(module)


def stored_orientation(module: Any, name: str) -> Literal["out_in", "in_out"]:
    """How a module stores its weight, by its class.

    Raises:
        ModelError: the class is not known, or the weight is packed.
    """
    if isinstance(module, nn.Linear):
        if tuple(module.weight.shape) == (module.out_features, module.in_features):
            return "out_in"
        raise ModelError(
            f"'{name}' ({type(module).__name__}) stores a packed weight of shape {tuple(module.weight.shape)}; "
            "load the model without quantisation to edit it."
        )
    if isinstance(module, Conv1D):
        return "in_out"
    raise ModelError(
        f"'{name}' is a {type(module).__name__}; editcore knows how nn.Linear and Conv1D store their weights, "
        "and will not guess."
    )


def _same_in_all_blocks(hf_model: Any, projection: str, num_layers: int, first: Any) -> None:
    for layer in range(1, num_layers):
        try:
            other = hf_model.get_submodule(projection.format(layer))
        except AttributeError:
            other = None
        if type(other) is not type(first) or other.weight.shape != first.weight.shape:
            raise ModelError(
                f"The blocks of {type(hf_model).__name__} differ: block 0 has '{projection.format(0)}' of shape "
                f"{tuple(first.weight.shape)}, block {layer} has no equal one. Models of mixed blocks are not "
                "supported yet."
            )


def _projection(hf_model: Any, blocks: str, given: str | None) -> tuple[str, int]:
    (call,) = block_calls(hf_model, blocks, [0])
    readings, d_model = readings_of(module_at(hf_model, blocks.format(0)), call)
    if given:
        return given, d_model
    found = [name for name in readings if is_projection(name, readings, d_model)]
    if len(found) != 1:
        what = f"{len(found)} candidates ({', '.join(found)})" if found else "none"
        raise ModelError(
            f"Found {what} for the MLP output projection in '{blocks.format(0)}' of {type(hf_model).__name__}, among "
            f"the linear modules {', '.join(readings) or 'none'}. A plugin can name it with a ModelFamilySpec."
        )
    return f"{blocks}.{found[0]}", d_model


def attention_output(hf_model: Any, layout: ModelLayout) -> str | None:
    """Path of the attention's output projection, with ``{}``; ``None`` where it is not found.

    It is the one linear module of a block that writes ``d_model`` numbers and reads outputs at other tokens.
    """
    block = module_at(hf_model, layout.blocks.format(0))
    (call,) = block_calls(hf_model, layout.blocks, [0])
    readings, d_model = readings_of(block, call)
    found = [name for name, reading in readings.items() if reading.width == d_model and reading.other]
    if len(found) != 1:
        return None
    path = f"{layout.blocks}.{found[0]}"
    kinds = set()
    for layer in range(layout.num_layers):
        try:
            kinds.add(type(hf_model.get_submodule(path.format(layer))))
        except AttributeError:  # blocks of several kinds
            return None
    return path if len(kinds) == 1 else None


def _final_norm(hf_model: Any, last_block: str, head: str, d_model: int) -> str:
    """Path of the last norm that runs between the blocks and the head; empty if there is none."""
    ran: list[str] = []
    after = False

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            nonlocal after
            if name == last_block:
                after = True
            elif after and isinstance(output, Tensor) and output.shape[-1] == d_model:
                ran.append(name)

        return hook

    outside = [
        name
        for name, module in hf_model.named_modules()
        if name == last_block
        or (name != head and not any(True for _ in module.children()) and not re.search(r"\.\d+\.", f".{name}."))
    ]
    with hooks() as handles, torch.no_grad():
        for name in outside:
            handles.append(module_at(hf_model, name).register_forward_hook(watch(name)))
        probe_logits(hf_model)
    norms = [name for name in ran if is_norm(module_at(hf_model, name))]
    return norms[-1] if norms else ""
