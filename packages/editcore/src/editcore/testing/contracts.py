"""The contract suites: what every editor, backend and executor has to keep, as pytest classes to inherit from.

A plugin's conformance test is a subclass with two fixtures::

    class TestRomeContract(EditorContract):
        @pytest.fixture
        def editor_name(self) -> str:
            return "rome"

        @pytest.fixture
        def hparams(self) -> dict[str, object]:
            return {"layer": 1, "kl_weight": 0.0}

A standard test is switched off only by overriding it with ``@pytest.mark.xfail(reason=..., strict=True)``, which shows
in every report and fails as soon as the test passes. Any other override is refused when the class is made.

Models are random and tiny, so the suites say nothing about how well a method edits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from editcore.execution.executors import make_executor
from editcore.interfaces.errors import EditcoreError, HParamsError, RequestError
from editcore.interfaces.protocols import Backend, EditContext, Editor, Executor, Outcome
from editcore.interfaces.specs import BackendSpec, EditorSpec
from editcore.interfaces.values import EditBatch, EditRequest, FactoredDelta, Proposal
from editcore.models import LanguageModel
from editcore.models.tokens import continuation_row
from editcore.models.writing import add_delta
from editcore.plugins.registry import DISABLE_VARIABLE, Plugins, resolve
from editcore.runs.backends import RawBackend, open_backend, save_edited
from editcore.runs.session import EditSession
from editcore.second_moments.statistics import StatisticsStore
from editcore.settings.hparams import HParams, build
from editcore.testing.probe import Errand, Seen, make_runner
from editcore.testing.tiny import tiny_model, tiny_requests

__all__ = ["BackendContract", "EditorContract", "ExecutorContract"]

_HEAVY = ("torch", "transformers", "peft", "pandas", "matplotlib")
_CORPUS_WORDS = 1500
_CORPUS_TOKENS = 1024

Deltas = Mapping[str, FactoredDelta]
MakeModel = Callable[[], LanguageModel]


class _Contract:
    """What all suites share: a fresh tiny model, and the refusal of silent overrides."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, standard in _standard_tests(cls).items():
            if (used := _used(cls, name)) is not standard and not _is_declared_failure(used):
                raise TypeError(
                    f"{cls.__name__} overrides the standard test {name}. Switch it off only in the open: override it "
                    "with @pytest.mark.xfail(reason='why', strict=True) and call super()."
                )
        marks = [mark for base in cls.__mro__ for mark in _marks(vars(base).get("pytestmark", ()))]
        if any(mark.name in {"skip", "skipif", "xfail"} for mark in marks):
            raise TypeError(
                f"{cls.__name__} switches all standard tests off with pytestmark. Switch single ones off: override "
                "them with @pytest.mark.xfail(reason='why', strict=True) and call super()."
            )

    @pytest.fixture
    def registry(self) -> Plugins:
        """The plugins that are installed."""
        return Plugins.load()

    @pytest.fixture
    def corpus(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """A text file behind the second moments, and a cache that no other test sees."""
        monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
        words = " ".join(request.text for request in tiny_requests(80)).split()
        path = tmp_path / "corpus.txt"
        path.write_text(" ".join(random.Random(0).choices(words, k=_CORPUS_WORDS)), encoding="utf-8")
        return str(path)


def _standard_tests(cls: type) -> dict[str, object]:
    return {
        name: test
        for base in cls.__mro__
        if base.__module__ == __name__
        for name, test in vars(base).items()
        if name.startswith("test_")
    }


def _used(cls: type, name: str) -> object:
    """What pytest will find under ``name``, as it was written in the class that gives it."""
    return next(vars(base)[name] for base in cls.__mro__ if name in vars(base))


def _marks(declared: object) -> Sequence[pytest.Mark]:
    """What ``pytestmark`` may be: marks, decorators, or a list of either."""
    several = declared if isinstance(declared, list | tuple) else [declared]
    marks = [one.mark if isinstance(one, pytest.MarkDecorator) else one for one in several]
    return [mark for mark in marks if isinstance(mark, pytest.Mark)]


def _is_declared_failure(override: object) -> bool:
    marks = _marks(getattr(override, "pytestmark", ()))
    return bool(marks) and all(
        mark.name == "xfail" and not mark.args and mark.kwargs.get("reason") and mark.kwargs.get("strict") is True
        for mark in marks
    )


def _imports_nothing_heavy(registry: Plugins, kind: str, name: str, hparams: str | None) -> None:
    """Announce in a new process, which sees what this one sees but for other plugins, and look at its imports."""
    modules = [hparams.partition(":")[0]] if hparams else []
    code = (
        f"import importlib, sys\nfrom editcore import Plugins\nPlugins.load().{kind}({name!r})\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
        f"print(*sorted({set(_HEAVY)!r} & set(sys.modules)))"
    )
    others = [info.name for info in registry.listing() if name not in info.offers.get(f"editcore_{kind}s", ())]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        DISABLE_VARIABLE: ",".join(others),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"announcing failed in a new process:\n{done.stderr}"
    heavy = done.stdout.strip()
    assert not heavy, f"announcing, or importing the hyperparameters, imported {heavy}"


def _survives_json(hparams: type[HParams], values: Mapping[str, object], owner: str) -> None:
    assert issubclass(hparams, HParams), f"{hparams.__name__} is no HParams"
    made = build(hparams, [values], owner=owner)
    again = hparams.model_validate_json(json.dumps(made.model_dump(mode="json")))
    assert again == made, "hyperparameters that went through JSON are others"
    with pytest.raises(HParamsError, match="no_such_setting"):
        build(hparams, [values, {"no_such_setting": 1}], owner=owner)
    with pytest.raises(ValidationError, match="no_such_setting"):
        hparams.model_validate({**made.model_dump(), "no_such_setting": 1})


@dataclass(frozen=True)
class _State:
    """Everything about a model that must not change behind its owner's back."""

    tensors: Mapping[str, Tensor]
    flags: Mapping[str, object]

    @classmethod
    def of(cls, model: LanguageModel) -> _State:
        return cls(
            tensors={name: tensor.detach().clone() for name, tensor in model.hf.state_dict().items()},
            flags={
                **{f"{name}.requires_grad": value.requires_grad for name, value in model.hf.named_parameters()},
                **{f"{name}.grad": value.grad is not None for name, value in model.hf.named_parameters()},
                **{f"{name}.{flag}": value for name, module in _modules(model) for flag, value in _flags(module)},
            },
        )

    def differences(self, other: _State) -> list[str]:
        """Names of what differs, to the bit."""
        flags = {name for name in {*self.flags, *other.flags} if self.flags.get(name) != other.flags.get(name)}
        return [*self.changed_tensors(other), *sorted(flags)]

    def changed_tensors(self, other: _State) -> list[str]:
        """Names of tensors that differ, or that one of the two lacks."""
        both = set(self.tensors) & set(other.tensors)
        changed = {name for name in both if not _same_bits(self.tensors[name], other.tensors[name])}
        return sorted(changed | (set(self.tensors) ^ set(other.tensors)))


def _modules(model: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name or "model", module) for name, module in model.hf.named_modules())


def _flags(module: nn.Module) -> Iterator[tuple[str, object]]:
    yield "training", module.training
    yield "hooks", len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
    yield "replaced forward", "forward" in vars(module)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(*(part.contiguous().reshape(-1).view(torch.uint8) for part in (first, second)))


@torch.inference_mode()
def _logits(model: LanguageModel) -> Tensor:
    """Logits of a few texts, ``[texts, seq, vocab]``."""
    encoded = model.encode([request.text for request in tiny_requests(4)])
    logits: Tensor = model.hf(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    return logits * encoded.attention_mask[..., None]


class _InjectedFailure(Exception):  # noqa: N818  stands for any failure
    """Raised inside a forward pass, to see what an editor leaves behind."""


@contextlib.contextmanager
def _counting_passes(model: LanguageModel, *, fail_at: int | None = None) -> Iterator[list[int]]:
    """Counts forward passes; the one of number ``fail_at`` raises."""
    passes: list[int] = []

    def on_embedding(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        passes.append(len(passes))
        if passes[-1] == fail_at:
            raise _InjectedFailure

    handle = model.hf.get_input_embeddings().register_forward_hook(on_embedding)
    try:
        yield passes
    finally:
        handle.remove()


class EditorContract(_Contract):
    """What every editor keeps. Give ``editor_name`` and ``hparams``; override ``make_model`` for another model."""

    @pytest.fixture
    def editor_name(self) -> str:
        """The name under which the editor is announced."""
        raise NotImplementedError("give the fixture editor_name")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        """Hyperparameters for a model of three blocks, as a preset would hold them; small numbers keep tests fast."""
        raise NotImplementedError("give the fixture hparams")

    @pytest.fixture
    def make_model(self) -> MakeModel:
        """Makes the same new model each time."""
        return tiny_model

    @pytest.fixture
    def requests_to_edit(self) -> tuple[EditRequest, ...]:
        """Facts that do not contradict each other, more than one batch of two."""
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
        self, spec: EditorSpec, hparams: dict[str, object], corpus: str, make_model: MakeModel
    ) -> Callable[[], _Prepared]:
        """Makes a new model and an editor that has seen it."""

        def make() -> _Prepared:
            model = make_model()
            editor: Editor = resolve(spec.target)(build(resolve(spec.hparams), [hparams], owner=spec.name))
            context = EditContext(statistics=StatisticsStore(model, corpus=corpus, tokens=_CORPUS_TOKENS), seed=0)
            json.dumps(editor.prepare(model, context))  # goes into the run's record
            return _Prepared(model, editor, context)

        return make

    @pytest.fixture
    def open_session(
        self, registry: Plugins, editor_name: str, hparams: dict[str, object], corpus: str, make_model: MakeModel
    ) -> Callable[[], EditSession]:
        """Opens a session of the editor on a new model."""
        return lambda: EditSession.open(
            make_model(),
            editor=editor_name,
            settings={editor_name: hparams},
            corpus=corpus,
            corpus_tokens=_CORPUS_TOKENS,
            registry=registry,
        )

    def test_is_announced(self, registry: Plugins, editor_name: str) -> None:
        """The name is registered, its class and its hyperparameters can be imported."""
        spec = registry.editor(editor_name)
        assert spec.name == editor_name
        assert spec.summary
        assert all(callable(getattr(resolve(spec.target), method, None)) for method in ("prepare", "propose"))

    def test_announcement_imports_no_torch(self, registry: Plugins, spec: EditorSpec) -> None:
        """Listing editors and describing this one stays fast."""
        _imports_nothing_heavy(registry, "editor", spec.name, spec.hparams)

    def test_hparams_survive_json_and_refuse_unknown_names(self, spec: EditorSpec, hparams: dict[str, object]) -> None:
        """What a run records can be read back, and a misspelt setting is not ignored."""
        _survives_json(resolve(spec.hparams), hparams, spec.name)

    def test_propose_leaves_the_model_unchanged(self, prepared: Callable[[], _Prepared], batch: EditBatch) -> None:
        """Applying is the backend's work: weights, flags and hooks are as before, to the bit."""
        made = prepared()
        before = _State.of(made.model)
        made.propose(batch)
        assert not before.differences(_State.of(made.model)), "the model changed while a batch was proposed"

    def test_a_failed_propose_leaves_the_model_unchanged(
        self, prepared: Callable[[], _Prepared], batch: EditBatch
    ) -> None:
        """So it is when a forward pass fails: the first, one in the middle, the last."""
        made = prepared()
        with _counting_passes(made.model) as passes:
            made.propose(batch)
        for fail_at in sorted({0, len(passes) // 2, len(passes) - 1} & set(passes)):
            made = prepared()
            before = _State.of(made.model)
            with (
                _counting_passes(made.model, fail_at=fail_at),
                contextlib.suppress(_InjectedFailure, EditcoreError),
            ):
                made.propose(batch)
            assert not before.differences(_State.of(made.model)), (
                f"the model stayed changed when forward pass {fail_at + 1} of {len(passes)} failed"
            )

    def test_a_proposal_is_complete(self, prepared: Callable[[], _Prepared], batch: EditBatch) -> None:
        """Deltas fit the weights they name and are finite; every fact has its evidence, its key and its value."""
        made = prepared()
        proposal = made.propose(batch)
        assert proposal.deltas, "the proposal changes no weight"
        for name, delta in proposal.deltas.items():
            shape = made.model.as_out_in(name, made.model.weight(name)).shape
            assert (delta.left.shape[0], delta.right.shape[1]) == shape, f"the delta of {name} does not fit {shape}"
            for factor in (delta.left, delta.right):
                assert factor.dtype in {torch.float32, torch.float64}
                assert torch.isfinite(factor).all(), f"the delta of {name} holds NaN or Inf"
        ids = [request.id for request in batch.requests]
        assert [evidence.request_id for evidence in proposal.evidence] == ids
        assert set(proposal.known) == set(ids)
        for known in proposal.known.values():
            assert set(known.keys) == set(known.values) == set(proposal.deltas)

    def test_deltas_can_be_applied_and_taken_back(self, prepared: Callable[[], _Prepared], batch: EditBatch) -> None:
        """Applying twice gives the same bits, and taking back gives the first ones."""
        made = prepared()
        deltas = made.propose(batch).deltas
        base = _State.of(made.model)
        backend = RawBackend()
        backend.open(made.model)
        backend.apply(deltas)
        applied = _State.of(made.model)
        backend.rebuild([])
        assert not base.differences(_State.of(made.model)), "the base weights did not come back"
        backend.apply(deltas)
        backend.rebuild([deltas])
        assert not applied.differences(_State.of(made.model)), "the deltas changed when they were applied"

    def test_other_weights_stay_as_they_are(
        self, open_session: Callable[[], EditSession], make_model: MakeModel, batch: EditBatch
    ) -> None:
        """From the unedited model to the edited one, only weights that the deltas name differ."""
        base = _State.of(make_model())
        session = open_session()
        [result] = session.edit(batch.requests)
        changed = set(base.changed_tensors(_State.of(session.model)))
        assert changed <= set(result.proposal.deltas), "weights changed that the proposal does not name"

    def test_the_same_seed_gives_the_same_bits(self, prepared: Callable[[], _Prepared], batch: EditBatch) -> None:
        """Two new models, two new editors, one answer."""
        first, second = (prepared().propose(batch).deltas for _ in range(2))
        assert set(first) == set(second)
        for name, delta in first.items():
            assert _same_bits(delta.left, second[name].left), f"left factor of {name}"
            assert _same_bits(delta.right, second[name].right), f"right factor of {name}"

    def test_the_target_becomes_likelier(self, prepared: Callable[[], _Prepared], batch: EditBatch) -> None:
        """In the geometric mean over the batch: on a random model one fact may lose by what another one gains."""
        made = prepared()
        before = [_target_log_probability(made.model, request) for request in batch.requests]
        backend = RawBackend()
        backend.open(made.model)
        backend.apply(made.propose(batch).deltas)
        after = [_target_log_probability(made.model, request) for request in batch.requests]
        assert sum(after) > sum(before), f"log p of the targets was {before}, is {after}"

    def test_a_long_list_is_edited_in_batches_that_it_takes(
        self,
        spec: EditorSpec,
        open_session: Callable[[], EditSession],
        requests_to_edit: tuple[EditRequest, ...],
    ) -> None:
        """The session never hands over more than ``max_batch``, and the editor takes as many as it says."""
        results = open_session().edit(requests_to_edit)
        sizes = [len(result.batch) for result in results]
        assert sum(sizes) == len(requests_to_edit)
        assert max(sizes) <= (spec.capabilities.max_batch or len(requests_to_edit))
        assert all(result.applied for result in results)

    def test_an_empty_batch_is_refused(
        self, prepared: Callable[[], _Prepared], open_session: Callable[[], EditSession]
    ) -> None:
        """By the session and by the editor, with an error that a user can read."""
        with pytest.raises(RequestError, match="empty"):
            open_session().edit([])
        with pytest.raises(EditcoreError):
            prepared().propose(EditBatch.of(()))


@dataclass(frozen=True)
class _Prepared:
    """A model, and an editor that has looked at it."""

    model: LanguageModel
    editor: Editor
    context: EditContext

    def propose(self, batch: EditBatch) -> Proposal:
        return self.editor.propose(self.model, batch, self.context)


@torch.inference_mode()
def _target_log_probability(model: LanguageModel, request: EditRequest) -> float:
    row = continuation_row(model, request)
    logits = model.hf(input_ids=torch.tensor([row.ids], device=model.device)).logits[0]  # [seq, vocab]
    log_p = logits[row.target_start - 1 : -1].double().log_softmax(-1)  # [targets, vocab]
    return float(log_p[range(len(row.targets)), row.targets].sum())


class BackendContract(_Contract):
    """What every backend keeps. Give ``backend_name``; ``hparams`` where it has any that are required."""

    effect_tolerance: ClassVar[float] = 1e-6
    """Largest difference of logits from those of the raw weight change, in units of that change's largest effect. The
    model is float64; a backend that computes in float32 sets 1e-3."""

    @pytest.fixture
    def backend_name(self) -> str:
        """The name under which the backend is announced."""
        raise NotImplementedError("give the fixture backend_name")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        """Hyperparameters of the backend."""
        return {}

    @pytest.fixture(params=["llama", "gpt2"])
    def make_model(self, request: pytest.FixtureRequest) -> MakeModel:
        """Makes the same new model each time: one that stores (out, in), one that stores (in, out).

        In float64, where sums in another order show.
        """
        return lambda: tiny_model(request.param, dtype=torch.float64)

    @pytest.fixture
    def spec(self, registry: Plugins, backend_name: str) -> BackendSpec:
        """The announcement."""
        return registry.backend(backend_name)

    @pytest.fixture
    def opened(
        self, spec: BackendSpec, hparams: dict[str, object], make_model: MakeModel, corpus: str
    ) -> Callable[[], _Opened]:
        """Makes a new model and a backend that is in charge of it."""
        return lambda: _Opened.make(make_model(), _backend(spec, hparams), corpus)

    @pytest.fixture
    def batches(self, make_model: MakeModel) -> tuple[Deltas, Deltas, Deltas]:
        """Three batches of deltas of several ranks: two overlap in a weight, one touches two weights."""
        model = make_model()
        generator = torch.Generator().manual_seed(0)

        def delta(layer: int, rank: int) -> dict[str, FactoredDelta]:
            name = model.layout.weight_name(layer)
            d_out, d_in = model.as_out_in(name, model.weight(name)).shape
            left = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
            right = torch.randn(rank, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
            return {name: FactoredDelta(left, right)}

        return delta(0, 1), delta(0, 2) | delta(1, 3), delta(1, 1)

    def test_is_announced(self, registry: Plugins, backend_name: str) -> None:
        """The name is registered and its class can be imported."""
        spec = registry.backend(backend_name)
        assert spec.name == backend_name
        assert spec.summary
        assert all(callable(getattr(resolve(spec.target), method, None)) for method in ("open", "apply", "rebuild"))

    def test_announcement_imports_no_torch(self, registry: Plugins, spec: BackendSpec) -> None:
        """Listing backends and describing this one stays fast."""
        _imports_nothing_heavy(registry, "backend", spec.name, spec.hparams)

    def test_hparams_survive_json_and_refuse_unknown_names(self, spec: BackendSpec, hparams: dict[str, object]) -> None:
        """What a run records can be read back, and a misspelt setting is not ignored."""
        if spec.hparams is not None:
            _survives_json(resolve(spec.hparams), hparams, spec.name)

    def test_opening_changes_nothing(
        self, make_model: MakeModel, spec: BackendSpec, hparams: dict[str, object], corpus: str
    ) -> None:
        """Weights and logits are those of the model that was handed over, to the bit."""
        model = make_model()
        before = _Seen.of(model, [name for name, _ in model.hf.named_parameters()])
        _Opened.make(model, _backend(spec, hparams), corpus)
        assert not before.differences(model)

    def test_the_effect_is_that_of_the_weight_change(
        self, make_model: MakeModel, opened: Callable[[], _Opened], batches: tuple[Deltas, Deltas, Deltas]
    ) -> None:
        """Batch upon batch, the logits are those of ``W + Σ left @ right``."""
        reference = make_model()
        base = _logits(reference)
        made = opened()
        for deltas in batches:
            made.backend.apply(deltas)
            for name, delta in deltas.items():
                add_delta(reference, name, [delta])
            expected = _logits(reference)
            off = self._off(_logits(made.model), expected, base)
            assert off <= self.effect_tolerance, f"logits are off by {off:.1e} of the largest effect"

    @staticmethod
    def _off(found: Tensor, expected: Tensor, base: Tensor) -> float:
        """Largest difference of logits, in units of the largest effect of the edits."""
        return float((found - expected).abs().max() / (expected - base).abs().max())

    def test_other_weights_stay_as_they_are(
        self, opened: Callable[[], _Opened], batches: tuple[Deltas, Deltas, Deltas]
    ) -> None:
        """Only weights that the deltas name may differ from the base."""
        made = opened()
        before = made.see()
        made.apply(batches)
        assert set(before.changed_weights(made.model)) <= {name for deltas in batches for name in deltas}

    def test_the_base_comes_back_to_the_bit(
        self, opened: Callable[[], _Opened], batches: tuple[Deltas, Deltas, Deltas]
    ) -> None:
        """``rebuild([])`` after any history."""
        made = opened()
        before = made.see()
        made.apply(batches)
        made.backend.rebuild([])
        assert not before.differences(made.model)
        made.backend.rebuild([batches[1], batches[0]])
        made.backend.apply(batches[2])
        made.backend.rebuild([])
        assert not before.differences(made.model)

    def test_rebuilding_is_a_fresh_start(
        self, opened: Callable[[], _Opened], batches: tuple[Deltas, Deltas, Deltas]
    ) -> None:
        """``rebuild(s)`` gives the bits of opening anew and applying each of ``s``, whatever was active before."""
        a, b, c = batches
        histories: list[tuple[Sequence[Deltas], Sequence[Deltas]]] = [
            ([], [a, b, c]),  # a run that is resumed
            ([a, b, c], [a, b, c]),  # nothing left out
            ([a, b, c], [a, c]),  # the middle one taken back
            ([a], [b, c]),
        ]
        for history, active in histories:
            made, fresh = opened().apply(history), opened().apply(active)
            made.backend.rebuild(active)
            assert not fresh.see().differences(made.model), f"{len(active)} active after {len(history)} batches"

    def test_order_is_kept(self, opened: Callable[[], _Opened], batches: tuple[Deltas, Deltas, Deltas]) -> None:
        """Sums are made in the order of the batches, and what is applied after a rebuild comes behind it."""
        a, b, c = batches
        made = opened()
        made.backend.rebuild([c, b, a])
        assert not opened().apply([c, b, a]).see().differences(made.model)
        made.backend.rebuild([b])
        made.backend.apply(a)
        assert not opened().apply([b, a]).see().differences(made.model)

    def test_saving_leaves_the_model_as_it_is(
        self, opened: Callable[[], _Opened], batches: tuple[Deltas, Deltas, Deltas], tmp_path: Path
    ) -> None:
        """Weights and logits, to the bit; and the next batch finds what it would have found."""
        a, b, c = batches
        made = opened().apply([a, b])
        before = made.see()
        save_edited(made.model, made.backend, tmp_path / "saved")
        assert not before.differences(made.model), "saving changed the model"
        made.backend.apply(c)
        assert not opened().apply([a, b, c]).see().differences(made.model), "saving changed what comes after it"

    def test_what_was_saved_loads_as_the_edited_model(
        self,
        make_model: MakeModel,
        opened: Callable[[], _Opened],
        batches: tuple[Deltas, Deltas, Deltas],
        tmp_path: Path,
    ) -> None:
        """``from_pretrained`` needs nothing of the backend: the names are those of the base, the edits are in it."""
        base = make_model()
        made = opened().apply(batches)
        save_edited(made.model, made.backend, tmp_path / "saved")
        loaded = LanguageModel.load(str(tmp_path / "saved"), dtype=str(base.dtype).removeprefix("torch."))
        off = self._off(_logits(loaded), _logits(made.model), _logits(base))
        assert off <= self.effect_tolerance, f"the saved model's logits are off by {off:.1e} of the largest effect"


def _backend(spec: BackendSpec, hparams: Mapping[str, object]) -> Backend:
    made: Any = resolve(spec.target)
    if spec.hparams is None:
        assert not hparams, f"{spec.name} announces no hyperparameters, but the test gives some"
        backend: Backend = made()
    else:
        backend = made(build(resolve(spec.hparams), [hparams], owner=spec.name))
    return backend


@dataclass(frozen=True)
class _Opened:
    """A model, the backend in charge of it, and the names that its weights had before."""

    model: LanguageModel
    backend: Backend
    names: Sequence[str]

    @classmethod
    def make(cls, model: LanguageModel, backend: Backend, corpus: str) -> _Opened:
        names = [name for name, _ in model.hf.named_parameters()]
        store = functools.partial(StatisticsStore, model, corpus=corpus, tokens=_CORPUS_TOKENS)
        open_backend(backend, model, statistics=store)
        return cls(model, backend, names)

    def apply(self, batches: Sequence[Deltas]) -> _Opened:
        for deltas in batches:
            self.backend.apply(deltas)
        return self

    def see(self) -> _Seen:
        return _Seen.of(self.model, self.names)


@dataclass(frozen=True)
class _Seen:
    """Weights under the names they had before any backend, and logits: what holds for every kind of backend.

    A state dict would not do, because a backend may wrap modules and so rename what they hold.
    """

    weights: Mapping[str, Tensor]
    logits: Tensor

    @classmethod
    def of(cls, model: LanguageModel, names: Iterable[str]) -> _Seen:
        return cls({name: model.weight(name).detach().clone() for name in names}, _logits(model))

    def changed_weights(self, model: LanguageModel) -> list[str]:
        return [name for name, weight in self.weights.items() if not _same_bits(weight, model.weight(name))]

    def differences(self, model: LanguageModel) -> list[str]:
        logits = [] if _same_bits(self.logits, _logits(model)) else ["logits"]
        return [*self.changed_weights(model), *logits]


class ExecutorContract(_Contract):
    """What every executor keeps. Give ``executor_name``; ``hparams`` for two workers and one retry or more.

    Workers must run on this machine here, whatever they do elsewhere: they are killed and looked for.
    """

    @pytest.fixture
    def executor_name(self) -> str:
        """The name under which the executor is announced."""
        raise NotImplementedError("give the fixture executor_name")

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        """Hyperparameters of the executor."""
        return {}

    @pytest.fixture
    def executor(self, registry: Plugins, executor_name: str, hparams: dict[str, object]) -> Iterator[Executor]:
        """One that is closed when the test is over."""
        made = make_executor(registry, executor_name, hparams)
        try:
            yield made
        finally:
            made.close()

    def test_is_announced(self, registry: Plugins, executor_name: str) -> None:
        """The name is registered and its class can be imported."""
        spec = registry.executor(executor_name)
        assert spec.name == executor_name
        assert spec.summary
        target = resolve(spec.target)
        assert all(callable(getattr(target, method, None)) for method in ("map", "close"))
        assert isinstance(target.shares_files, bool)

    def test_announcement_imports_no_torch(self, registry: Plugins, executor_name: str) -> None:
        """Listing executors stays fast."""
        spec = registry.executor(executor_name)
        _imports_nothing_heavy(registry, "executor", spec.name, spec.hparams)

    def test_hparams_survive_json_and_refuse_unknown_names(
        self, registry: Plugins, executor_name: str, hparams: dict[str, object]
    ) -> None:
        """A misspelt setting is not ignored."""
        spec = registry.executor(executor_name)
        if spec.hparams is not None:
            _survives_json(resolve(spec.hparams), hparams, spec.name)

    def test_nothing_comes_of_nothing(self, executor: Executor) -> None:
        """No items, no outcomes."""
        assert _outcomes(executor, []) == ({}, [])

    def test_every_item_has_one_outcome_whatever_happens_to_others(self, executor: Executor, tmp_path: Path) -> None:
        """Exceptions are outcomes, tried once; a lost worker costs its item another attempt, and no other anything."""
        what = ["square", "refuse", "square", "stumble", "die once", "square", "square", "square"]
        items = [Errand(number=number, what=one, folder=tmp_path) for number, one in enumerate(what)]  # type: ignore[arg-type]
        outcomes, started = _outcomes(executor, items)
        assert sorted(outcomes) == list(range(len(items)))
        returned = {index: outcome.value.square for index, outcome in outcomes.items() if outcome.value is not None}
        assert returned == {index: index**2 for index in (0, 2, 4, 5, 6, 7)}
        assert [outcomes[index].kind for index in (0, 1, 3)] == ["", "HParamsError", "ZeroDivisionError"]
        assert outcomes[1].error == "1 is refused."
        assert outcomes[1].traceback == ""
        assert "3 stumbles" in outcomes[3].error
        assert "3 stumbles" in outcomes[3].traceback
        attempts = {index: outcome.attempts for index, outcome in outcomes.items()}
        assert attempts == {**dict.fromkeys(range(len(items)), 1), 4: 2}
        assert sorted(started) == sorted([*range(len(items)), 4])

    def test_a_worker_keeps_what_it_made(self, executor: Executor) -> None:
        """The function is made once in each worker, and called with one item after the other."""
        outcomes, _ = _outcomes(executor, [Errand(number=number) for number in range(9)])
        calls: dict[int, list[int]] = {}
        for outcome in outcomes.values():
            assert outcome.value is not None
            calls.setdefault(outcome.value.process, []).append(outcome.value.call)
        assert os.getpid() not in calls
        assert all(sorted(numbers) == list(range(1, len(numbers) + 1)) for numbers in calls.values())

    def test_an_item_that_kills_every_worker_is_given_up(self, executor: Executor) -> None:
        """With a reason; the others are done."""
        outcomes, started = _outcomes(executor, [Errand(number=0, what="die"), Errand(number=1), Errand(number=2)])
        assert (outcomes[0].kind, outcomes[0].value) == ("WorkerLost", None)
        assert "lost" in outcomes[0].error
        assert outcomes[0].attempts == started.count(0) > 1
        assert all(outcomes[index].value is not None for index in (1, 2))

    def test_who_stops_asking_stops_the_workers(self, executor: Executor, tmp_path: Path) -> None:
        """Nothing goes on behind the back of a caller that was interrupted."""
        items = [Errand(number=0, what="sleep", folder=tmp_path), Errand(number=1), Errand(number=2)]
        outcomes = executor.map(make_runner, items, started=lambda _index: None)
        assert next(outcomes).index != 0
        word = tmp_path / "0-sleep"
        assert _soon(lambda: word.exists() and bool(word.read_text()))
        outcomes.close()  # type: ignore[attr-defined]
        executor.close()
        assert _soon(lambda: not _runs(int(word.read_text())))


def _outcomes(executor: Executor, items: Sequence[Errand]) -> tuple[dict[int, Outcome[Seen]], list[int]]:
    started: list[int] = []
    outcomes = list(executor.map(make_runner, items, started=started.append))
    assert len({outcome.index for outcome in outcomes}) == len(outcomes), "an item has two outcomes"
    return {outcome.index: outcome for outcome in outcomes}, started


def _soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true before long; no statement about how fast."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
