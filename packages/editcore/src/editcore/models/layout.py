"""Where a model keeps its MLP output projections, found by running it and not by its name.

Shapes: ``seq`` tokens of one probe text, ``d_model`` the residual stream, ``d_ff`` the projection's input.

How a projection is found. The first block runs once on a few random tokens with the output of each of its linear
modules cut off from what produced it. The gradient of a linear module's input then names the linear modules it depends
on *directly*, and at which tokens:

* an attention's output projection depends on queries, keys and values at other tokens;
* queries, keys, values, gates and up-projections feed another linear module of the block;
* the MLP output projection depends on up-projections at its own token only, feeds none, and is ``d_model`` wide.

This holds for sequential and parallel blocks, gated and plain MLPs, fused and separate projections.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import ModelError

__all__ = [
    "CHECKS",
    "ModelLayout",
    "attention_output",
    "check_layout",
    "detect_layout",
    "override_names",
    "replace_first",
]

logger = logging.getLogger(__name__)

CHECKS = (
    "weight times input is output, in every block",
    "the projection reads one token and nothing reads it",
    "the parts of every block add up to its output",
    "final norm and head give the logits, or their ranking",
)
"""What :func:`check_layout` makes sure of."""

_PROBE_TOKENS = 6
_PROBE_SEED = 20240501


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """The modules of a decoder that editing needs. Paths are those of ``model.hf.named_modules()``."""

    blocks: str
    """Path of a decoder block, with ``{}`` for its number: ``"model.layers.{}"``."""
    mlp: str
    """Path of the module that holds the projection; the projection itself where the block holds it (OPT)."""
    projection: str
    """Path of the MLP output projection, ``d_ff`` to ``d_model``; its weight is what an edit changes."""
    final_norm: str
    """Path of the norm before the head; empty where there is none."""
    head: str
    """Path of the output embedding."""
    num_layers: int
    """Decoder blocks."""
    d_model: int
    """Width of the residual stream."""
    d_ff: int
    """Width of the MLP's hidden layer."""
    vocab_size: int
    """Rows of the output embedding, which may be more than the tokenizer's."""
    orientation: Literal["out_in", "in_out"]
    """How the projection stores its weight: ``nn.Linear`` (out, in), ``Conv1D`` (in, out). From the module's class."""
    has_bias: bool
    """Whether the projection adds a bias."""
    norm_placement: Literal["pre", "post"]
    """``"post"`` if a norm stands between the projection and the residual stream (Gemma 2 and 3, OLMo 2)."""
    tied_head: bool
    """True if the head's weight is the input embedding's: editing one would edit the other."""
    post_norm: str = ""
    """Path of that norm, with ``{}``; empty for ``"pre"``."""
    residual_scale: float = 1.0
    """What the block multiplies the MLP's output by before adding it (Granite's ``residual_multiplier``)."""

    def weight_name(self, layer: int) -> str:
        """The key of the projection's weight in the state dict: ``"model.layers.3.mlp.down_proj.weight"``."""
        return self.projection.format(layer) + ".weight"

    def layer_of(self, weight_name: str) -> int:
        """The block of a projection weight; the inverse of :meth:`weight_name`."""
        before, _, after = (self.projection + ".weight").partition("{}")
        match = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), weight_name)
        if match is None or int(match[1]) >= self.num_layers:
            raise ModelError(
                f"'{weight_name}' is not an MLP output projection of this model. "
                f"They are named {self.weight_name(0)} to {self.weight_name(self.num_layers - 1)}."
            )
        return int(match[1])


def override_names() -> tuple[str, ...]:
    """The fields that a model family may set: ``blocks``, ``mlp``, ``projection``, ``final_norm``, ``head``."""
    return ("blocks", "mlp", "projection", "final_norm", "head")


def detect_layout(hf_model: Any, *, overrides: Mapping[str, str] | None = None) -> ModelLayout:
    """The layout of a causal language model, from its modules and one short forward pass.

    Args:
        overrides: paths by field name that are taken as given, from a model family's announcement.

    Raises:
        ModelError: no such structure is there, or the model routes tokens to experts.
    """
    given = dict(overrides or {})
    if unknown := sorted(set(given) - set(override_names())):
        raise ModelError(
            f"A model family may set {', '.join(override_names())}; found '{unknown[0]}' "
            f"(model type {_model_type(hf_model)})."
        )
    _refuse_experts(hf_model)
    head_path, head = _head(hf_model, given.get("head"))
    blocks, num_layers = _blocks(hf_model, given.get("blocks"))
    projection, d_model = _projection(hf_model, blocks, given.get("projection"))
    module: Any = _module(hf_model, projection.format(0))
    mlp = given.get("mlp") or _parent_or_self(projection, blocks)
    orientation = _orientation(module, projection)
    d_out, d_in = module.weight.shape if orientation == "out_in" else reversed(module.weight.shape)
    if d_out != d_model:
        raise ModelError(f"'{projection}' writes {d_out} numbers, but the residual stream has {d_model}.")
    _same_in_all_blocks(hf_model, projection, num_layers, module)
    (call,) = _block_calls(hf_model, blocks, [0])
    probe = _probe_block(_module(hf_model, blocks.format(0)), call, projection.removeprefix(f"{blocks}."))
    embedding = hf_model.get_input_embeddings()
    return ModelLayout(
        blocks=blocks,
        mlp=mlp,
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
        tied_head=embedding is not None and embedding.weight.data_ptr() == head.weight.data_ptr(),
        post_norm=f"{blocks}.{probe.norm}" if probe.norm else "",
        residual_scale=probe.scale,
    )


def check_layout(hf_model: Any, layout: ModelLayout) -> None:
    """Run the model on a few random tokens and hold the layout against what it does, in every block.

    Four things have to be so, up to rounding:

    1. the projection's weight, read in the declared orientation, and its bias turn its observed input into its observed
       output;
    2. its input at a token is made from up-projections at that token alone, and no linear module of the block reads
       what it writes (an attention's output projection fails this, in parallel blocks too);
    3. the sum of the block's parts is its output: ``block(x) = rest(x) + scale · p``, where ``p`` is the projection's
       output and ``rest`` the block run with ``p`` replaced by zero. With a norm behind the projection, ``norm(p)``
       and ``norm(0)`` stand in for ``p`` and zero; where the norm follows the addition, the sum is the norm's input;
    4. final norm and head turn the last block's output into the logits, or into the same ranking where the model
       scales or soft-caps them.

    Raises:
        ModelError: one of them is not so.
    """
    for layer in range(layout.num_layers):
        name = layout.projection.format(layer)
        module = _module(hf_model, name)
        if _orientation(module, name) != layout.orientation:
            raise ModelError(
                f"'{name}' is a {type(module).__name__}, which stores its weight {_orientation(module, name)}; "
                f"the layout says {layout.orientation}."
            )
    run = _observe(hf_model, layout)
    calls = _block_calls(hf_model, layout.blocks, range(layout.num_layers))
    for layer, call in enumerate(calls):
        block = _module(hf_model, layout.blocks.format(layer))
        _check_arithmetic(_module(hf_model, layout.projection.format(layer)), layout, layer, run)
        _check_token_wise(block, call, layout, layer)
        _check_sum(block, call, layout, layer)
    _check_head(hf_model, layout, run)


# Structure


def _model_type(hf_model: Any) -> str:
    return str(getattr(hf_model.config, "model_type", type(hf_model).__name__))


def _module(hf_model: Any, path: str) -> nn.Module:
    try:
        module: nn.Module = hf_model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{type(hf_model).__name__} has no module '{path}'.") from None
    return module


def _refuse_experts(hf_model: Any) -> None:
    """Routed experts show as one three-dimensional parameter, or as a list of equal MLPs inside a block."""
    for name, module in hf_model.named_modules():
        inside_block = re.search(r"\.\d+\.", name) is not None
        stacked = not isinstance(module, nn.modules.conv._ConvNd) and any(
            parameter.ndim >= 3 and parameter.shape[0] > 1 for parameter in module.parameters(recurse=False)
        )
        listed = isinstance(module, nn.ModuleList) and len(module) > 1 and any(True for _ in module[0].children())
        if inside_block and (stacked or listed):
            raise ModelError(
                f"{type(hf_model).__name__} ({_model_type(hf_model)}) routes tokens to experts ('{name}'), and "
                "mixture-of-experts models are not supported yet. Choose a dense model."
            )


def _head(hf_model: Any, given: str | None) -> tuple[str, Any]:
    head = _module(hf_model, given) if given else hf_model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(
            f"{type(hf_model).__name__} has no output embedding; editcore edits causal language models "
            "(a class that ends in ForCausalLM)."
        )
    path = given or next((name for name, module in hf_model.named_modules() if module is head), "")
    return path, head


def _blocks(hf_model: Any, given: str | None) -> tuple[str, int]:
    """The longest list of equal modules, not inside another list, that a text-only forward pass runs."""
    if given:
        prefix, _, rest = given.partition(".{}")
        modules = _module(hf_model, prefix)
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
        with _hooks() as handles:
            for name, module in lists:
                handles.append(module[0].register_forward_hook(lambda *_, name=name: ran.add(name)))
            with torch.no_grad():
                _forward(hf_model)
        lists = [(name, module) for name, module in lists if name in ran]
    if not lists:
        raise ModelError(
            f"{type(hf_model).__name__} has no list of equal decoder blocks, so its layers cannot be found. "
            "A plugin can name them with a ModelFamilySpec."
        )
    name, module = max(lists, key=lambda item: len(item[1]))
    return f"{name}.{{}}", len(module)


def _orientation(module: Any, name: str) -> Literal["out_in", "in_out"]:
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


def _parent_or_self(projection: str, blocks: str) -> str:
    parent = projection.rpartition(".")[0]
    return projection if parent == blocks else parent


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


# Probing


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):  # noqa: N818  a signal, not an error
    """Ends a forward pass as soon as the block of interest has run."""


def _first(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, Tensor):
        raise ModelError(f"A module of the model answers a {type(tensor).__name__}; a tensor was expected.")
    return tensor


def replace_first(output: Any, tensor: Tensor) -> Any:
    """A module's output with other hidden states, which it gives alone or first in a tuple."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def _rows(tensor: Tensor) -> Tensor:
    """``[tokens, width]``: the probe has one text, and some modules see its tokens without the batch axis."""
    return tensor.reshape(-1, tensor.shape[-1])


def _random(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    return torch.randn(*shape, generator=generator).to(like)


def _forward(hf_model: Any) -> Tensor:
    embedding = hf_model.get_input_embeddings()
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    ids = torch.randint(embedding.weight.shape[0], (1, _PROBE_TOKENS), generator=generator)
    logits: Tensor = hf_model(input_ids=ids.to(embedding.weight.device), use_cache=False).logits
    return logits


_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block."""


@torch.no_grad()
def _block_calls(hf_model: Any, blocks: str, layers: Sequence[int]) -> list[_Call]:
    """The arguments that each block of ``layers`` gets in one forward pass on the probe text."""
    caught: dict[int, _Call] = {}

    def catch(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught[layer] = (args, kwargs)
            if layer == layers[-1]:
                raise _Stop

        return hook

    with _hooks() as handles:
        for layer in layers:
            block = _module(hf_model, blocks.format(layer))
            handles.append(block.register_forward_pre_hook(catch(layer), with_kwargs=True))
        with contextlib.suppress(_Stop):
            _forward(hf_model)
    if missing := [layer for layer in layers if layer not in caught]:
        raise ModelError(f"'{blocks.format(missing[0])}' does not run when {type(hf_model).__name__} reads text.")
    return [caught[layer] for layer in layers]


def _linears(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


@dataclass(frozen=True, slots=True)
class _Reading:
    """One linear module of a block, as it ran."""

    width: int
    """Numbers it writes per token."""
    own: frozenset[str]
    """Linear modules of the block whose output at a token its input at that token depends on directly."""
    other: frozenset[str]
    """Linear modules whose output at another token its input depends on directly."""


def _readings(block: nn.Module, call: _Call, *, since: str = "") -> tuple[dict[str, _Reading], int]:
    """What each linear module of a block reads, in the order they ran, and the width of the block's output.

    Args:
        since: leave out the modules that ran before this one, which cannot read what it writes.
    """
    args, kwargs = call
    inputs: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def cut(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            inputs[name] = args[0]
            # The graph starts at a leaf; the clone behind it may be changed in place (Falcon adds attention to it).
            leaves[name] = _first(output).detach().requires_grad_(True)
            return replace_first(output, leaves[name].clone())

        return hook

    with _hooks() as handles, torch.enable_grad():
        for name, module in _linears(block).items():
            handles.append(module.register_forward_hook(cut(name)))
        width = _first(block(*args, **kwargs)).shape[-1]
    order = list(leaves)
    wanted = order[order.index(since) :] if since in leaves else order
    return {name: _reading(name, inputs, leaves) for name in wanted}, width


def _reading(name: str, inputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> _Reading:
    width = leaves[name].shape[-1]
    if not inputs[name].requires_grad:
        return _Reading(width, frozenset(), frozenset())
    rows = _rows(inputs[name])
    last = rows[-1].float()
    gradients = torch.autograd.grad(
        (last * _random(last.numel(), like=last)).sum(), list(leaves.values()), retain_graph=True, allow_unused=True
    )
    own, other = set(), set()
    for source, gradient in zip(leaves, gradients, strict=True):
        if gradient is None or source == name:
            continue
        touched = _rows(gradient).abs().amax(dim=-1) > 0  # [tokens]
        if bool(touched[-1]):
            own.add(source)
        if bool(touched[:-1].any()):
            other.add(source)
    return _Reading(width, frozenset(own), frozenset(other))


def _is_projection(name: str, readings: Mapping[str, _Reading], d_model: int) -> bool:
    reading = readings[name]
    feeds = any(name in (other.own | other.other) for other in readings.values())
    return reading.width == d_model and bool(reading.own) and not reading.other and not feeds


def _projection(hf_model: Any, blocks: str, given: str | None) -> tuple[str, int]:
    (call,) = _block_calls(hf_model, blocks, [0])
    readings, d_model = _readings(_module(hf_model, blocks.format(0)), call)
    if given:
        return given, d_model
    found = [name for name in readings if _is_projection(name, readings, d_model)]
    if len(found) != 1:
        what = f"{len(found)} candidates ({', '.join(found)})" if found else "none"
        raise ModelError(
            f"Found {what} for the MLP output projection in '{blocks.format(0)}' of {type(hf_model).__name__}, among "
            f"the linear modules {', '.join(readings) or 'none'}. A plugin can name it with a ModelFamilySpec."
        )
    return f"{blocks}.{found[0]}", d_model


def attention_output(hf_model: Any, layout: ModelLayout) -> str | None:
    """Path of the attention's output projection, with ``{}``; ``None`` where that cannot be told.

    It is the one linear module of a block that writes ``d_model`` numbers from what others write at other tokens.
    """
    block = _module(hf_model, layout.blocks.format(0))
    (call,) = _block_calls(hf_model, layout.blocks, [0])
    readings, d_model = _readings(block, call)
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
    """The last module with parameters of its own that runs between the blocks and the head and keeps the width."""
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
    with _hooks() as handles, torch.no_grad():
        for name in outside:
            handles.append(_module(hf_model, name).register_forward_hook(watch(name)))
        _forward(hf_model)
    norms = [name for name in ran if _is_norm(_module(hf_model, name))]
    return norms[-1] if norms else ""


def _is_norm(module: nn.Module) -> bool:
    """By class name: libraries agree on nothing else; what it does is checked by running it."""
    return re.search(r"norm", type(module).__name__, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True)
class _Parts:
    """A block run as it is and with the projection's output replaced by zero."""

    norm: str
    """The norm behind the projection, relative to the block; empty if there is none."""
    scale: float
    """Least-squares factor of the projection's part in the sum."""
    error: float
    """Largest deviation of the sum of the parts from the whole, relative to the largest number among them."""
    dtype: torch.dtype


def _probe_block(block: nn.Module, call: _Call, projection: str) -> _Parts:
    """``projection`` is relative to the block."""
    whole = _run_parts(block, projection, call, zero=False)
    rest = _run_parts(block, projection, call, zero=True)
    if whole.projection is None:
        raise ModelError(f"'{projection}' does not run when its {type(block).__name__} does.")
    norm, after_addition = _norm_behind(whole)
    if not norm:
        part, total, without = whole.projection, whole.output, rest.output
    elif after_addition:
        part, total, without = whole.projection, whole.norms[norm][0], rest.norms[norm][0]
    else:
        part, total, without = whole.norms[norm][1] - rest.norms[norm][1], whole.output, rest.output
    dtype = part.dtype
    tolerance = _tolerance(dtype)
    part, total, without = (_rows(tensor).double() for tensor in (part, total, without))
    difference = total - without
    scale = float((difference * part).sum() / part.square().sum().clamp_min(1e-300))
    scale = 1.0 if abs(scale - 1.0) < 4 * tolerance else float(f"{scale:.6g}")
    deviation = (difference - scale * part).abs().max()
    size = torch.stack([total.abs().max(), without.abs().max(), (scale * part).abs().max()]).max()
    return _Parts(norm, scale, float(deviation / size.clamp_min(1e-300)), dtype)


@dataclass(slots=True)
class _Seen:
    output: Tensor
    projection: Tensor | None
    norms: dict[str, tuple[Tensor, Tensor]]
    """By name: input and output of each norm that ran after the projection, in order."""


def _run_parts(block: nn.Module, projection: str, call: _Call, *, zero: bool) -> _Seen:
    args, kwargs = call
    seen = _Seen(torch.empty(0), None, {})

    def on_projection(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        seen.projection = _first(output).clone()
        seen.norms.clear()
        return replace_first(output, torch.zeros_like(_first(output))) if zero else None

    def on_norm(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if seen.projection is not None and args and isinstance(args[0], Tensor):
                seen.norms[name] = (args[0].clone(), _first(output).clone())

        return hook

    with _hooks() as handles, torch.no_grad():
        handles.append(block.get_submodule(projection).register_forward_hook(on_projection))
        for name, module in block.named_modules():
            if name and _is_norm(module):
                handles.append(module.register_forward_hook(on_norm(name)))
        seen.output = _first(block(*args, **kwargs)).clone()
    return seen


def _norm_behind(whole: _Seen) -> tuple[str, bool]:
    """The norm that reads the projection's output, or that makes the block's output; True for the second."""
    assert whole.projection is not None
    for name, (before, after) in whole.norms.items():
        if before.numel() == whole.projection.numel() and torch.equal(_rows(before), _rows(whole.projection)):
            return name, False
        if after.numel() == whole.output.numel() and torch.equal(_rows(after), _rows(whole.output)):
            return name, True
    return "", False


# Checks


def _tolerance(dtype: torch.dtype) -> float:
    """Some hundred roundings of the model's own arithmetic; a wrong layout is off by the size of the thing itself."""
    return max(256 * torch.finfo(dtype).eps, 1e-9) if dtype in (torch.float32, torch.float64) else 0.04


@dataclass(slots=True)
class _Observed:
    inputs: dict[int, Tensor]
    outputs: dict[int, Tensor]
    last_block: Tensor
    logits: Tensor


def _observe(hf_model: Any, layout: ModelLayout) -> _Observed:
    run = _Observed({}, {}, torch.empty(0), torch.empty(0))

    def on_projection(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            run.inputs[layer], run.outputs[layer] = args[0].clone(), _first(output).clone()

        return hook

    def on_last(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        run.last_block = _first(output).clone()

    with _hooks() as handles, torch.no_grad():
        for layer in range(layout.num_layers):
            module = _module(hf_model, layout.projection.format(layer))
            handles.append(module.register_forward_hook(on_projection(layer)))
        last = _module(hf_model, layout.blocks.format(layout.num_layers - 1))
        handles.append(last.register_forward_hook(on_last))
        run.logits = _forward(hf_model)
    return run


def _close(actual: Tensor, expected: Tensor) -> bool:
    error = (actual.double() - expected.double()).abs().max()
    return bool(error <= _tolerance(expected.dtype) * expected.double().abs().max())


@torch.no_grad()
def _check_arithmetic(module: Any, layout: ModelLayout, layer: int, run: _Observed) -> None:
    name = layout.projection.format(layer)
    if layer not in run.inputs:
        raise ModelError(f"'{name}' does not run when the model reads text.")
    weight = module.weight if layout.orientation == "out_in" else module.weight.T  # [d_model, d_ff]
    if tuple(weight.shape) != (layout.d_model, layout.d_ff):
        raise ModelError(
            f"'{name}' is {tuple(weight.shape)} as (out, in); the layout says ({layout.d_model}, {layout.d_ff})."
        )
    bias = getattr(module, "bias", None)
    if (bias is not None) != layout.has_bias:
        raise ModelError(f"'{name}' has {'a' if bias is not None else 'no'} bias; the layout says otherwise.")
    product = _rows(run.inputs[layer]).double() @ weight.double().T
    if bias is not None:
        product = product + bias.double()
    if not _close(product, _rows(run.outputs[layer])):
        raise ModelError(
            f"'{name}' does not do what its weight says: weight ({layout.orientation}) times input is not its output. "
            "Quantised or wrapped modules cannot be edited."
        )


def _check_token_wise(block: nn.Module, call: _Call, layout: ModelLayout, layer: int) -> None:
    name = layout.projection.removeprefix(f"{layout.blocks}.")
    readings, d_model = _readings(block, call, since=name)
    if name not in readings or not _is_projection(name, readings, d_model):
        raise ModelError(
            f"'{layout.projection.format(layer)}' is not an MLP output projection: its input must come from an "
            "up-projection at the same token, and no linear module of the block may read its output."
        )


def _check_sum(block: nn.Module, call: _Call, layout: ModelLayout, layer: int) -> None:
    name, path = layout.projection.format(layer), layout.blocks.format(layer)
    parts = _probe_block(block, call, layout.projection.removeprefix(f"{layout.blocks}."))
    placement = "post" if parts.norm else "pre"
    post_norm = f"{layout.blocks}.{parts.norm}" if parts.norm else ""
    if placement != layout.norm_placement or post_norm != layout.post_norm:
        found = f"a norm ('{parts.norm}')" if parts.norm else "no norm"
        raise ModelError(
            f"'{path}' has {found} between the MLP output projection and the residual stream; the layout says "
            f"'{layout.norm_placement}'{f' ({layout.post_norm})' if layout.post_norm else ''}."
        )
    tolerance = _tolerance(parts.dtype)
    scale_error = abs(parts.scale - layout.residual_scale) / max(abs(layout.residual_scale), 1e-6)
    if parts.error > tolerance or scale_error > 4 * tolerance:
        raise ModelError(
            f"The parts of '{path}' do not add up to its output (off by {parts.error:.1e} of its size, scale "
            f"{parts.scale:.4g}, expected {layout.residual_scale:.4g}): '{name}' does not write to the residual stream "
            "as an MLP output projection does."
        )


@torch.no_grad()
def _check_head(hf_model: Any, layout: ModelLayout, run: _Observed) -> None:
    hidden = run.last_block
    if layout.final_norm:
        hidden = _first(_module(hf_model, layout.final_norm)(hidden))
    head: Any = _module(hf_model, layout.head)
    where = f"final norm '{layout.final_norm or 'none'}' and head '{layout.head}'"
    if hidden.shape[-1] != head.weight.shape[-1]:
        logger.info("%s are joined by a projection; the model's own forward is used", where)
        return
    raw = head(hidden)
    if raw.shape == run.logits.shape and _close(raw, run.logits):
        return
    ranked = run.logits.gather(-1, raw.argsort(dim=-1)).double()  # ascending if only a scale or a soft-cap is between
    steps_down = (ranked[..., :-1] - ranked[..., 1:]).clamp_min(0).max()
    if steps_down > _tolerance(run.logits.dtype) * ranked.abs().max():
        raise ModelError(f"The {where} do not reproduce the logits of {type(hf_model).__name__}, nor their ranking.")
    logger.info("The logits are a scaled or soft-capped form of what %s give; the model's own forward is used", where)
