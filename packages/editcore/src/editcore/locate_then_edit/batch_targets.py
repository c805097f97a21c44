"""Targets of the facts of a batch: an optimised δ for new facts, stored values for known facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from editcore.interfaces.errors import NumericalError
from editcore.interfaces.protocols import EditContext
from editcore.interfaces.values import EditBatch, EditRequest, KnownTarget
from editcore.locate_then_edit.activations import LayerActivations
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.preparation import Prepared
from editcore.locate_then_edit.side_by_side import KnownOfLayer
from editcore.locate_then_edit.targets import Targets, joined_parts, optimise_targets, prefixes_can_be_cached
from editcore.locate_then_edit.token_rows import FactRows, fact_rows
from editcore.locate_then_edit.windows import Window, Windows, planted

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["BatchTargets", "ResidualKind"]

ResidualKind = Literal["shift", "value"]
"""What a new fact asks for: δ on top of the present output for its key, or the bare prompt's value h₀ + δ."""


@dataclass(slots=True)
class BatchTargets:
    """The targets of one batch."""

    optimised: Targets | None
    """Targets of the facts whose value was optimised; ``None`` if all facts are known."""
    row: Mapping[str, int]
    """Row in ``optimised`` by request id."""
    facts_of_value: Mapping[str, int]
    """By request id, how many facts its value was optimised for."""
    stream_before: Tensor | None = None
    """Output of the deepest edited block before the first layer of this batch was changed, ``[n, d_model]``."""
    anchored: bool = False
    """Whether the values were rescaled (``v_norm_anchor``)."""

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        values: Sequence[Sequence[EditRequest]],
        layer: int,
        hparams: LocateThenEditHParams,
        prepared: Prepared,
        context: EditContext,
        *,
        windows: Windows,
    ) -> BatchTargets:
        """Optimise values at ``layer``. Those of later windows come after those of the windows before them.

        Args:
            values: the requests of each value (:func:`requests_by_value`).
        """
        if not values:
            return cls(None, {}, {})
        rounds: dict[int, list[Sequence[EditRequest]]] = {}
        for requests in values:
            window = windows.get(requests[0].id)
            rounds.setdefault(window.number if window else 0, []).append(requests)
        parts: list[Targets] = []
        row: dict[str, int] = {}
        deltas: dict[str, Tensor] = {}
        for number in sorted(rounds):
            rows = [
                fact_rows(model, requests, prepared.templates, hparams, windows=windows) for requests in rounds[number]
            ]
            if number:
                rows = [
                    [
                        with_planted(fact, windows[request.id], windows, deltas)
                        for fact, request in zip(*value, strict=True)
                    ]
                    for value in zip(rows, rounds[number], strict=True)
                ]
            elif layer not in prepared.cache_prefixes:
                prepared.cache_prefixes[layer] = prefixes_can_be_cached(model, rows[0][0], layer=layer)
            part = optimise_targets(
                model,
                rows,
                layer=layer,
                hparams=hparams,
                known=KnownOfLayer(
                    cache_prefixes=prepared.cache_prefixes[layer],
                    inverse_metric=prepared.inverse_metrics.get(layer),
                ),
                progress=context.progress,
            )
            for place, request in enumerate(request for requests in rounds[number] for request in requests):
                row[request.id], deltas[request.id] = len(row), part.deltas[place]
            parts.append(part)
        return cls(
            joined_parts(parts),
            row,
            {request.id: len(requests) for requests in values for request in requests},
            anchored=hparams.v_norm_anchor and layer in dict(hparams.v_norms),
        )

    def moved(self, further: BatchTargets | None) -> BatchTargets:
        """These targets for another solve, in which the δ of a fact is the sum of its δ here and in ``further``.

        Args:
            further: targets of some of the facts, found on the model that the solve for these ones gave.
        """
        if self.optimised is None or further is None or further.optimised is None:
            return replace(self, stream_before=None)
        places = [self.row[name] for name in further.row]
        return replace(self, optimised=self.optimised.moved(places, further.optimised), stream_before=None)

    def residuals(
        self,
        model: LanguageModel,
        batch: EditBatch,
        *,
        name: str,
        activations: LayerActivations,
        share: float,
        kind: ResidualKind,
    ) -> Tensor:
        """Residuals at one layer: what it should add to each fact's output, ``[n, d_out]`` float64.

        A new fact asks for a share of the part of δ that the layers below have not reached. ``kind`` says to what this
        is added. A known fact asks for the value that it had at this layer when it was solved.

        Args:
            name: address of the layer's weight.
            share: 1 / (number of layers that are left).

        Raises:
            NumericalError: a stored value comes from other layers or another model.
        """
        if self.stream_before is None:
            self.stream_before = activations.stream
        reached = (activations.stream - self.stream_before.to(activations.stream)) / model.layout.residual_scale
        residuals = torch.empty_like(activations.outputs)
        for row, request in enumerate(batch.requests):
            if request.id in self.row:
                assert self.optimised is not None
                delta = self.optimised.deltas[self.row[request.id]].double().to(reached.device)
                residuals[row] = (delta - reached[row]) * share
                if kind == "value":
                    residuals[row] += activations.prompt_outputs[row] - activations.outputs[row]
            else:
                value = _stored_value(batch.known[request.id], name, request)
                if value.shape != activations.outputs[row].shape:
                    raise NumericalError(
                        f"The stored value of '{request.text}' has the shape {list(value.shape)}, but {name} of "
                        f"{model.name} gives {activations.outputs.shape[1]} numbers: it comes from another model. "
                        "Edit the fact anew."
                    )
                residuals[row] = value.to(reached) - activations.outputs[row]
        return residuals

    def figures(self, row: int, batch: EditBatch) -> Mapping[str, float]:
        """Figures of the optimisation that found a fact's target; empty if the target was known without one.

        ``facts_of_value``, if several facts share the value; ``steps`` of the optimiser; ``target_loss`` and
        ``target_probability`` at its end, the latter being the mean over contexts of the probability per token;
        ``delta_norm`` ‖δ‖, ``value_norm`` ‖h₀‖, and with ``v_norm_anchor`` ``unanchored_norm`` ‖v₀ + δ‖ as optimised.
        """
        request = batch.requests[row]
        place = self.row.get(request.id)
        if place is None or self.optimised is None:
            return batch.known[request.id].figures if row < batch.num_new else {}
        shared = self.facts_of_value[request.id]
        return {
            **({"facts_of_value": float(shared)} if shared > 1 else {}),
            "steps": float(self.optimised.steps[place]),
            "target_loss": self.optimised.losses[place],
            "target_probability": self.optimised.probabilities[place],
            "delta_norm": float(self.optimised.deltas[place].norm()),
            "value_norm": float(self.optimised.base[place].norm()),
            **({"unanchored_norm": self.optimised.norms[place]} if self.anchored else {}),
        }

    def notes(self) -> tuple[str, ...]:
        """Sentences for the user."""
        return self.optimised.notes if self.optimised else ()


def with_planted(fact: FactRows, window: Window, windows: Windows, deltas: Mapping[str, Tensor]) -> FactRows:
    """The rows of a window with the values of the windows before it in place."""
    before = [(earlier, deltas[earlier.id]) for earlier in windows.before(window)]
    return replace(fact, contexts=tuple(planted(row, window, before) for row in fact.contexts))


def _stored_value(known: KnownTarget, name: str, request: EditRequest) -> Tensor:
    if name not in known.values:
        raise NumericalError(
            f"The stored value of '{request.text}' is for {', '.join(known.values)}, not for {name}: "
            "it was edited with other layers. Edit it anew instead of replaying it."
        )
    return known.values[name]
