"""The attachment: facts of all active batches in memories beside projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from editcore import Attachment, LanguageModel, ModelError
from editcore.models import first_tensor, replace_first
from torch import Tensor, nn

from edit_memory.lookup import Codebook, Gated, Slots

__all__ = ["Memory"]


class Memory:
    """Hooks the projections that attachments speak of. The settings are those of the newest attachment."""

    def __init__(self) -> None:
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        """See :class:`editcore.AttachmentKind`.

        Raises:
            ModelError: an attachment is for another model, or some are residuals and others are values.
        """
        kinds = {attachment.fields["rule"] for attachment in attachments}
        if len(kinds) > 1:
            raise ModelError(f"Memories of the kinds {' and '.join(sorted(kinds))} do not go together in one model.")
        answers = {
            layer: _answering(_slots(model, layer, attachments), attachments[-1].fields)
            for layer in sorted({layer for attachment in attachments for layer in attachment.fields["layers"]})
        }
        for layer, answer in answers.items():
            self._handles.append(model.projection(layer).register_forward_hook(_hook(answer)))

    def remove(self) -> None:
        """Take the hooks out."""
        while self._handles:
            self._handles.pop().remove()


def _slots(model: LanguageModel, layer: int, attachments: Sequence[Attachment]) -> Slots:
    model.check_layer(layer, setting="memory")
    here = [attachment for attachment in attachments if layer in attachment.fields["layers"]]
    keys, values = (torch.cat([each.tensors[f"layer_{layer}.{name}"] for each in here]) for name in ("keys", "values"))
    address = model.layout.weight_name(layer)
    expected = tuple(model.as_out_in(address, model.weight(address)).shape)
    if (found := (values.shape[1], keys.shape[1])) != expected:
        raise ModelError(
            f"The memory maps {found[1]} numbers to {found[0]}; {address} of {model.name} maps {expected[1]} to "
            f"{expected[0]}. It was made for another model."
        )
    labels = [each.fields["targets"][row] for each in here for row in each.tensors[f"layer_{layer}.rows"].tolist()]
    return Slots(keys.float(), values.float(), labels)


def _answering(slots: Slots, fields: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    return Codebook(slots, fields["radius"]) if fields["rule"] == "grace" else Gated(slots, fields["gate"])


def _hook(answer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return replace_first(output, answer(args[0], first_tensor(output)))

    return hook
