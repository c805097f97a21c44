"""The contract suite of attachments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import pytest
from safetensors.torch import load, save
from torch import Tensor

from editcore.evaluation.divergence import next_token_log_probabilities
from editcore.interfaces.changes import Attachment, Written
from editcore.interfaces.specs import AttachmentSpec
from editcore.models.edited import EditedModel
from editcore.plugins.calls import resolve
from editcore.plugins.registry import Plugins
from editcore.runs.backends import RawBackend
from editcore.testing.contract import Contract, MakeModel, ModelState, imports_nothing_heavy, same_bits
from editcore.testing.facts import tiny_requests

__all__ = ["AttachmentContract"]

InCharge = Callable[[], EditedModel]


class AttachmentContract(Contract):
    """The contract of every kind of attachment. Give ``attachment_kind`` and ``attachments``. Override ``make_model``
    for another model, and ``prompts`` if the attachments change the answers to other prompts."""

    @pytest.fixture
    def attachment_kind(self) -> str:
        """The kind as it is announced."""
        raise NotImplementedError("give the fixture attachment_kind")

    @pytest.fixture
    def attachments(self) -> tuple[Attachment, ...]:
        """Two or more attachments, of different batches, which fit the model."""
        raise NotImplementedError("give the fixture attachments")

    @pytest.fixture
    def prompts(self) -> tuple[str, ...]:
        """The prompts that the model is asked."""
        return tuple(request.text for request in tiny_requests(4))

    @pytest.fixture
    def spec(self, registry: Plugins, attachment_kind: str) -> AttachmentSpec:
        """The announcement."""
        return registry.attachment(attachment_kind)

    @pytest.fixture
    def in_charge(self, registry: Plugins, make_model: MakeModel) -> InCharge:
        """Makes a new model into which attachments can be installed."""

        def make() -> EditedModel:
            backend = RawBackend()
            backend.open(model := make_model())
            return EditedModel(model, backend, spec=registry.backend("raw"), plugins=registry)

        return make

    def test_is_announced(self, spec: AttachmentSpec) -> None:
        """The kind is registered, and its class can be imported and made."""
        assert spec.summary
        made = resolve(spec.target)()
        assert all(callable(getattr(made, method, None)) for method in ("install", "remove"))

    def test_announcement_imports_no_torch(self, registry: Plugins, spec: AttachmentSpec) -> None:
        """Listing kinds stays fast."""
        imports_nothing_heavy(registry, "attachment", spec.name, None)

    def test_it_changes_answers(
        self, in_charge: InCharge, attachments: Sequence[Attachment], prompts: Sequence[str]
    ) -> None:
        """Otherwise none of the other tests could fail."""
        edited = in_charge()
        base = _answers(edited, prompts)
        edited.rebuild(_written(attachments))
        assert not same_bits(_answers(edited, prompts), base), "the model answers as without it"

    def test_weights_stay_as_they_are(self, in_charge: InCharge, attachments: Sequence[Attachment]) -> None:
        """Knowledge is kept beside the weights: wrapped modules keep their parameters."""
        edited = in_charge()
        before = [(weight, weight.detach().clone()) for weight in edited.model.hf.parameters()]
        edited.rebuild(_written(attachments))
        assert all(same_bits(weight, bits) for weight, bits in before), "a weight changed"

    def test_it_is_taken_out_without_a_trace(
        self, in_charge: InCharge, attachments: Sequence[Attachment], prompts: Sequence[str]
    ) -> None:
        """Modules, hooks and answers are as before."""
        edited = in_charge()
        before, base = ModelState.of(edited.model), _answers(edited, prompts)
        edited.rebuild(_written(attachments))
        edited.rebuild([])
        assert not before.differences(ModelState.of(edited.model)), "something stayed in the model"
        assert same_bits(_answers(edited, prompts), base), "the model answers otherwise than before"

    def test_answers_are_a_function_of_what_is_active(
        self, in_charge: InCharge, attachments: Sequence[Attachment], prompts: Sequence[str]
    ) -> None:
        """They do not depend on what was installed before."""
        straight, detour = in_charge(), in_charge()
        straight.rebuild(_written(attachments))
        for written in _written(attachments):
            detour.apply(written)
            _answers(detour, prompts)
        detour.rebuild(_written(attachments[:1]))
        detour.rebuild(_written(attachments))
        assert same_bits(_answers(straight, prompts), _answers(detour, prompts)), "what was there before shows"

    def test_it_survives_the_ledger(
        self, in_charge: InCharge, attachments: Sequence[Attachment], prompts: Sequence[str]
    ) -> None:
        """Attachments work after their fields went through JSON and their tensors through safetensors, sorted by
        name."""
        again = [
            Attachment(
                kind=attachment.kind,
                fields=json.loads(json.dumps(dict(attachment.fields), allow_nan=False)),
                tensors=_through_file(attachment.tensors),
            )
            for attachment in attachments
        ]
        live, reopened = in_charge(), in_charge()
        live.rebuild(_written(attachments))
        reopened.rebuild(_written(again))
        assert same_bits(_answers(live, prompts), _answers(reopened, prompts)), "a reopened run answers otherwise"


def _through_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(load(save({name: tensor.contiguous() for name, tensor in tensors.items()})).items()))


def _written(attachments: Sequence[Attachment]) -> list[Written]:
    return [Written(attachment=attachment) for attachment in attachments]


def _answers(edited: EditedModel, prompts: Sequence[str]) -> Tensor:
    """log p of the next token, ``[texts, vocab]``."""
    return next_token_log_probabilities(edited.model, prompts)
