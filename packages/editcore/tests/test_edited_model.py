"""A model is its base and what is active, in order, whatever came before: weights and what is beside them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from editcore import (
    Attachment,
    BackendSpec,
    Changes,
    DenseDelta,
    EditcoreError,
    FactoredDelta,
    LanguageModel,
    ModelError,
    PluginError,
    Plugins,
    UnknownNameError,
    VectorDelta,
    Written,
)
from editcore.evaluation import kl_divergences, next_token_log_probabilities, score_targets
from editcore.models import EditedModel, lookup_row
from editcore.runs.backends import RawBackend
from editcore.testing import tiny_model, tiny_requests
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

FACT = tiny_requests(1)[0]
TEXT = FACT.text


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    """One of each way to store a matrix; tests leave them as they are."""
    return {
        "llama": tiny_model("llama", num_layers=2, config={"intermediate_size": 16}),
        "gpt2": tiny_model("gpt2", num_layers=2, config={"n_inner": 16}),
    }


@pytest.fixture
def model(models: dict[str, LanguageModel]) -> LanguageModel:
    return copy.deepcopy(models["llama"])


@pytest.fixture
def plugins(toys: Any) -> Plugins:
    from edit_toy import beside

    beside.KEEPERS.clear()
    return Plugins.load()


def installed() -> list[tuple[str, int]]:
    """Kind and number of what is installed, in the order of installation."""
    from edit_toy import beside

    return list(beside.KEEPERS)


def in_charge(model: LanguageModel, plugins: Plugins, spec: BackendSpec | None = None) -> EditedModel:
    backend = RawBackend()
    backend.open(model)
    return EditedModel(model, backend, spec=spec or plugins.backend("raw"), plugins=plugins)


def bits(model: LanguageModel) -> dict[str, Tensor]:
    return {name: model.weight(name).clone() for name in model.weights.names()}


@torch.inference_mode()
def logits(model: LanguageModel) -> Tensor:
    found: Tensor = model.hf(input_ids=model.encode([TEXT]).input_ids).logits
    return found.clone()


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def shift(seed: int, **fields: Any) -> Attachment:
    generator = torch.Generator().manual_seed(seed)
    return Attachment(kind="toy-logits", tensors={"shift": torch.randn(640, generator=generator)}, fields=fields)


def preface(text: str, **fields: Any) -> Attachment:
    return Attachment(kind="toy-preface", fields={"text": text, **fields})


def pool_for(model: LanguageModel) -> list[Written]:
    """Batches of every kind of change, of weights of every kind, several of them overlapping in a weight."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)

    def thin(address: str, rank: int) -> FactoredDelta:
        d_out, d_in = model.as_out_in(address, model.weight(address)).shape
        return FactoredDelta(random(d_out, rank), random(rank, d_in))

    def dense(address: str) -> DenseDelta:
        return DenseDelta(random(*model.as_out_in(address, model.weight(address)).shape).float())

    def vector(address: str) -> VectorDelta:
        return VectorDelta(random(*model.weight(address).shape))

    down = model.layout.weight_name(0)
    matrices = [name for name in model.weights.names() if ".1." in name and model.weight(name).ndim == 2]
    vectors = [name for name in model.weights.names() if ".1." in name and model.weight(name).ndim == 1]
    [embedding] = [
        name for name in model.weights.names() if model.weight(name) is model.hf.get_input_embeddings().weight
    ]
    return [
        Written(changes={down: thin(down, 1)}),
        Written(changes={down: thin(down, 2), matrices[0]: dense(matrices[0])}),
        Written(changes={down: dense(down), vectors[0]: vector(vectors[0])}),
        Written(changes={embedding: thin(embedding, 1), vectors[0]: vector(vectors[0])}),
        Written(changes={f"{matrices[1]}[3]": vector(f"{matrices[1]}[3]")}),
        Written(attachment=shift(0)),
        Written(changes={down: thin(down, 1)}, attachment=shift(1)),
        Written(attachment=preface("One.")),
        Written(changes={vectors[0]: vector(vectors[0])}, attachment=preface("Two.")),
    ]


class Expected:
    """What a model must be, from the arithmetic alone."""

    def __init__(self, base: LanguageModel) -> None:
        self.reference, self.base = copy.deepcopy(base), bits(base)

    def weights(self, active: Sequence[Written]) -> dict[str, Tensor]:
        """Base and changes, summed in order in float64, rounded once."""
        found = {name: weight.clone() for name, weight in self.base.items()}
        for name, weight in found.items():
            model, total, touched = self.reference, weight.double(), False
            for written in active:
                for address, change in written.changes.items():
                    plain, _, index = address.partition("[")
                    if plain != name:
                        continue
                    touched = True
                    dense = self._dense(change)
                    if index:
                        total[int(index.removesuffix("]"))] += dense
                    else:
                        total = total + model.as_out_in(address, dense)
            if touched:
                found[name] = total.to(weight)
        return found

    @staticmethod
    def _dense(change: Any) -> Tensor:
        if isinstance(change, FactoredDelta):
            return change.left.double() @ change.right.double()
        value: Tensor = change.value.double()
        return value

    def check(self, model: LanguageModel, active: Sequence[Written]) -> None:
        weights = self.weights(active)
        assert same(bits(model), weights)
        for name, weight in weights.items():
            self.reference.weight(name).copy_(weight)
        expected = logits(self.reference)
        for written in active:
            if written.attachment is not None and written.attachment.kind == "toy-logits":
                expected = 0.5 * expected + written.attachment.tensors["shift"]
        assert torch.equal(logits(model), expected)
        texts = [w.attachment.fields["text"] for w in active if w.attachment and w.attachment.kind == "toy-preface"]
        assert model.asked(TEXT) == " ".join([*texts, TEXT])
        kinds = [written.attachment.kind for written in active if written.attachment is not None]
        assert sorted(installed()) == sorted((kind, kinds.count(kind)) for kind in set(kinds))


SIZE = 9
STEPS = st.one_of(
    st.tuples(st.just("apply"), st.integers(0, SIZE - 1)),
    st.tuples(st.just("rebuild"), st.lists(st.integers(0, SIZE - 1), max_size=5)),
    st.tuples(st.just("trial"), st.integers(0, SIZE - 1)),
    st.tuples(st.just("failed trial"), st.integers(0, SIZE - 1)),
    st.tuples(st.just("trials"), st.lists(st.integers(0, SIZE - 1), min_size=2, max_size=3)),
    st.tuples(st.just("refused"), st.integers(0, SIZE - 1)),
    st.tuples(st.just("unedited"), st.none()),
)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=1, max_size=7))
def test_the_state_is_a_function_of_what_is_active(
    models: dict[str, LanguageModel], plugins: Plugins, family: str, steps: list[tuple[str, Any]]
) -> None:
    model = models[family]
    pool = pool_for(model)
    assert len(pool) == SIZE
    expected, edited = Expected(model), in_charge(model, plugins)
    active: list[Written] = []
    try:
        for what, which in steps:
            active = _step(edited, pool, active, what, which)
            expected.check(model, active)
            beside = [written.attachment for written in active if written.attachment is not None]
            assert list(edited.attachments) == beside
    finally:
        edited.rebuild([])
    expected.check(model, [])


def _step(edited: EditedModel, pool: list[Written], active: list[Written], what: str, which: Any) -> list[Written]:
    """Do one thing; what is active after it."""
    if what == "apply":
        edited.apply(pool[which])
        return [*active, pool[which]]
    if what == "rebuild":
        edited.rebuild([pool[index] for index in which])
        return [pool[index] for index in which]
    if what == "trials":
        _nested(edited, [pool[index] for index in which])
    elif what == "trial":
        with edited.trial(pool[which]):
            pass
    elif what == "failed trial":
        with pytest.raises(KeyError), edited.trial(pool[which]):
            raise KeyError
    elif what == "refused":
        refused = Written(changes=pool[which].changes, attachment=shift(0, refuses=True))
        with pytest.raises(ModelError, match="does not fit"):
            edited.apply(refused)
        with pytest.raises(ModelError, match="does not fit"), edited.trial(refused):
            pytest.fail("there is nothing to try")
    else:
        with edited.unedited():
            assert not edited.attachments
    return active


def _nested(edited: EditedModel, trials: list[Written]) -> None:
    if trials:
        with edited.trial(trials[0]):
            _nested(edited, trials[1:])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_trial_the_model_answers_as_after_it(
    models: dict[str, LanguageModel], plugins: Plugins, family: str
) -> None:
    model = copy.deepcopy(models[family])
    edited = in_charge(model, plugins)
    pool = pool_for(model)
    for written in pool:
        edited.rebuild(pool[:1])
        with edited.trial(written):
            tried, asked = logits(model), model.asked(TEXT)
        edited.apply(written)
        assert torch.equal(tried, logits(model))
        assert asked == model.asked(TEXT)


# Weights that are addressed as a whole and in parts


def overlapping(model: LanguageModel) -> tuple[Changes, Changes]:
    name = model.layout.weight_name(0)
    shape = model.as_out_in(name, model.weight(name)).shape
    whole: Changes = {name: DenseDelta(torch.full(tuple(shape), 0.5))}
    part: Changes = {f"{name}[1]": VectorDelta(torch.ones(model.weight(name).shape[1]))}
    return whole, part


@pytest.mark.parametrize("order", ["part first", "whole first"])
def test_a_whole_and_a_part_of_it_are_one_weight(model: LanguageModel, plugins: Plugins, order: str) -> None:
    edited, expected = in_charge(model, plugins), Expected(model)
    whole, part = (Written(changes=changes) for changes in overlapping(model))
    active = [part, whole] if order == "part first" else [whole, part]
    for number, written in enumerate(active, start=1):
        edited.apply(written)
        expected.check(model, active[:number])
    edited.rebuild(active)
    expected.check(model, active)
    for left in active:
        edited.rebuild([left])
        expected.check(model, [left])
        edited.rebuild(active)
    edited.rebuild([])
    expected.check(model, [])


@pytest.mark.parametrize("order", ["part first", "whole first"])
def test_a_trial_of_a_whole_and_a_part_leaves_nothing(model: LanguageModel, plugins: Plugins, order: str) -> None:
    edited, before = in_charge(model, plugins), bits(model)
    whole, part = overlapping(model)
    with edited.trial(Written(changes={**part, **whole} if order == "part first" else {**whole, **part})):
        pass
    assert same(bits(model), before)


# What cannot be put in


@pytest.mark.parametrize(
    ("attachment", "error", "message"),
    [
        (shift(0, refuses=True), ModelError, r"It does not fit\."),
        (shift(0, breaks=True), PluginError, r"The attachment 'toy-logits' cannot be installed: .*no luck"),
        (Attachment(kind="dead-kind"), PluginError, r"The attachment 'dead-kind' cannot be installed: .*no luck"),
        (Attachment(kind="toy-logit"), UnknownNameError, "Unknown attachment 'toy-logit'.* Did you mean 'toy-logits'"),
    ],
)
def test_an_attachment_that_cannot_be_installed_leaves_the_model_as_it_was(
    model: LanguageModel, plugins: Plugins, attachment: Attachment, error: type[EditcoreError], message: str
) -> None:
    edited, expected, pool = in_charge(model, plugins), Expected(model), pool_for(model)
    active = [pool[0], pool[6], pool[7]]  # the second kind, which is installed last, is there already
    edited.rebuild(active)
    broken = Written(changes=pool[1].changes, attachment=attachment)
    with pytest.raises(error, match=message):
        edited.apply(broken)
    expected.check(model, active)
    with pytest.raises(error, match=message), edited.trial(broken):
        pytest.fail("there is nothing to try")
    expected.check(model, active)
    edited.apply(pool[2])
    expected.check(model, [*active, pool[2]])


def test_active_batches_that_cannot_be_installed_leave_the_model_unedited(
    model: LanguageModel, plugins: Plugins
) -> None:
    edited, expected, pool = in_charge(model, plugins), Expected(model), pool_for(model)
    with pytest.raises(ModelError, match=r"It does not fit\."):
        edited.rebuild([Written(changes=pool[0].changes, attachment=shift(0, refuses=True))])
    expected.check(model, [])
    edited.apply(pool[2])
    expected.check(model, [pool[2]])


def test_changes_that_cannot_be_written_leave_the_model_as_it_was(model: LanguageModel, plugins: Plugins) -> None:
    edited, expected, pool = in_charge(model, plugins), Expected(model), pool_for(model)
    edited.apply(pool[0])
    broken = Written(changes={**pool[1].changes, "nowhere.weight": VectorDelta(torch.ones(3))})
    with pytest.raises(ModelError, match=r"has no weight 'nowhere\.weight'"):
        edited.apply(broken)
    expected.check(model, [pool[0]])
    with pytest.raises(ModelError, match="has no weight"), edited.trial(broken):
        pytest.fail("there is nothing to try")
    expected.check(model, [pool[0]])
    edited.apply(pool[2])
    expected.check(model, [pool[0], pool[2]])


# Two kinds


def test_one_object_is_in_charge_of_all_attachments_of_a_kind(model: LanguageModel, plugins: Plugins) -> None:
    edited, pool = in_charge(model, plugins), pool_for(model)
    edited.rebuild([pool[5], pool[7], pool[6], pool[8]])
    assert installed() == [("toy-logits", 2), ("toy-preface", 2)], "in the order of their names"
    assert model.asked("Rome") == "One. Two. Rome"
    edited.rebuild([pool[8], pool[5], pool[7]])
    assert installed() == [("toy-logits", 1), ("toy-preface", 2)]
    assert model.asked("Rome") == "Two. One. Rome"
    edited.rebuild([pool[7]])
    assert installed() == [("toy-preface", 1)]
    edited.rebuild([pool[0]])
    assert (installed(), edited.attachments, model.asked("Rome")) == ([], (), "Rome")


def test_a_kind_that_is_in_is_taken_out_when_the_next_one_fails(model: LanguageModel, plugins: Plugins) -> None:
    edited, expected = in_charge(model, plugins), Expected(model)
    with pytest.raises(ModelError, match="does not fit"):
        edited.rebuild([Written(attachment=shift(0)), Written(attachment=preface("One.", refuses=True))])
    assert installed() == []
    edited.rebuild([])
    expected.check(model, [])


# Prompts


def test_prompts_are_rewritten_where_the_model_is_asked(model: LanguageModel, plugins: Plugins) -> None:
    edited, base = in_charge(model, plugins), copy.deepcopy(model)
    edited.apply(Written(attachment=preface("Well, yes.")))
    asked = f"Well, yes. {TEXT}"
    assert model.generate([TEXT], max_new_tokens=6) == base.generate([asked], max_new_tokens=6)
    [found], [expected] = (
        score_targets(language_model, [text], ["Paris"]) for language_model, text in ((model, TEXT), (base, asked))
    )
    assert found == expected
    assert found != score_targets(base, [TEXT], ["Paris"])[0]
    there = next_token_log_probabilities(model, [TEXT])
    assert torch.equal(there, next_token_log_probabilities(base, [asked]))
    assert kl_divergences(next_token_log_probabilities(base, [TEXT]), there)[0] > 0
    with edited.unedited():
        assert model.generate([TEXT], max_new_tokens=6) == base.generate([TEXT], max_new_tokens=6)
    assert model.asked(TEXT) == asked


def test_prompts_are_as_they_are_where_keys_are_looked_up(model: LanguageModel, plugins: Plugins) -> None:
    edited, before = in_charge(model, plugins), lookup_row(model, FACT)
    edited.apply(Written(attachment=preface("Well, yes.")))
    assert lookup_row(model, FACT) == before
    assert model.read_prompt(TEXT)[0] == before.ids
    assert model.generate([TEXT], max_new_tokens=3, raw=True) == in_charge_of_nothing(model, edited)


def in_charge_of_nothing(model: LanguageModel, edited: EditedModel) -> list[str]:
    """What the model writes on its own."""
    with edited.unedited():
        return model.generate([TEXT], max_new_tokens=3, raw=True)


# Saving


def test_only_what_is_all_in_weights_is_saved(model: LanguageModel, plugins: Plugins, tmp_path: Any) -> None:
    edited, pool = in_charge(model, plugins), pool_for(model)
    edited.rebuild(pool[:5])
    edited.save(tmp_path / "saved")
    assert same(bits(LanguageModel.load(str(tmp_path / "saved"))), bits(model))
    edited.apply(pool[6])
    edited.apply(pool[7])
    with pytest.raises(ModelError) as caught:
        edited.save(tmp_path / "refused")
    assert str(caught.value).startswith(
        "The edits of tiny-llama cannot be saved: they are kept beside the weights (attachment toy-logits and "
        "toy-preface)"
    )
    assert not (tmp_path / "refused").exists()


def test_a_backend_that_writes_no_weights_saves_no_edits(model: LanguageModel, plugins: Plugins, tmp_path: Any) -> None:
    spec = BackendSpec("airy", "nowhere:Airy", summary="Keeps them elsewhere.", writes_weights=False)
    edited, pool = in_charge(model, plugins, spec), pool_for(model)
    edited.save(tmp_path / "unedited")
    edited.apply(pool[0])
    with pytest.raises(ModelError, match="cannot be merged: the backend 'airy' does not keep them in weights"):
        edited.check_all_in_weights("merged")
