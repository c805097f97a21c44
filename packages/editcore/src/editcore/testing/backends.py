"""The contract suite of backends."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from editcore.interfaces.changes import Changes, DenseDelta, FactoredDelta, VectorDelta, WeightChange
from editcore.interfaces.protocols import Backend
from editcore.interfaces.specs import BackendSpec
from editcore.models import LanguageModel
from editcore.models.edited import EditedModel
from editcore.models.options import LoadOptions
from editcore.models.writing import add_changes
from editcore.plugins.calls import resolve
from editcore.plugins.registry import Plugins
from editcore.runs.backends import open_backend
from editcore.second_moments.statistics import CorpusOptions, StatisticsStore
from editcore.settings.hparams import build
from editcore.testing.contract import (
    CORPUS_TOKENS,
    Contract,
    InjectedFailure,
    MakeModel,
    imports_nothing_heavy,
    logits_of,
    same_bits,
    survives_json,
)
from editcore.testing.tiny import tiny_model

__all__ = ["BackendContract"]


class BackendContract(Contract):
    """The contract of every backend. Give ``backend_name``, and ``hparams`` if some are required."""

    effect_tolerance: ClassVar[float] = 1e-6
    """Largest allowed difference of logits from those of the plain weight change, in units of that change's largest
    effect. The model is float64; a backend that computes in float32 sets 1e-3."""

    @pytest.fixture
    def backend_name(self) -> str:
        """The name under which the backend is announced."""
        raise NotImplementedError("give the fixture backend_name")

    @pytest.fixture(params=["llama", "gpt2"])
    def make_model(self, request: pytest.FixtureRequest) -> MakeModel:
        """Makes the same new model each time. One parameter stores weights as (out, in), the other as (in, out).

        It is in float64, in which another order of sums shows.
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
        """Makes a new model and a backend that has opened it."""
        return lambda: _Opened.make(make_model(), _backend(spec, hparams), corpus)

    @pytest.fixture
    def batches(self, make_model: MakeModel) -> tuple[Changes, Changes, Changes]:
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

    @pytest.fixture
    def every_kind(self, make_model: MakeModel, spec: BackendSpec) -> Changes:
        """One change of each kind that the backend takes, of matrices and a vector of block 0."""
        model = make_model()
        generator = torch.Generator().manual_seed(1)
        matrices = [name for name in model.weights.names() if ".0." in name and model.weight(name).ndim == 2]
        vectors = [name for name in model.weights.names() if ".0." in name and model.weight(name).ndim == 1]

        def random_like(name: str) -> Tensor:
            shape = model.as_out_in(name, model.weight(name)).shape
            return 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)

        made: dict[str, WeightChange] = {}
        if "dense" in spec.takes:
            made[matrices[0]] = DenseDelta(random_like(matrices[0]))
        if "factored" in spec.takes:
            whole = random_like(matrices[1])
            made[matrices[1]] = FactoredDelta(whole[:, :2].clone(), whole[:2].clone())
        if "vector" in spec.takes:
            made[vectors[0]] = VectorDelta(random_like(vectors[0]))
        return made

    def test_is_announced(self, registry: Plugins, backend_name: str) -> None:
        """The name is registered and its class can be imported."""
        spec = registry.backend(backend_name)
        assert spec.name == backend_name
        assert spec.summary
        methods = ("open", "apply", "rebuild", "trial")
        assert all(callable(getattr(resolve(spec.target), method, None)) for method in methods)

    def test_announcement_imports_no_torch(self, registry: Plugins, spec: BackendSpec) -> None:
        """Listing backends and describing this one stays fast."""
        imports_nothing_heavy(registry, "backend", spec.name, spec.hparams)

    def test_hparams_survive_json_and_refuse_unknown_names(self, spec: BackendSpec, hparams: dict[str, object]) -> None:
        """What a run records can be read back, and a misspelt setting is not ignored."""
        if spec.hparams is not None:
            survives_json(resolve(spec.hparams), hparams, spec.name)

    def test_opening_changes_nothing(
        self, make_model: MakeModel, spec: BackendSpec, hparams: dict[str, object], corpus: str
    ) -> None:
        """Weights and logits are those of the model that was handed over, to the bit."""
        model = make_model()
        before = _Snapshot.of(model, model.weights.names())
        _Opened.make(model, _backend(spec, hparams), corpus)
        assert not before.differences(model)

    def test_the_effect_is_that_of_the_weight_change(
        self, make_model: MakeModel, opened: Callable[[], _Opened], batches: tuple[Changes, Changes, Changes]
    ) -> None:
        """After each batch, the logits are those of ``W + Σ left @ right``."""
        reference = make_model()
        base = logits_of(reference)
        made = opened()
        for deltas in batches:
            made.backend.apply(deltas)
            for name, delta in deltas.items():
                add_changes(reference, name, [delta])
            expected = logits_of(reference)
            off = self._off(logits_of(made.model), expected, base)
            assert off <= self.effect_tolerance, f"logits are off by {off:.1e} of the largest effect"

    def test_every_kind_that_it_takes_has_its_effect(
        self, make_model: MakeModel, opened: Callable[[], _Opened], spec: BackendSpec, every_kind: Changes
    ) -> None:
        """Factored, dense and vector changes of any weight have their effect, and leave nothing behind."""
        assert {change.kind for change in every_kind.values()} == spec.takes - {"attachment"}
        reference = make_model()
        base = logits_of(reference)
        for address, change in every_kind.items():
            add_changes(reference, address, [change])
        made = opened()
        before = made.snapshot()
        made.backend.apply(every_kind)
        off = self._off(logits_of(made.model), logits_of(reference), base)
        assert off <= self.effect_tolerance, f"logits are off by {off:.1e} of the largest effect"
        made.backend.rebuild([])
        assert not before.differences(made.model)

    def test_a_trial_is_the_state_after_it_and_leaves_nothing(
        self, opened: Callable[[], _Opened], batches: tuple[Changes, Changes, Changes]
    ) -> None:
        """Inside, the model answers as after ``apply``. The bits are restored however the block ends."""
        a, b, c = batches
        made, applied = opened().apply([a]), opened().apply([a, b])
        before = made.snapshot()
        base = logits_of(opened().model)
        with contextlib.suppress(InjectedFailure), made.backend.trial(b):
            off = self._off(logits_of(made.model), logits_of(applied.model), base)
            assert off <= self.effect_tolerance, f"logits are off by {off:.1e} of the largest effect"
            raise InjectedFailure
        assert not before.differences(made.model), "a trial that failed left something"
        with made.backend.trial(b), made.backend.trial(c):
            pass
        assert not before.differences(made.model), "a trial left something"
        made.backend.apply(b)
        assert not applied.snapshot().differences(made.model), "a trial changed what comes after it"

    def test_a_trial_in_bfloat16_is_rounded_as_what_is_applied(
        self,
        make_model: MakeModel,
        spec: BackendSpec,
        hparams: dict[str, object],
        batches: tuple[Changes, Changes, Changes],
        corpus: str,
    ) -> None:
        """After other batches, weights and answers on trial are those after ``apply``, to the bit, so what is measured
        is what will be written."""
        a, b, c = batches
        model = make_model()
        model.hf.to(torch.bfloat16)
        made = _Opened.make(model, _backend(spec, hparams), corpus).apply([a, b])
        with made.backend.trial(c):
            tried = made.snapshot()
        made.backend.apply(c)
        assert not tried.differences(made.model), "what was on trial is not what was applied"

    @staticmethod
    def _off(found: Tensor, expected: Tensor, base: Tensor) -> float:
        """Largest difference of logits, in units of the largest effect of the edits."""
        return float((found - expected).abs().max() / (expected - base).abs().max())

    def test_other_weights_stay_as_they_are(
        self, opened: Callable[[], _Opened], batches: tuple[Changes, Changes, Changes]
    ) -> None:
        """Only weights that the deltas name may differ from the base."""
        made = opened()
        before = made.snapshot()
        made.apply(batches)
        assert set(before.changed_weights(made.model)) <= {name for deltas in batches for name in deltas}

    def test_the_base_comes_back_to_the_bit(
        self, opened: Callable[[], _Opened], batches: tuple[Changes, Changes, Changes]
    ) -> None:
        """``rebuild([])`` restores the base after any history."""
        made = opened()
        before = made.snapshot()
        made.apply(batches)
        made.backend.rebuild([])
        assert not before.differences(made.model)
        made.backend.rebuild([batches[1], batches[0]])
        made.backend.apply(batches[2])
        made.backend.rebuild([])
        assert not before.differences(made.model)

    def test_rebuilding_is_a_fresh_start(
        self, opened: Callable[[], _Opened], batches: tuple[Changes, Changes, Changes]
    ) -> None:
        """``rebuild(s)`` gives the bits of opening anew and applying each of ``s``, whatever was active before."""
        a, b, c = batches
        histories: list[tuple[Sequence[Changes], Sequence[Changes]]] = [
            ([], [a, b, c]),  # a run that is resumed
            ([a, b, c], [a, b, c]),  # nothing left out
            ([a, b, c], [a, c]),  # the middle one taken back
            ([a], [b, c]),
        ]
        for history, active in histories:
            made, fresh = opened().apply(history), opened().apply(active)
            made.backend.rebuild(active)
            assert not fresh.snapshot().differences(made.model), f"{len(active)} active after {len(history)} batches"

    def test_order_is_kept(self, opened: Callable[[], _Opened], batches: tuple[Changes, Changes, Changes]) -> None:
        """Sums are made in the order of the batches. What is applied after a rebuild is added last."""
        a, b, c = batches
        made = opened()
        made.backend.rebuild([c, b, a])
        assert not opened().apply([c, b, a]).snapshot().differences(made.model)
        made.backend.rebuild([b])
        made.backend.apply(a)
        assert not opened().apply([b, a]).snapshot().differences(made.model)

    def test_saving_leaves_the_model_as_it_is(
        self,
        registry: Plugins,
        spec: BackendSpec,
        opened: Callable[[], _Opened],
        batches: tuple[Changes, Changes, Changes],
        tmp_path: Path,
    ) -> None:
        """Weights and logits stay, to the bit, and the next batch has the same result as without saving."""
        a, b, c = batches
        made = opened().apply([a, b])
        before = made.snapshot()
        made.edited(registry, spec).save(tmp_path / "saved")
        assert not before.differences(made.model), "saving changed the model"
        made.backend.apply(c)
        assert not opened().apply([a, b, c]).snapshot().differences(made.model), "saving changed what comes after it"

    def test_what_was_saved_loads_as_the_edited_model(
        self,
        registry: Plugins,
        spec: BackendSpec,
        make_model: MakeModel,
        opened: Callable[[], _Opened],
        batches: tuple[Changes, Changes, Changes],
        tmp_path: Path,
    ) -> None:
        """``from_pretrained`` loads it without the backend: names are those of the base, and the edits are in the
        weights."""
        base = make_model()
        made = opened().apply(batches)
        made.edited(registry, spec).save(tmp_path / "saved")
        loaded = LanguageModel.load(str(tmp_path / "saved"), LoadOptions(dtype=str(base.dtype).removeprefix("torch.")))
        off = self._off(logits_of(loaded), logits_of(made.model), logits_of(base))
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
    """A model, the backend that has opened it, and the names that its weights had before."""

    model: LanguageModel
    backend: Backend
    names: Sequence[str]

    @classmethod
    def make(cls, model: LanguageModel, backend: Backend, corpus: str) -> _Opened:
        names = list(model.weights.names())
        store = functools.partial(StatisticsStore, model, CorpusOptions(name=corpus, tokens=CORPUS_TOKENS))
        open_backend(backend, model, statistics=store)
        return cls(model, backend, names)

    def apply(self, batches: Sequence[Changes]) -> _Opened:
        for deltas in batches:
            self.backend.apply(deltas)
        return self

    def snapshot(self) -> _Snapshot:
        return _Snapshot.of(self.model, self.names)

    def edited(self, registry: Plugins, spec: BackendSpec) -> EditedModel:
        return EditedModel(self.model, self.backend, spec=spec, plugins=registry)


@dataclass(frozen=True)
class _Snapshot:
    """Weights, under the names that they had before any backend, and logits.

    A state dict would not do, because a backend may wrap modules and so rename what they hold.
    """

    weights: Mapping[str, Tensor]
    logits: Tensor

    @classmethod
    def of(cls, model: LanguageModel, names: Iterable[str]) -> _Snapshot:
        return cls({name: model.weight(name).detach().clone() for name in names}, logits_of(model))

    def changed_weights(self, model: LanguageModel) -> list[str]:
        return [name for name, weight in self.weights.items() if not same_bits(weight, model.weight(name))]

    def differences(self, model: LanguageModel) -> list[str]:
        logits = [] if same_bits(self.logits, logits_of(model)) else ["logits"]
        return [*self.changed_weights(model), *logits]
