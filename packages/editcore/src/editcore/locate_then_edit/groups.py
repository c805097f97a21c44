"""The facts of a batch by the layers at which they are written."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editcore.interfaces.values import EditBatch
from editcore.locate_then_edit.activations import KeyWeighting
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.key_memory import FactKey
from editcore.locate_then_edit.preparation import Prepared
from editcore.locate_then_edit.windows import Windows
from editcore.models.tokens import lookup_row

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["Group", "groups_of"]


@dataclass(frozen=True, slots=True)
class Group:
    """Facts of a batch that are written at the same layers."""

    batch: EditBatch
    layers: tuple[int, ...]
    key_weighting: KeyWeighting
    facts: Sequence[FactKey]
    """All facts of the batch, as ``EditRequest.fact_key``."""
    windows: Windows
    """The requests that stand for a window of a long target."""


def groups_of(
    model: LanguageModel,
    batch: EditBatch,
    windows: Windows,
    hparams: LocateThenEditHParams,
    prepared: Prepared,
    key_weighting: KeyWeighting,
    *,
    seed: int,
) -> Iterator[Group]:
    """The groups of a batch, lower layers first.

    A fact whose lookup token is the first of all tokens is written twice: its bare prompt at the first-token
    layers, and its prompt behind a context at the usual layers.
    """
    ids = {request.id for request in batch.requests}
    facts = list(dict.fromkeys(request.fact_key for request in batch.requests))
    first = {
        request.id
        for request in batch.requests
        if prepared.first_token
        and request.id not in windows
        and lookup_row(model, request, fact_token=hparams.fact_token).lookup == 0
    }
    if first:
        yield Group(batch.without(ids - first), prepared.first_token, "prompt", facts, Windows())
    usual = batch
    if len(prepared.templates) == 1:
        usual = batch.without(first)
    elif first:
        behind = prepared.templates[1]
        requests = [
            request.model_copy(update={"prompt": behind.replace("{}", request.prompt)})
            if request.id in first
            else request
            for request in batch.requests
        ]
        usual = replace(batch, requests=tuple(requests))
    if usual.requests:
        layers = _chosen_layers(hparams.layer_selection, prepared.layers, batch, seed)
        # BLUE: every layer has a value of its own, found with the layers below already changed.
        for own in [(layer,) for layer in layers] if hparams.layer_rule == "blue" else [layers]:
            yield Group(usual, own, key_weighting, facts, windows)


def _chosen_layers(selection: str, layers: tuple[int, ...], batch: EditBatch, seed: int) -> tuple[int, ...]:
    if selection != "random":
        return layers
    # A string seed, because it is hashed with sha512: nearby batches draw independently.
    return (random.Random(f"layer:{seed}:{batch.index}").choice(layers),)
