"""From a model that nobody has edited to presets: the trials, their order, and what is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from editcore import (
    ComponentSpec,
    EvaluatorSpec,
    FactRecord,
    HParamsError,
    MetricSpec,
    ModelError,
    PluginError,
    Plugins,
    Probe,
    RunError,
    UnknownNameError,
)
from editcore.evaluation import COUNTERFACT, Average, Summary, measures_of, objectives_of
from editcore.locate_then_edit.located import ROLES, Tracing
from editcore.models import LanguageModel
from editcore.onboarding.onboard import (
    FAST,
    SEARCH,
    Bench,
    Trial,
    best,
    candidate_layers,
    preset_paths,
    span_below,
    tunable_editors,
    write_presets,
)
from editcore.plugins.calls import resolve
from editcore.second_moments import CorpusOptions
from editcore.second_moments.statistics import StatisticsStore
from editcore.settings.presets import own_folder, preset_for
from editcore.testing import tiny_model, tiny_requests

MEASURES = measures_of([COUNTERFACT])


def summary(es: float, ps: float, ns: float, em: float = 0.0) -> Summary:
    values = {"ES": es, "PS": ps, "NS": ns, "EM": em, "PM": 0.0, "NM": 0.0}
    averages = {name: Average(mean=value, std=1.0, facts=4, prompts=8) for name, value in values.items()}
    return Summary(measures=MEASURES, averages=averages, facts={"counterfact": 4})


def trial(*scores: float, **fields: Any) -> Trial:
    found = summary(*scores) if scores else None
    return Trial(**{"editor": "toy", "settings": {"layers": (1,)}, "summary": found, **fields})


def tracing(mlp: list[float], used: int = 3) -> Tracing:
    effects = np.zeros((len(ROLES), len(mlp)))
    effects[ROLES.index("last subject token")] = mlp
    return Tracing(
        model="m", fingerprint="f", effects={"hidden": effects, "mlp": effects}, counts=(1,) * 6, asked=9, used=used,
        clean=0.5, corrupted=0.1, noise=3.0, draws=1, window=1, seed=0,
    )  # fmt: skip


def test_tracing_proposes_layers() -> None:
    assert candidate_layers(6, 2, tracing([0.1, 0.4, 0.2, 0.3, 0.0, 0.9])) == [1, 3], "never the last block"
    assert candidate_layers(6, 99, tracing([0.1, 0.4, 0.2, 0.3, 0.0, 0.9])) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [(30, 6, [0, 6, 11, 17, 22, 28]), (3, 6, [0, 1]), (1, 6, [0]), (12, 1, [0]), (12, 2, [0, 10])],
)
def test_without_facts_they_are_spread(layers: int, count: int, expected: list[int]) -> None:
    assert candidate_layers(layers, count, None) == expected
    assert candidate_layers(layers, count, tracing([0.0] * layers, used=0)) == expected


def test_a_span_ends_at_the_layer_and_fits_the_depth() -> None:
    assert span_below(8, 32) == (4, 5, 6, 7, 8)
    assert span_below(1, 32) == (0, 1)
    assert span_below(3, 12) == (2, 3)
    assert span_below(0, 12) == (0,)
    assert len(span_below(40, 96)) == 5


def test_the_best_trial_has_the_score_then_the_margins() -> None:
    low, high, decided = trial(100, 80, 50), trial(100, 90, 70, 10.0), trial(100, 90, 70, 20.0)
    assert best([low, high, trial(), decided]) is decided
    assert best([high, replace(high, seconds=9.0)]) is high
    assert decided.rank == (1.0, pytest.approx(3 / (1 / 100 + 1 / 90 + 1 / 70)), pytest.approx(20 / 3)), "score, margin"
    with pytest.raises(ModelError, match=r"can edit this model\. no luck"):
        best([trial(problem="no luck"), trial(problem="none either")])


def test_trials_are_compared_by_what_their_evaluator_says_is_better() -> None:
    """The first objective decides, the next among equals; what cannot be told comes last, a trial without one behind
    that."""
    metrics = (
        MetricSpec(name="seen", label="Seen"),
        MetricSpec(name="won", label="Won", objective=True),
        MetricSpec(name="words", label="Words", unit="words", better="lower", objective=True),
    )
    measures = measures_of([EvaluatorSpec("e", "m:E", summary="E.", metrics=metrics), COUNTERFACT])

    def of(**values: float) -> Trial:
        averages = {name: Average(mean=value, std=0, facts=1, prompts=1) for name, value in values.items()}
        return trial(summary=Summary(measures=measures, averages=averages))

    order = [
        of(won=90, words=3),
        of(won=90, words=4, seen=100, ES=100, PS=100, NS=100),
        of(won=90),
        of(won=80, words=1),
        of(words=1),
        trial(problem="no luck"),
    ]
    backwards = order[::-1]
    assert sorted(backwards, key=lambda tried: tried.rank, reverse=True) == order
    assert best(backwards) is order[0]
    assert order[0].row().keys() >= {"seen", "won", "words", "ES"}
    assert "EM" not in order[0].row(), "metrics for the report are not in the table"
    assert "won" not in order[-1].row()


def test_settings_that_work_come_before_those_that_do_not() -> None:
    metrics = (MetricSpec(name="won", label="Won", objective=True),)
    unknown = trial(summary=Summary(measures=measures_of([EvaluatorSpec("e", "m:E", summary="E.", metrics=metrics)])))
    assert best([trial(problem="no luck"), unknown]) is unknown


@pytest.fixture
def bench(toys: Any, corpus_file: Path, small: Path) -> Bench:
    records = [
        FactRecord(
            request=request,
            probes=(
                Probe(kind="paraphrase", prompt=f"So {request.text}"),
                Probe(kind="neighborhood", prompt="Bob Dylan lives in"),
            ),
        )
        for request in tiny_requests(3)
    ]
    model = tiny_model()
    return Bench(
        records, StatisticsStore(model, CorpusOptions(name=str(corpus_file), tokens=600)), plugins=Plugins.load()
    )


def test_trials_edit_and_leave_the_model_as_it_was(bench: Bench) -> None:
    spec = Plugins.load().editor("toy")
    before = bench.model.fingerprint()
    scan = bench.scan(spec, [0, 1])
    assert bench.model.fingerprint() == before
    assert {layer: tried.settings["layers"] for layer, tried in scan.items()} == {0: (0,), 1: (1,)}
    for tried in scan.values():
        assert tried.summary is not None
        assert tried.settings.items() >= FAST.items()
        assert tried.summary.value("EM") > bench.before.value("EM")
        assert tried.summary.measures == bench.measures == MEASURES
    assert len(bench.trials) == 2
    bench.scan(spec, [1])
    assert len(bench.trials) == 2, "what has been tried is not tried again"
    assert [tried.settings["clamp_norm_factor"] for tried in bench.clamps(spec, 0)] == [0.5, 1.5]


def test_an_editor_of_single_facts_writes_them_one_by_one(bench: Bench) -> None:
    spec = Plugins.load().editor("toy-pairs")
    assert spec.capabilities.max_batch == 2
    [tried] = bench.alternatives(spec, {"layers": (0,), "clamp_norm_factor": 2.0})
    assert tried.summary is not None
    assert tried.settings["clamp_norm_factor"] == 2.0


def test_settings_that_do_not_work_are_a_result_too(bench: Bench) -> None:
    spec = Plugins.load().editor("toy")
    failed = bench.scan(spec, [7])[7]
    assert failed.summary is None
    assert "layer 7 does not exist" in failed.problem
    before = bench.model.fingerprint()
    crashed = bench._try(spec, {"layers": (1,), "fails_at": 0})
    assert "cannot be solved" in crashed.problem
    assert bench.model.fingerprint() == before


def test_trials_are_measured_by_the_evaluator_that_is_asked_for(bench: Bench) -> None:
    plugins = Plugins.load()
    by_generation = Bench(bench.records, bench.statistics, plugins=plugins, evaluator="generation")
    before = by_generation.before
    assert math.isnan(before.value("unchanged")), "the unedited model is what others are compared with"
    spoken = by_generation.scan(plugins.editor("toy"), [1])[1]
    assert spoken.summary is not None
    assert [metric.key for metric in objectives_of(spoken.summary.measures)] == ["facts_said"]
    assert spoken.rank == (1.0, spoken.summary.value("facts_said"))
    unchanged = spoken.summary.averages["unchanged"]
    assert (unchanged.facts, unchanged.mean) == (3, 0.0), "the toy's noise changes every answer"
    won = Bench(bench.records, bench.statistics, plugins=plugins, evaluator="rewrites")
    assert won.before.values() == {"won": 100.0, "length": pytest.approx(mean_length(bench.records))}
    with pytest.raises(PluginError) as caught:
        Bench(bench.records, bench.statistics, plugins=plugins, evaluator="lengths")
    assert str(caught.value) == (
        "The evaluator 'lengths' has no metric that trials could be compared by (an objective). Name another with "
        "--evaluator."
    )
    with pytest.raises(UnknownNameError, match=r"Unknown evaluator 'counterfat'\..* Did you mean 'counterfact'"):
        Bench(bench.records, bench.statistics, plugins=plugins, evaluator="counterfat")


def mean_length(records: Sequence[FactRecord]) -> float:
    return sum(len(record.request.text) for record in records) / len(records)


def test_editors_are_found_by_their_settings(toys: Any) -> None:
    plugins = Plugins.load()
    assert all(spec.name != "dead" for spec in tunable_editors(plugins, ["toy"]))
    with pytest.raises(UnknownNameError, match="Did you mean 'toy'"):
        tunable_editors(plugins, ["toyy"])


def test_an_editor_without_layers_has_nothing_to_find(monkeypatch: pytest.MonkeyPatch, toys: Any) -> None:
    monkeypatch.setattr("editcore.onboarding.onboard._settings_of", lambda spec: set())
    with pytest.raises(PluginError, match="'toy' has no setting 'layers'"):
        tunable_editors(Plugins.load(), ["toy"])
    plugins = Plugins.load()
    assert {spec.name for spec in tunable_editors(plugins)} == set(plugins.components(SEARCH)), "a search is enough"
    monkeypatch.setattr(Plugins, "components", lambda _plugins, _kind: {})
    with pytest.raises(PluginError, match="No installed editor"):
        tunable_editors(plugins)


@pytest.fixture
def searching(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Gives the editor ``toy`` a search."""

    def announce(search: Callable[..., Any]) -> None:
        spec = ComponentSpec("toy", "here:search", kind=SEARCH, summary="Searches.")
        monkeypatch.setattr(Plugins, "components", lambda _plugins, kind: {"toy": spec} if kind == SEARCH else {})
        monkeypatch.setattr(
            "editcore.onboarding.onboard.resolve", lambda target: search if target == "here:search" else resolve(target)
        )

    return announce


def test_a_search_is_sent_the_best_settings_until_it_ends(bench: Bench, searching: Callable[..., None]) -> None:
    sent: list[Any] = []

    def search(model: LanguageModel, layers: Sequence[int]) -> Any:
        sent.append((model, layers))
        sent.append((yield [{"layers": (0,)}, {"layers": (7,)}]))
        sent.append((yield [{"layers": (1,), "clamp_norm_factor": 1.5}]))

    searching(search)
    spec = Plugins.load().editor("toy")
    assert [found.name for found in tunable_editors(Plugins.load())][-1] == "toy", "those with a search come last"
    found = bench.search(spec, [1, 0])
    assert [tried.settings["layers"] for tried in found] == [(0,), (7,), (1,)]
    assert sent[0] == (bench.model, (1, 0))
    assert sent[1]["layers"] == (0,), "the one that works"
    assert sent[2] == best(found).settings


def test_a_search_ends_where_nothing_works(bench: Bench, searching: Callable[..., None]) -> None:
    def hopeless(model: LanguageModel, layers: Sequence[int]) -> Any:
        yield [{"layers": (7,)}]
        raise AssertionError("not asked again")

    searching(hopeless)
    spec = Plugins.load().editor("toy")
    assert [tried.summary for tried in bench.search(spec, [0])] == [None]

    def broken(model: LanguageModel, layers: Sequence[int]) -> Any:
        yield [{"layers": (0,)}]
        raise RuntimeError("out of ideas")

    searching(broken)
    with pytest.raises(PluginError, match="The search for 'toy' failed: RuntimeError: out of ideas"):
        bench.search(spec, [0])


def test_presets_say_what_they_reached_and_are_found(toys: Any, small: Path) -> None:
    spec = Plugins.load().editor("toy")
    paths = preset_paths([spec], str(small), replace=False)
    assert paths == {"toy": own_folder("toy") / "small.toml"}
    done = trial(100, 95.5, 80, toml="layers = [0]\n")
    write_presets([done], paths, measured="3 facts", before=summary(10, 20, 85))
    text = paths["toy"].read_text()
    assert text == (
        "# Measured by editctl onboard on 3 facts.\n"
        "# ES / PS / NS: 100 / 95.5 / 80 after editing, 10 / 20 / 85 before.\nlayers = [0]\n"
    )
    found = preset_for(spec, str(small))
    assert found is not None
    assert (found.own, dict(found.values())) == (True, {"layers": [0]})
    with pytest.raises(RunError, match=r"You already have presets for .*small.*Give --replace"):
        preset_paths([spec], str(small), replace=False)
    assert preset_paths([spec], str(small), replace=True) == paths


def test_a_wrong_value_in_a_trial_is_the_trials_problem(bench: Bench) -> None:
    spec = Plugins.load().editor("toy")
    assert "out of range" in bench._try(spec, {"layers": (0,), "clamp_norm_factor": -1.0}).problem
    assert isinstance(bench.model, LanguageModel)
    assert issubclass(HParamsError, Exception)
