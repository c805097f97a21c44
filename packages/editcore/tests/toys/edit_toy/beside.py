"""Knowledge beside the weights."""

from __future__ import annotations

from collections.abc import Sequence

from editcore import Attachment, LanguageModel, ModelError
from torch import Tensor, nn

KEEPERS: list[tuple[str, int]] = []
"""Kind and number of attachments of what is installed now, in the order of installation."""


class _Keeper:
    kind = ""

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        if any(attachment.fields.get("refuses") for attachment in attachments):
            raise ModelError("It does not fit.")
        if any(attachment.fields.get("breaks") for attachment in attachments):
            raise ZeroDivisionError("no luck")
        self.attachments = tuple(attachments)
        self.entry = (self.kind, len(attachments))
        KEEPERS.append(self.entry)

    def remove(self) -> None:
        KEEPERS.remove(self.entry)


class Logits(_Keeper):
    """One after the other, so that their order matters: each halves the logits and adds its own."""

    kind = "toy-logits"

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        super().install(model, attachments)
        self.handle = model.hf.get_output_embeddings().register_forward_hook(self._change)

    def _change(self, _module: nn.Module, _inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        for attachment in self.attachments:
            logits = 0.5 * logits + attachment.tensors["shift"].to(logits)
        return logits

    def remove(self) -> None:
        self.handle.remove()
        super().remove()


class Preface(_Keeper):
    """The texts of all, in their order, before the prompt."""

    kind = "toy-preface"

    def rewrite(self, prompt: str) -> str:
        return " ".join([*(str(attachment.fields["text"]) for attachment in self.attachments), prompt])


class Broken:
    def __init__(self) -> None:
        raise ZeroDivisionError("no luck")
