"""What a locate-then-edit method learns from the unedited model: layers to edit, their second moments, contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError
from editcore.interfaces.protocols import EditContext
from editcore.locate_then_edit.located import traced_layer
from editcore.locate_then_edit.templates import sample_context_templates
from editcore.models.capture import capture
from editcore.models.tokens import TokenRow
from editcore.second_moments.linalg import Metric

if TYPE_CHECKING:
    from editcore.locate_then_edit.hparams import LocateThenEditHParams
    from editcore.models import LanguageModel

__all__ = ["Prepared", "first_token_metric", "prepare"]

CONTEXTS = "context_templates"
"""Name of the context templates in what a run records."""


@documented
@dataclass(frozen=True, slots=True)
class Prepared:
    """What was learnt from the unedited model.

    ``metrics`` and ``cache_prefixes`` are caches: they grow, because a layer is entered when a batch first needs it.
    """

    templates: tuple[str, ...]
    """Contexts of the keys; ``{}`` stands for the prompt."""
    metrics: dict[int, Metric]
    """By layer, the second moment C of the unedited model's keys. Layers of ``first_token`` are added when a fact needs
    them."""
    layers: tuple[int, ...]
    """Layers that may be edited; ``layer_selection`` says how many of them a batch uses."""
    first_token: tuple[int, ...] = ()
    """Layers for facts whose lookup token is the first of all tokens; empty if such facts are treated like all
    others."""
    inverse_metrics: Mapping[int, Tensor] = field(default_factory=dict)
    """By layer, (F + d·I)⁻¹ of ``v_text_damping``, ``[d_out, d_out]``; empty without it."""
    cache_prefixes: dict[int, bool] = field(default_factory=dict)
    """By layer, whether the value optimisation may cache prefixes, which is tested with the first batch."""

    def provenance(self) -> dict[str, Any]:
        """What a run records of it, JSON-able."""
        return {CONTEXTS: list(self.templates), "layers": list(self.layers)}


def prepare(model: LanguageModel, hparams: LocateThenEditHParams, context: EditContext, *, owner: str) -> Prepared:
    """Check the layers, fetch the second moments, and fix the context templates.

    Raises:
        HParamsError: a layer does not exist, the settings do not fit the model, or they ask for a tracing of the model
            and there is none.
    """
    first_token = hparams.first_token_layers or ()
    for layer in (*hparams.layers, *first_token):
        model.check_layer(layer, setting=owner)
    spread = len(hparams.layers) > 1 and hparams.layer_selection == "all" and hparams.layer_rule == "spread"
    if spread and model.layout.norm_placement == "post":
        raise HParamsError(
            f"{owner}: layers is {list(hparams.layers)}, but in {model.name} a norm follows the edited projection, so "
            "a residual cannot be spread over several layers. Give one layer, such as --set layers=[1], or a value to "
            "each of two with --set layer_rule=blue."
        )
    if hparams.clamp_norm == "stream" and model.layout.norm_placement == "post":
        raise HParamsError(
            f'{owner}: clamp_norm is "stream", but in {model.name} a norm follows the edited projection, so a value is '
            'not added to the stream as it is. Set clamp_norm to "output".'
        )
    if hparams.v_context_factor and hparams.layers[-1] == model.layout.num_layers - 1:
        raise HParamsError(
            f"{owner}: v_context_factor compares the outputs of blocks above the edited one, but layers ends with "
            f"{hparams.layers[-1]}, the last block of {model.name}. Set v_context_factor to 0, or edit a lower block."
        )
    layers = hparams.layers
    if hparams.layer_selection == "traced":
        layers = (traced_layer(model, layers, owner=owner),)
    if hparams.layer_rule == "blue":
        layers = (layers[0], layers[-1])
    templates = hparams.context_templates
    if templates is None and CONTEXTS in context.learnt:
        templates = tuple(context.learnt[CONTEXTS])
    elif templates is None:
        templates = sample_context_templates(
            model, seed=context.seed, count=hparams.context_count, length=hparams.context_length
        )
    if first_token and min(layers) <= max(first_token):
        first_token = ()
    metrics = _metrics(model, layers, hparams, context)
    return Prepared(templates, metrics, layers, first_token, _inverse_metrics(model, layers, hparams, context))


def _metrics(
    model: LanguageModel, layers: Sequence[int], hparams: LocateThenEditHParams, context: EditContext
) -> dict[int, Metric]:
    if hparams.mom2_adjustment:
        return context.statistics.metrics(layers)
    # C = I needs no text.
    return {layer: Metric.identity(model.layout.d_ff, device=model.place(layer)) for layer in layers}


def _inverse_metrics(
    model: LanguageModel, layers: Sequence[int], hparams: LocateThenEditHParams, context: EditContext
) -> dict[int, Tensor]:
    """(F + d·I)⁻¹ of each layer at which a value may be optimised; see ``v_text_damping``."""
    if hparams.v_text_damping is None:
        return {}
    found = {}
    for layer in sorted(set(hparams.value_layers).intersection(layers)):
        moment = context.statistics.gradient_moment(layer)
        damped = moment + hparams.v_text_damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        found[layer] = torch.linalg.inv(damped)
    return found


def first_token_metric(
    model: LanguageModel, layer: int, hparams: LocateThenEditHParams, context: EditContext
) -> Metric:
    """The price of a change at a layer where facts are looked up at the first token: half on text, half on first
    tokens.

    About one token in a thousand is the first of its text, and the keys of all first tokens have a common part that no
    other key has. By C alone a change along that part costs almost nothing, and it would affect every text.
    """
    text = _metrics(model, [layer], hparams, context)[layer]
    if not hparams.mom2_adjustment:
        return text
    special = set(model.tokenizer.all_special_ids)
    ids = [token for token in range(min(len(model.tokenizer), model.layout.vocab_size)) if token not in special]
    opening = [TokenRow((token,), 0, 1) for token in ids[:: 1 + (len(ids) - 1) // _FIRST_TOKENS]]

    def moment(text: Metric) -> dict[str, Tensor]:
        total = torch.zeros_like(text.matrix)
        for start in range(0, len(opening), _TOKENS_PER_CHUNK):
            keys = capture(model, opening[start : start + _TOKENS_PER_CHUNK], [layer])[layer].inputs.double()
            total += keys.T @ keys
        return {"moment": total / len(opening)}

    # Stored with C, so that a resumed run uses the same bits, which are of the unedited model.
    [first] = context.statistics.derived(layer, f"first-token-moment-{_FIRST_TOKENS}", moment).values()
    return Metric((text.matrix + first) / 2)


_TOKENS_PER_CHUNK = 2048
"""The keys of this many first tokens are computed at a time, to bound memory."""
_FIRST_TOKENS = 8192
"""Tokens of the vocabulary, spread evenly over it, whose keys as a text's first token are computed."""
