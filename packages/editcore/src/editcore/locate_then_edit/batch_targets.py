"""What the facts of a batch ask for: an optimised δ for the new ones, stored values for those already known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from editcore.interfaces.errors import NumericalError
from editcore.interfaces.protocols import EditContext
from editcore.interfaces.values import EditBatch, EditRequest, KnownTarget
from editcore.locate_then_edit.activations import LayerActivations
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.preparation import Prepared
from editcore.locate_then_edit.targets import Targets, optimise_targets, prefixes_can_be_cached
from editcore.locate_then_edit.token_rows import value_rows

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["BatchTargets", "ResidualKind"]

ResidualKind = Literal["shift", "value"]
"""What a new fact asks for: δ more than its key gives now, or the bare prompt's value h₀ + δ."""

_UNKNOWN = KnownTarget(keys={}, values={})


@dataclass(slots=True)
class BatchTargets:
    """The targets of one batch."""

    optimised: Targets | None
    """Of the facts whose value was optimised; ``None`` if all are known."""
    row: Mapping[str, int]
    """Row in ``optimised`` by request id."""
    stream_before: Tensor | None = None
    """Output of the deepest edited block before the first layer of this batch was changed, ``[n, d_model]``."""

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        batch: EditBatch,
        layers: Sequence[int],
        hparams: LocateThenEditHParams,
        prepared: Prepared,
        context: EditContext,
    ) -> BatchTargets:
        """Optimise the values of the facts that are not known at all of ``layers``, at the last of them."""
        names = {model.layout.weight_name(layer) for layer in layers}
        # A replayed fact may have been written at other layers (layer_selection = "random") and has no value at these.
        # The model says it already, as a rule, so its optimisation ends with the first evaluation.
        elsewhere = {
            request.id
            for request in batch.requests[batch.num_new :]
            if not names <= batch.known.get(request.id, _UNKNOWN).values.keys()
        }
        fresh = [request for request in batch.requests if request.id not in batch.known or request.id in elsewhere]
        if not fresh:
            return cls(None, {})
        layer = layers[-1]
        values = value_rows(model, fresh, prepared.templates, hparams)
        if layer not in prepared.cache_prefixes:
            prepared.cache_prefixes[layer] = prefixes_can_be_cached(model, values[0], layer=layer)
        optimised = optimise_targets(
            model,
            values,
            layer=layer,
            hparams=hparams,
            cache_prefixes=prepared.cache_prefixes[layer],
            progress=context.progress,
        )
        return cls(optimised, {request.id: row for row, request in enumerate(fresh)})

    def residuals(
        self,
        model: LanguageModel,
        batch: EditBatch,
        *,
        name: str,
        seen: LayerActivations,
        share: float,
        kind: ResidualKind,
    ) -> Tensor:
        """What one layer is asked to add to each fact's output, ``[n, d_out]`` float64.

        A new fact asks for its share of the part of δ that the layers below have not reached (``kind`` says on top of
        what). A known fact asks for the value it had at this layer when it was solved.

        Args:
            name: address of the layer's weight.
            share: 1 over the number of layers that are left.

        Raises:
            NumericalError: a stored value comes from other layers or another model.
        """
        if self.stream_before is None:
            self.stream_before = seen.stream
        reached = (seen.stream - self.stream_before.to(seen.stream)) / model.layout.residual_scale
        residuals = torch.empty_like(seen.outputs)
        for row, request in enumerate(batch.requests):
            if request.id in self.row:
                assert self.optimised is not None
                delta = self.optimised.deltas[self.row[request.id]].double().to(reached.device)
                residuals[row] = (delta - reached[row]) * share
                if kind == "value":
                    residuals[row] += seen.prompt_outputs[row] - seen.outputs[row]
            else:
                value = _stored_value(batch.known[request.id], name, request)
                if value.shape != seen.outputs[row].shape:
                    raise NumericalError(
                        f"The stored value of '{request.text}' has the shape {list(value.shape)}, but {name} of "
                        f"{model.name} gives {seen.outputs.shape[1]} numbers: it comes from another model. Edit the "
                        "fact anew."
                    )
                residuals[row] = value.to(reached) - seen.outputs[row]
        return residuals

    def figures(self, row: int, batch: EditBatch) -> Mapping[str, float]:
        """How the target of a fact was found; empty if it was known without that.

        ``steps`` of the optimiser, ``target_loss`` and ``target_probability`` at its end (the mean over contexts of the
        probability per token), ``delta_norm`` ‖δ‖ and ``value_norm`` ‖h₀‖.
        """
        request = batch.requests[row]
        place = self.row.get(request.id)
        if place is None or self.optimised is None:
            return batch.known[request.id].figures if row < batch.num_new else {}
        return {
            "steps": float(self.optimised.steps[place]),
            "target_loss": self.optimised.losses[place],
            "target_probability": self.optimised.probabilities[place],
            "delta_norm": float(self.optimised.deltas[place].norm()),
            "value_norm": float(self.optimised.base[place].norm()),
        }

    def notes(self) -> tuple[str, ...]:
        """Sentences for the user."""
        return self.optimised.notes if self.optimised else ()


def _stored_value(known: KnownTarget, name: str, request: EditRequest) -> Tensor:
    if name not in known.values:
        raise NumericalError(
            f"The stored value of '{request.text}' is for {', '.join(known.values)}, not for {name}: "
            "it was edited with other layers. Edit it anew instead of replaying it."
        )
    return known.values[name]
