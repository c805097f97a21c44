"""The contract of attachments: the toys keep it, and what breaks a clause fails that one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from editcore import Attachment, AttachmentSpec, LanguageModel, Plugins
from editcore.models import EditedModel
from editcore.runs.backends import RawBackend
from editcore.testing import AttachmentContract, tiny_model, tiny_requests
from torch import Tensor, nn

PROMPTS = tuple(request.text for request in tiny_requests(2))


def shift(seed: int, **fields: Any) -> Attachment:
    vocab = tiny_model().layout.vocab_size
    value = torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    return Attachment(kind="toy-logits", tensors={"shift": value, "and": torch.zeros(1)}, fields=fields)


@pytest.mark.usefixtures("toys")
class TestLogits(AttachmentContract):
    attachment_kind = pytest.fixture(lambda self: "toy-logits")
    attachments = pytest.fixture(lambda self: (shift(0), shift(1)))


@pytest.mark.usefixtures("toys")
class TestPreface(AttachmentContract):
    attachment_kind = pytest.fixture(lambda self: "toy-preface")
    attachments = pytest.fixture(
        lambda self: tuple(Attachment(kind="toy-preface", fields={"text": text}) for text in ("It rains.", "So."))
    )


class Honest:
    """Shifts the logits."""

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        self.model, self.attachments = model, attachments
        self.handle = model.hf.get_output_embeddings().register_forward_hook(self.change)

    def change(self, _module: nn.Module, _inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        for attachment in self.attachments:
            logits = 0.5 * logits + attachment.tensors["shift"].to(logits)
        return logits

    def remove(self) -> None:
        self.handle.remove()


class Idle(Honest):
    def change(self, _module: nn.Module, _inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        return logits


class Writing(Honest):
    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        super().install(model, attachments)
        self.bits = model.hf.get_input_embeddings().weight.detach().clone()
        with torch.no_grad():
            model.hf.get_input_embeddings().weight.add_(0.1)

    def remove(self) -> None:
        super().remove()
        with torch.no_grad():
            self.model.hf.get_input_embeddings().weight.copy_(self.bits)


class Leaving(Honest):
    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        super().install(model, attachments)
        model.hf.eval().get_output_embeddings().register_forward_hook(lambda *_: None)


class Rewriting(Honest):
    """Leaves a way of asking behind, which is no module and no hook."""

    def install(self, model: LanguageModel, attachments: Sequence[Attachment]) -> None:
        super().install(model, attachments)
        asked = model.asked
        model.asked = lambda prompt: asked(f"So. {prompt.removeprefix('So. ')}")  # type: ignore[method-assign]


class Counting(Honest):
    def change(self, _module: nn.Module, _inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        asked = getattr(self.model, "asked_so_far", 0)
        object.__setattr__(self.model, "asked_so_far", asked + 1)
        return super().change(_module, _inputs, logits) * (1 + asked)


class Live(Honest):
    def change(self, _module: nn.Module, _inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        shifted = super().change(_module, _inputs, logits)
        return shifted * (1 + sum(isinstance(attachment.fields["pair"], tuple) for attachment in self.attachments))


class Ordered(Honest):
    def change(self, _module: nn.Module, _inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        first = [next(iter(attachment.tensors)) for attachment in self.attachments]
        return super().change(_module, _inputs, logits) * (1 + first.count("shift"))


BROKEN = {
    Honest: set(),
    Idle: {"test_it_changes_answers"},
    Writing: {"test_weights_stay_as_they_are"},
    Leaving: {"test_it_is_taken_out_without_a_trace"},
    Rewriting: {"test_it_is_taken_out_without_a_trace"},
    Counting: {"test_answers_are_a_function_of_what_is_active"},
    Live: {"test_it_survives_the_ledger"},
    Ordered: {"test_it_survives_the_ledger"},
}


@pytest.mark.parametrize("keeper", BROKEN)
def test_what_breaks_one_clause_fails_that_one(keeper: type[Honest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keepers", SimpleNamespace(Keeper=keeper))  # type: ignore[misc]
    spec = AttachmentSpec("toy-logits", "keepers:Keeper", summary="Shifts logits.")
    monkeypatch.setattr(Plugins, "attachment", lambda _self, _kind: spec)
    plugins = Plugins.load()

    def in_charge() -> EditedModel:
        backend = RawBackend()
        backend.open(model := tiny_model())
        return EditedModel(model, backend, spec=plugins.backend("raw"), plugins=plugins)

    suite, failed = AttachmentContract(), set()
    given = {"in_charge": in_charge, "attachments": (shift(0, pair=(1, 2)), shift(1, pair=(3, 4)))}
    for name in (name for name in vars(AttachmentContract) if name.startswith("test_")):
        if "announce" in name:  # looks into new processes, and at the real announcement
            continue
        test = getattr(suite, name)
        asks = test.__code__.co_varnames[1 : test.__code__.co_argcount]
        try:
            test(**{what: {**given, "prompts": PROMPTS}[what] for what in asks})
        except AssertionError:
            failed.add(name)
    assert failed == BROKEN[keeper]
