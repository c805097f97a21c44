"""What a locate-then-edit method learns from the unedited model: its layers, their second moments, the contexts."""

from __future__ import annotations

from collections.abc import Sequence
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


@documented
@dataclass(frozen=True, slots=True)
class Prepared:
    """What was learnt from the unedited model."""

    templates: tuple[str, ...]
    """Contexts of the keys; ``{}`` stands for the prompt."""
    metrics: dict[int, Metric]
    """By layer, the second moment C of the unedited model's keys; of ``first_token`` once a fact needs it."""
    layers: tuple[int, ...]
    """Those that may be edited; ``layer_selection`` says how many of them a batch takes."""
    first_token: tuple[int, ...] = ()
    """Those for facts that are looked up at the first of all tokens; empty where they are treated like all others."""
    cache_prefixes: dict[int, bool] = field(default_factory=dict)
    """By layer, whether the value optimisation may compute only what δ can change; found out with the first batch."""

    def provenance(self) -> dict[str, Any]:
        """What a run records of it, JSON-able."""
        return {"context_templates": list(self.templates), "layers": list(self.layers)}


def prepare(model: LanguageModel, hparams: LocateThenEditHParams, context: EditContext, *, owner: str) -> Prepared:
    """Check the layers, fetch the second moments, and fix the context templates.

    Raises:
        HParamsError: a layer does not exist, the settings do not fit the model, or a tracing of it is asked for and is
            not there.
    """
    first_token = hparams.first_token_layers or ()
    for layer in (*hparams.layers, *first_token):
        model.check_layer(layer, setting=owner)
    last = model.layout.num_layers - 1
    if hparams.v_loss_layer is not None and hparams.v_loss_layer != last:
        raise HParamsError(
            f"{owner}: v_loss_layer is {hparams.v_loss_layer}, but the loss is read from the model's own logits, "
            f"which {model.name} makes from its last block, {last}. Leave v_loss_layer out."
        )
    if len(hparams.layers) > 1 and hparams.layer_selection == "all" and model.layout.norm_placement == "post":
        raise HParamsError(
            f"{owner}: layers is {list(hparams.layers)}, but in {model.name} a norm follows the edited projection, so "
            "a residual cannot be spread over several layers. Give one layer, such as --set layers=[1]."
        )
    if hparams.clamp_norm == "stream" and model.layout.norm_placement == "post":
        raise HParamsError(
            f'{owner}: clamp_norm is "stream", but in {model.name} a norm follows the edited projection, so a value is '
            'not added to the stream as it is. Set clamp_norm to "output".'
        )
    layers = hparams.layers
    if hparams.layer_selection == "traced":
        layers = (traced_layer(model, layers, owner=owner),)
    templates = hparams.context_templates
    if templates is None:
        templates = sample_context_templates(
            model, seed=context.seed, count=hparams.context_count, length=hparams.context_length
        )
    if first_token and min(layers) <= max(first_token):
        first_token = ()
    return Prepared(templates, _metrics(model, layers, hparams, context), layers, first_token)


def _metrics(
    model: LanguageModel, layers: Sequence[int], hparams: LocateThenEditHParams, context: EditContext
) -> dict[int, Metric]:
    if hparams.mom2_adjustment:
        return context.statistics.metrics(layers)
    # C = I, where the text is not to be asked.
    return {layer: Metric.identity(model.layout.d_ff, device=model.place(layer)) for layer in layers}


def first_token_metric(
    model: LanguageModel, layer: int, hparams: LocateThenEditHParams, context: EditContext
) -> Metric:
    """What a change costs where facts are looked up at the first token: half on text, half on texts' first tokens.

    In a text one token in a thousand is the first, and all of those have a part in common that no other has. By C alone
    that part is nearly free, and an edit that uses it hits every text.
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

    # Kept beside C: a run that is resumed has the bits of the unedited model.
    [first] = context.statistics.derived(layer, f"first-token-moment-{_FIRST_TOKENS}", moment).values()
    return Metric((text.matrix + first) / 2)


_TOKENS_PER_CHUNK = 2048
"""First tokens whose keys are held at a time, to bound memory."""
_FIRST_TOKENS = 8192
"""Tokens of the vocabulary, evenly over it, that are asked for what they give as a text's first."""
