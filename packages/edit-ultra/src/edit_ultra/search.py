"""What ``editctl onboard`` tries for a new model: the step, then the blocks, then other modules of the MLP."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from editcore import LanguageModel

__all__ = ["mlp_inputs", "search", "spans"]

Settings = Mapping[str, Any]

_START = {"passes": 3, "warmup_facts": 64}
"""In every trial: the facts of a trial are fewer than UltraEdit's turn of 100, so the statistics need a start."""
_RATES = (1e-6, 1e-5, 1e-4, 1e-3)
"""UltraEdit's η, and the larger ones that smaller models need."""
_WIDTH, _ENDS = 0.3, (0.6, 0.75, 0.9)
"""Width and ends of the ranges of blocks, as shares of the depth. UltraEdit: at most 9 of 28, in the upper half."""


def search(model: LanguageModel, layers: Sequence[int]) -> Generator[list[Settings], Settings, None]:
    """The rounds of the search; see ``editcore.onboarding``.

    Args:
        layers: candidates for one layer. They are not used: they come from a tracing at the subject's last token, and
            this editor writes where targets are predicted.
    """
    ranges, output = spans(model.layout.num_layers), model.layout.projection.partition("{}.")[2]
    middle = ranges[len(ranges) // 2]
    found = yield [{**_START, "learning_rate": rate, "weights": ((output, middle),)} for rate in _RATES]
    found = yield [{**found, "weights": ((output, blocks),)} for blocks in ranges]
    [(_, blocks)] = found["weights"]
    if inputs := mlp_inputs(model, blocks[0]):
        yield [{**found, "weights": tuple((name, blocks) for name in inputs)}]


def spans(num_layers: int) -> list[tuple[int, ...]]:
    """Ranges of blocks, without repeats."""
    width = max(1, round(_WIDTH * num_layers))
    ends = [max(width, round(end * num_layers)) for end in _ENDS]
    return list(dict.fromkeys(tuple(range(end - width, end)) for end in ends))


def mlp_inputs(model: LanguageModel, layer: int) -> list[str]:
    """Paths inside a block of the linear modules beside the edited projection that read the stream, such as gate and
    up."""
    parent, _, output = model.layout.projection.partition("{}.")[2].rpartition(".")
    if not parent:
        return []
    found = []
    for name, module in model.block(layer).get_submodule(parent).named_children():
        weight = getattr(module, "weight", None)
        if name != output and weight is not None and weight.ndim == 2:
            found.append(f"{parent}.{name}")
    return found
