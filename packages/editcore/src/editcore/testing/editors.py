"""The contract suite of editors."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from editcore.evaluation.scoring import score_targets
from editcore.interfaces.changes import Written
from editcore.interfaces.errors import EditcoreError, RequestError
from editcore.interfaces.protocols import EditContext, Editor
from editcore.interfaces.specs import EditorSpec
from editcore.interfaces.values import EditBatch, EditRequest, Proposal
from editcore.models import LanguageModel
from editcore.models.edited import EditedModel
from editcore.models.weights import split_address
from editcore.plugins.calls import resolve
from editcore.plugins.registry import Plugins
from editcore.runs.backends import RawBackend
from editcore.runs.config import SessionConfig
from editcore.runs.session import EditSession
from editcore.second_moments.statistics import CorpusOptions, StatisticsStore
from editcore.settings.hparams import build
from editcore.testing.contract import (
    CORPUS_TOKENS,
    Contract,
    InjectedFailure,
    MakeModel,
    ModelState,
    counting_passes,
    imports_nothing_heavy,
    logits_of,
    renumbered,
    same_bits,
    survives_json,
)
from editcore.testing.facts import tiny_requests

__all__ = ["EditorContract"]


class EditorContract(Contract):
    """The contract of every editor. Give ``editor_name`` and ``hparams``; override ``make_model`` for another model."""

    @pytest.fixture
    def editor_name(self) -> str:
        """The name under which the editor is announced."""
        raise NotImplementedError("give the fixture editor_name")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        """Hyperparameters for a model of three blocks, as a preset would hold them; small numbers keep tests fast."""
        raise NotImplementedError("give the fixture hparams")

    @pytest.fixture
    def requests_to_edit(self) -> tuple[EditRequest, ...]:
        """Facts that do not contradict each other; more than two."""
        return tiny_requests(5)

    @pytest.fixture
    def spec(self, registry: Plugins, editor_name: str) -> EditorSpec:
        """The announcement."""
        return registry.editor(editor_name)

    @pytest.fixture
    def batch(self, spec: EditorSpec, requests_to_edit: tuple[EditRequest, ...]) -> EditBatch:
        """Two new facts, or one if the editor takes no more."""
        return EditBatch.of(requests_to_edit[: min(2, spec.capabilities.max_batch or 2)])

    @pytest.fixture
    def prepared(
        self, registry: Plugins, spec: EditorSpec, hparams: dict[str, object], corpus: str, make_model: MakeModel
    ) -> Callable[[], _Prepared]:
        """Makes a new model, and an editor that has prepared for it."""

        def make() -> _Prepared:
            model = make_model()
            editor: Editor = resolve(spec.target)(build(resolve(spec.hparams), [hparams], owner=spec.name))
            backend = RawBackend()
            backend.open(model)
            edited = EditedModel(model, backend, spec=registry.backend("raw"), plugins=registry)
            context = EditContext(
                statistics=StatisticsStore(model, CorpusOptions(name=corpus, tokens=CORPUS_TOKENS)),
                trial=edited.trial_of,
                plugins=registry,
                seed=0,
            )
            json.dumps(editor.prepare(model, context))  # goes into the run's record
            return _Prepared(edited, editor, context)

        return make

    @pytest.fixture
    def open_session(
        self, registry: Plugins, editor_name: str, hparams: dict[str, object], corpus: str, make_model: MakeModel
    ) -> Callable[[], EditSession]:
        """Opens a session of the editor on a new model."""
        config = SessionConfig(
            editor=editor_name, settings={editor_name: hparams}, corpus=corpus, corpus_tokens=CORPUS_TOKENS
        )
        return lambda: EditSession.open(make_model(), config, registry=registry)

    def test_is_announced(self, registry: Plugins, editor_name: str) -> None:
        """The name is registered, its class and its hyperparameters can be imported."""
        spec = registry.editor(editor_name)
        assert spec.name == editor_name
        assert spec.summary
        assert all(callable(getattr(resolve(spec.target), method, None)) for method in ("prepare", "propose"))

    def test_announcement_imports_no_torch(self, registry: Plugins, spec: EditorSpec) -> None:
        """Listing editors and describing this one stays fast."""
        imports_nothing_heavy(registry, "editor", spec.name, spec.hparams)

    def test_hparams_survive_json_and_refuse_unknown_names(self, spec: EditorSpec, hparams: dict[str, object]) -> None:
        """What a run records can be read back, and a misspelt setting is not ignored."""
        survives_json(resolve(spec.hparams), hparams, spec.name)

    def test_propose_leaves_the_model_unchanged(self, prepared: Callable[[], _Prepared], batch: EditBatch) -> None:
        """Weights, flags and hooks are as before, to the bit, because only the backend applies changes."""
        made = prepared()
        before = ModelState.of(made.model)
        made.propose(batch)
        assert not before.differences(ModelState.of(made.model)), "the model changed while a batch was proposed"

    def test_a_failed_propose_leaves_the_model_unchanged(
        self, prepared: Callable[[], _Prepared], batch: EditBatch
    ) -> None:
        """Weights, flags and hooks are as before when a forward pass fails: the first, a middle one, the last."""
        made = prepared()
        with counting_passes(made.model) as passes:
            made.propose(batch)
        for fail_at in sorted({0, len(passes) // 2, len(passes) - 1} & set(passes)):
            made = prepared()
            before = ModelState.of(made.model)
            with (
                counting_passes(made.model, fail_at=fail_at),
                contextlib.suppress(InjectedFailure, EditcoreError),
            ):
                made.propose(batch)
            assert not before.differences(ModelState.of(made.model)), (
                f"the model stayed changed when forward pass {fail_at + 1} of {len(passes)} failed"
            )

    def test_a_proposal_is_complete(
        self, prepared: Callable[[], _Prepared], spec: EditorSpec, batch: EditBatch
    ) -> None:
        """It writes something, of the kinds that it announces. Changes fit their weights and are finite, and every fact
        has its evidence."""
        made = prepared()
        proposal = made.propose(batch)
        assert proposal.changes or proposal.attachment, "the proposal writes nothing"
        for address, change in proposal.changes.items():
            assert change.kind in spec.capabilities.gives, f"{change.kind} changes are not announced"
            shape = tuple(made.model.as_out_in(address, made.model.weight(address)).shape)
            assert change.shape == shape, f"the change of {address} does not fit {shape}"
            for tensor in change.tensors().values():
                assert tensor.dtype in {torch.float32, torch.float64}
            assert change.is_finite(), f"the change of {address} holds NaN or Inf"
        if proposal.attachment is not None:
            assert "attachment" in spec.capabilities.gives, "attachments are not announced"
            json.dumps(dict(proposal.attachment.fields), allow_nan=False)
        for name, tensor in _tensors_beside_changes(proposal.written).items():
            assert torch.isfinite(tensor).all(), f"the tensor {name} holds NaN or Inf"
        ids = [request.id for request in batch.requests]
        assert [evidence.request_id for evidence in proposal.evidence] == ids
        assert set(proposal.known) <= set(ids)
        for known in proposal.known.values():
            assert set(known.keys) == set(known.values) <= set(proposal.changes)

    def test_a_proposal_can_be_applied_and_taken_back(
        self, prepared: Callable[[], _Prepared], batch: EditBatch
    ) -> None:
        """Applying twice gives the same bits and answers, and taking back restores the original ones."""
        made = prepared()
        written = made.propose(batch).written
        proposed = copy.deepcopy(written)
        base, answers = ModelState.of(made.model), logits_of(made.model)
        made.edited.apply(written)
        _assert_same_bits(proposed, written)  # a factor must not be the weight itself
        applied, edited_answers = ModelState.of(made.model), logits_of(made.model)
        made.edited.rebuild([])
        assert not base.differences(ModelState.of(made.model)), "the base did not come back"
        assert same_bits(answers, logits_of(made.model)), "the model answers otherwise than before"
        with made.edited.trial(written):
            assert logits_of(made.model).allclose(edited_answers, rtol=1e-4, atol=1e-5), (
                "on trial the model answers otherwise"
            )
        assert not base.differences(ModelState.of(made.model)), "the base did not come back after a trial"
        made.edited.apply(written)
        made.edited.rebuild([written])
        assert not applied.differences(ModelState.of(made.model)), "the proposal changed when it was applied"
        assert same_bits(edited_answers, logits_of(made.model)), "the edited model answers otherwise the second time"

    def test_other_weights_stay_as_they_are(
        self, open_session: Callable[[], EditSession], make_model: MakeModel, batch: EditBatch
    ) -> None:
        """Only weights that the proposal names differ from the unedited model."""
        base = make_model()
        session = open_session()
        [result] = session.edit(batch.requests)
        named = {split_address(address)[0] for address in result.proposal.changes}
        changed = {
            name for name in base.weights.names() if not same_bits(base.weight(name), session.model.weight(name))
        }
        assert changed <= named, "weights changed that the proposal does not name"

    def test_the_same_seed_gives_the_same_bits(self, prepared: Callable[[], _Prepared], batch: EditBatch) -> None:
        """Two new editors on two new models give the same answer."""
        first, second = (prepared().propose(batch).written for _ in range(2))
        _assert_same_bits(first, second)

    def test_the_target_becomes_likelier(self, prepared: Callable[[], _Prepared], batch: EditBatch) -> None:
        """Targets become likelier in the geometric mean over the batch. On a random model, one fact may lose what
        another gains."""
        made = prepared()
        before = _target_log_probabilities(made.model, batch.requests)
        made.edited.apply(made.propose(batch).written)
        after = _target_log_probabilities(made.model, batch.requests)
        assert sum(after) > sum(before), f"log p of the targets was {before}, is {after}"

    def test_what_is_remembered_is_what_the_ledger_has(
        self, open_session: Callable[[], EditSession], batch: EditBatch, requests_to_edit: tuple[EditRequest, ...]
    ) -> None:
        """After an undo and a redo the editor proposes the same as without them."""
        more = requests_to_edit[len(batch) : len(batch) + 1]
        straight, detour = open_session(), open_session()
        for session in (straight, detour):
            session.edit(batch.requests)
        detour.edit(more)
        detour.undo(more[0].id)
        detour.undo(batch.requests[0].id)
        detour.redo(batch.requests[0].id)
        renumbered(straight, detour)
        [first], [second] = (session.edit(more) for session in (straight, detour))
        _assert_same_bits(first.proposal.written, second.proposal.written)

    def test_a_long_list_is_edited_in_batches_that_it_takes(
        self,
        spec: EditorSpec,
        open_session: Callable[[], EditSession],
        requests_to_edit: tuple[EditRequest, ...],
    ) -> None:
        """The session never gives more than ``max_batch`` requests, and the editor takes as many as it announces."""
        results = open_session().edit(requests_to_edit)
        sizes = [len(result.batch) for result in results]
        assert sum(sizes) == len(requests_to_edit)
        assert max(sizes) <= (spec.capabilities.max_batch or len(requests_to_edit))
        assert all(result.applied for result in results)

    def test_an_empty_batch_is_refused(
        self, prepared: Callable[[], _Prepared], open_session: Callable[[], EditSession]
    ) -> None:
        """Session and editor both refuse it, with an error that a user can read."""
        with pytest.raises(RequestError, match="empty"):
            open_session().edit([])
        with pytest.raises(EditcoreError):
            prepared().propose(EditBatch.of(()))


@dataclass(frozen=True)
class _Prepared:
    """A model with the backend ``raw``, and an editor that has prepared for it."""

    edited: EditedModel
    editor: Editor
    context: EditContext

    @property
    def model(self) -> LanguageModel:
        return self.edited.model

    def propose(self, batch: EditBatch) -> Proposal:
        return self.editor.propose(self.model, batch, self.context)


def _assert_same_bits(first: Written, second: Written) -> None:
    """Changes, attachments and memory are the same."""
    assert set(first.changes) == set(second.changes)
    for address, change in first.changes.items():
        other = second.changes[address].tensors()
        for name, tensor in change.tensors().items():
            assert same_bits(tensor, other[name]), f"{name} of the change of {address}"
    expected = _tensors_beside_changes(second)
    assert set(_tensors_beside_changes(first)) == set(expected)
    for name, tensor in _tensors_beside_changes(first).items():
        assert same_bits(tensor, expected[name]), f"the tensor {name}"
    fields = [
        dict(written.attachment.fields) if written.attachment is not None else None for written in (first, second)
    ]
    assert fields[0] == fields[1], "the fields of the attachment"


def _tensors_beside_changes(written: Written) -> dict[str, Tensor]:
    """Tensors that are not part of a change."""
    attachment = {} if written.attachment is None else written.attachment.tensors
    return {**{f"attachment/{name}": tensor for name, tensor in attachment.items()}, **written.memory}


def _target_log_probabilities(model: LanguageModel, requests: Sequence[EditRequest]) -> list[float]:
    """log p(target | prompt) of each request, as the model is asked."""
    scores = score_targets(
        model,
        [request.text for request in requests],
        [request.target_new for request in requests],
        joins=[request.join for request in requests],
    )
    return [-scored.nll * scored.num_tokens for scored in scores]
