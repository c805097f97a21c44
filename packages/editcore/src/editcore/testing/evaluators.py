"""The contract suite of evaluators."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import torch

from editcore.evaluation.measures import measures_of
from editcore.evaluation.summaries import Measurement
from editcore.interfaces.errors import EditcoreError
from editcore.interfaces.metrics import EvaluationContext, Observation
from editcore.interfaces.protocols import Evaluator
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import EditRequest, FactRecord
from editcore.models import LanguageModel
from editcore.plugins.calls import resolve
from editcore.plugins.registry import Plugins
from editcore.runs.parts import make_evaluators
from editcore.testing.contract import (
    Contract,
    InjectedFailure,
    MakeModel,
    ModelState,
    counting_passes,
    imports_nothing_heavy,
    survives_json,
)
from editcore.testing.facts import tiny_records

__all__ = ["EvaluatorContract"]

_SHARES = (0.0, 50.0, 100.0)
"""Values of the parts of a composite, tried in all combinations."""

Observations = tuple[Observation, ...]


class EvaluatorContract(Contract):
    """The contract of every evaluator.

    Give ``evaluator_name``; also ``hparams`` if some are required, and ``records`` if the evaluator needs something
    that :func:`editcore.testing.tiny_records` do not have.
    """

    not_observed: ClassVar[frozenset[str]] = frozenset()
    """Announced metrics that have no observation on ``records``."""

    @pytest.fixture
    def evaluator_name(self) -> str:
        """The name under which the evaluator is announced."""
        raise NotImplementedError("give the fixture evaluator_name")

    @pytest.fixture
    def records(self) -> tuple[FactRecord, ...]:
        """Two facts or more, with everything that the evaluator can ask about."""
        return tiny_records(3)

    @pytest.fixture
    def spec(self, registry: Plugins, evaluator_name: str, hparams: dict[str, object]) -> EvaluatorSpec:
        """The announcement, with the metrics that the hyperparameters add."""
        return make_evaluators(registry, [evaluator_name], {evaluator_name: hparams})[0][0]

    @pytest.fixture
    def bench(
        self,
        registry: Plugins,
        spec: EvaluatorSpec,
        hparams: dict[str, object],
        make_model: MakeModel,
        records: Sequence[FactRecord],
    ) -> _Bench:
        """Makes evaluators as a run does, and measures with them."""
        return _Bench(
            make_evaluator=lambda: make_evaluators(registry, [spec.name], {spec.name: hparams})[0][1],
            make_model=make_model,
            records=tuple(records),
        )

    def test_is_announced(self, registry: Plugins, evaluator_name: str) -> None:
        """The name is registered with metrics, and its class can be imported."""
        spec = registry.evaluator(evaluator_name)
        assert spec.name == evaluator_name
        assert spec.summary
        assert _observed_metrics(spec), "no metric with observations is announced"
        assert callable(getattr(resolve(spec.target), "evaluate", None))

    def test_announcement_imports_no_torch(self, registry: Plugins, spec: EvaluatorSpec) -> None:
        """Listing evaluators and their metrics stays fast."""
        imports_nothing_heavy(registry, "evaluator", spec.name, spec.hparams)

    def test_hparams_survive_json_and_refuse_unknown_names(
        self, spec: EvaluatorSpec, hparams: dict[str, object]
    ) -> None:
        """What a run records can be read back, and a misspelt setting is not ignored."""
        if spec.hparams is not None:
            survives_json(resolve(spec.hparams), hparams, spec.name)

    def test_it_observes_what_it_announces(self, bench: _Bench, spec: EvaluatorSpec) -> None:
        """It observes nothing else, because tables and pictures could not show it. Composites are computed, not
        observed."""
        for observation in bench.edited():
            assert isinstance(observation, Observation), f"{observation!r:.80} is among the observations"
            assert observation.metric in _observed_metrics(spec), (
                f"{observation.metric} was observed, and is no announced metric"
            )

    def test_every_announced_metric_is_observed(self, bench: _Bench, spec: EvaluatorSpec) -> None:
        """Every metric but those in ``not_observed`` is observed on the unedited or the edited model."""
        unedited = bench.unedited()
        missing = _observed_metrics(spec) - {observation.metric for observation in (*unedited, *bench.edited(unedited))}
        assert missing == self.not_observed, f"not observed: {sorted(missing)}; so named: {sorted(self.not_observed)}"

    def test_what_a_metric_needs_is_said(self, bench: _Bench, spec: EvaluatorSpec) -> None:
        """A metric that is not observed of a request alone has ``needs``, so that a run can say why it has no value."""
        request = bench.records[0].request.model_copy(update={"target_true": None})
        bare = [FactRecord(request=request)]
        unedited = _ask(bench.make_evaluator(), bench.make_model(), bare)
        edited = _ask(bench.make_evaluator(), bench.make_edited(), bare, unedited)
        seen = {observation.metric for observation in (*unedited, *edited)}
        unsaid = [metric.name for metric in spec.metrics if not (metric.of or metric.needs or metric.name in seen)]
        assert not unsaid, f"metrics that need more than a request, and do not say what: {', '.join(unsaid)}"

    def test_values_are_finite_and_shares_are_parts_of_1(self, bench: _Bench, spec: EvaluatorSpec) -> None:
        """A metric without a value has no observation."""
        shares = {metric.name for metric in spec.metrics if metric.share}
        for observation in bench.edited():
            assert _finite(observation.value), (
                f"{observation.metric} is {observation.value} after {observation.prompt!r}"
            )
            if observation.metric in shares:
                assert 0 <= observation.value <= 1, (
                    f"the share {observation.metric} is {observation.value} after {observation.prompt!r}"
                )

    def test_it_observes_only_what_it_was_asked(self, bench: _Bench) -> None:
        """It does not observe records of an earlier measurement, nor those of ``unedited``."""
        evaluator, edited, asked = bench.make_evaluator(), bench.make_edited(), bench.records[:1]
        unedited = _ask(evaluator, bench.make_model(), bench.records)
        _ask(evaluator, edited, bench.records, unedited)
        for known in (None, unedited):
            found = {observation.request_id for observation in _ask(evaluator, edited, asked, known)}
            assert found <= {record.request.id for record in asked}, "it observed facts that it was not asked"

    def test_the_same_question_has_the_same_answer(self, bench: _Bench) -> None:
        """The answer does not depend on earlier measurements or on the instance, because a run that was killed and
        resumed asks again."""
        evaluator, edited = bench.make_evaluator(), bench.make_edited()
        unedited = _ask(evaluator, bench.make_model(), bench.records)
        first = _ask(evaluator, edited, bench.records, unedited)
        _ask(evaluator, bench.make_model(), bench.records[1:])
        for again in (evaluator, bench.make_evaluator()):
            assert _ask(again, edited, bench.records, unedited) == first, "asked again it observes something else"

    def test_the_model_stays_as_it_is(self, bench: _Bench) -> None:
        """Weights, hooks, training mode and the tokenizer's sides are as before, to the bit."""
        before = ModelState.of(model := bench.make_edited())
        found = _ask(bench.make_evaluator(), model, bench.records)
        _ask(bench.make_evaluator(), model, bench.records, found)
        assert not before.differences(ModelState.of(model)), "the model changed while it was measured"

    def test_a_failed_measurement_leaves_the_model_as_it_is(self, bench: _Bench) -> None:
        """Weights and hooks are as before when a forward pass fails: the first, a middle one, the last."""
        with counting_passes(model := bench.make_model()) as passes:
            _ask(bench.make_evaluator(), model, bench.records)
        for fail_at in sorted({0, len(passes) // 2, len(passes) - 1} & set(passes)):
            before = ModelState.of(model := bench.make_model())
            with counting_passes(model, fail_at=fail_at), contextlib.suppress(InjectedFailure, EditcoreError):
                _ask(bench.make_evaluator(), model, bench.records)
            assert not before.differences(ModelState.of(model)), (
                f"the model stayed changed when forward pass {fail_at + 1} of {len(passes)} failed"
            )

    def test_nothing_is_observed_of_no_records(self, bench: _Bench) -> None:
        """Without records there are no observations, with and without (empty) observations of the unedited model."""
        for known in (None, ()):
            assert _ask(bench.make_evaluator(), bench.make_model(), [], known) == ()

    def test_records_that_lack_something_do_no_harm(self, bench: _Bench) -> None:
        """Records may lack a true object, a subject, probes, answers or ``extra``, alone and among other records."""
        bare = _lacking(bench.records[0])
        model, edited, evaluator = bench.make_model(), bench.make_edited(), bench.make_evaluator()
        for asked in (*([record] for record in bare), [*bare, *bench.records]):
            unedited = _ask(evaluator, model, asked)
            for observation in (*unedited, *_ask(evaluator, edited, asked, unedited)):
                assert observation.request_id in {record.request.id for record in asked}
                assert _finite(observation.value), (
                    f"{observation.metric} is {observation.value} of a record {observation.request_id}"
                )

    def test_composites_are_numbers(self, bench: _Bench, spec: EvaluatorSpec) -> None:
        """Composites are numbers for all values of their parts, and a share lies between 0 and 100."""
        measured = Measurement(measures=measures_of([spec]), observations={spec.name: bench.edited()})
        means = {name: average.mean for name, average in measured.summary.averages.items()}
        metrics = {metric.name: metric for metric in spec.metrics}
        for composite in (metric for metric in spec.metrics if metric.of):
            combine = resolve(composite.combine)
            parts = [metrics[name] for name in composite.of]
            choices = [_SHARES if part.share else (means.get(part.name, 1.0),) for part in parts]
            for values in itertools.product(*choices):
                value = combine(*values)
                assert _finite(value), f"{composite.name} of {values} is {value}"
                if composite.share:
                    assert 0 <= value <= 100, f"the share {composite.name} of {values} is {value}"

    def test_what_it_compares_with_is_announced(self, bench: _Bench, spec: EvaluatorSpec) -> None:
        """An evaluator that ``compares`` uses the observations of the unedited model. Other evaluators must not depend
        on them, because a run may not have them."""
        alone, compared = bench.edited(), bench.edited(bench.unedited())
        if spec.compares:
            assert compared != bench.edited(alone), "it announces that it compares, and compares with nothing"
        else:
            assert compared == alone, "it compares with the unedited model, and does not announce it"

    def test_what_it_compares_with_may_come_from_a_file(
        self, bench: _Bench, spec: EvaluatorSpec, tmp_path: Path
    ) -> None:
        """A run that was killed and resumed reads the observations of its first process from a file."""
        evaluator, measures = bench.make_evaluator(), measures_of([spec])
        unedited = _ask(evaluator, bench.make_model(), bench.records)
        live = _ask(evaluator, bench.make_edited(), bench.records, unedited)
        Measurement(measures=measures, observations={spec.name: unedited}).frame({}).to_parquet(tmp_path / "before")
        kept = Measurement.from_frame(pd.read_parquet(tmp_path / "before"), measures).observations[spec.name]
        assert tuple(kept) == unedited, "observations that went through a file are others"
        assert bench.edited(kept) == live, "another evaluator, which has them from a file, observes something else"

    def test_what_tells_of_a_fact_tells_once(self, bench: _Bench, spec: EvaluatorSpec) -> None:
        """A metric with ``retention`` or ``tally`` has one observation per fact, because it counts facts."""
        counted = {metric.name for metric in spec.metrics if metric.retention or metric.tally}
        unedited = bench.unedited()
        for observations in (unedited, bench.edited(unedited)):
            counts = Counter(
                (observation.metric, observation.request_id)
                for observation in observations
                if observation.metric in counted
            )
            several = sorted({metric for (metric, _), count in counts.items() if count > 1})
            assert not several, f"several observations of one fact: {several}"


@dataclass(frozen=True)
class _Bench:
    """Makes evaluators and models, and measures."""

    make_evaluator: Callable[[], Evaluator]
    make_model: MakeModel
    records: tuple[FactRecord, ...]

    def make_edited(self) -> LanguageModel:
        """The same model with other MLPs, so that all answers differ."""
        return _edited(self.make_model())

    def unedited(self) -> Observations:
        """Observations of a new evaluator on the unedited model."""
        return _ask(self.make_evaluator(), self.make_model(), self.records)

    def edited(self, unedited: Sequence[Observation] | None = None) -> Observations:
        """Observations of a new evaluator on the edited model, with or without those of the unedited one."""
        return _ask(self.make_evaluator(), self.make_edited(), self.records, unedited)


def _ask(
    evaluator: Evaluator,
    model: LanguageModel,
    records: Sequence[FactRecord],
    unedited: Sequence[Observation] | None = None,
) -> Observations:
    """The observations of an evaluator. It is given the unedited model's observations of these records only."""
    asked = {record.request.id for record in records}
    known = (
        None if unedited is None else tuple(observation for observation in unedited if observation.request_id in asked)
    )
    return tuple(evaluator.evaluate(model, records, EvaluationContext(unedited=known)))


def _observed_metrics(spec: EvaluatorSpec) -> set[str]:
    """The metrics that have observations."""
    return {metric.name for metric in spec.metrics if not metric.of}


def _finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


@torch.no_grad()
def _edited(model: LanguageModel) -> LanguageModel:
    """The model with a random change of every projection, as large as the weight."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(model.layout.num_layers):
        weight = model.weight(model.layout.weight_name(layer))
        weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * weight.std())
    return model


def _lacking(record: FactRecord) -> list[FactRecord]:
    """Copies of the record that each lack something; the id says what."""
    request = record.request

    def without(what: str, changed: EditRequest = request, **fields: object) -> FactRecord:
        return record.model_copy(update={"request": changed.model_copy(update={"id": f"without {what}"}), **fields})

    without_subject = EditRequest(prompt=request.text, target_new=request.target_new, target_true=request.target_true)
    bare = EditRequest(prompt=request.text, target_new=request.target_new)
    unanswered = tuple(probe.model_copy(update={"answers": ()}) for probe in record.probes)
    return [
        without("target_true", request.model_copy(update={"target_true": None})),
        without("subject", without_subject),
        without("relation", relation=None),
        without("probes", probes=()),
        without("answers", probes=unanswered),
        without("extra", extra={}),
        without("anything", bare, relation=None, probes=(), extra={}),
    ]
