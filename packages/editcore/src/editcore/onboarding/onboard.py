"""Onboarding: finds good settings for a model that nobody has edited yet, by a few trial edits.

Tracing proposes layers, and trials decide. A trial writes a few facts with some settings, measures the result, and
leaves the model as it was. This module names no method and no metric. What can be set for an editor follows from the
names of its settings (:class:`editcore.locate_then_edit.hparams.LocateThenEditHParams`), or from a search of its own: a
component of the kind :data:`SEARCH` with the editor's name. Trials are compared by the metrics that an evaluator
announces as its objectives.

The ``target`` of a search is called with the :class:`editcore.LanguageModel` and the candidate layers, and returns a
generator. It yields a list of settings to try, by name, and is sent the best settings of all that it had tried; and so
on until it ends::

    def search(model, layers):
        found = yield [{"layer": layer} for layer in layers]
        yield [{**found, "learning_rate": 2e-3}]
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._util.files import write_text
from editcore.evaluation.measures import DEFAULT_EVALUATORS, Measure, measures_of, objectives_of, shown
from editcore.evaluation.measuring import measure
from editcore.evaluation.summaries import Measurement, Summary
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import EditcoreError, ModelError, PluginError, RunError
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.protocols import EditContext, Editor, Remembers
from editcore.interfaces.specs import EditorSpec
from editcore.interfaces.values import EditBatch, FactRecord
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.value_norms import measure_value_norms
from editcore.models.edited import EditedModel
from editcore.plugins.calls import boundary, resolve
from editcore.plugins.registry import Plugins
from editcore.runs.backends import RawBackend
from editcore.runs.batches import Judged, entry_of
from editcore.runs.parts import make_evaluators
from editcore.settings.hparams import HParams, build, describe, to_toml
from editcore.settings.presets import model_stem, own_folder

if TYPE_CHECKING:
    from editcore.locate_then_edit.located import Tracing
    from editcore.second_moments.statistics import StatisticsStore

__all__ = [
    "SEARCH",
    "Bench",
    "Trial",
    "best",
    "candidate_layers",
    "preset_paths",
    "span_below",
    "tunable_editors",
    "write_presets",
]

Settings = Mapping[str, Any]

SEARCH = "onboarding.search"
"""Kind of the components that are searches for an editor's settings."""

FAST: Settings = {"context_count": 2, "v_stop_probability": 0.9}
"""Settings of every trial, and so of the presets, if the editor has them. On SmolLM2 two contexts edit as well as five,
and a fact that has reached probability 0.9 gains little from more steps."""
CLAMPS = (0.5, 1.5)
"""Values of ``clamp_norm_factor`` that are tried beside the editor's own. In models with a norm after the projection,
small values disturb other facts less."""
_VALUE_SETTINGS = ("layer", "first_token", "fact_token", "context_", "v_", "clamp_", "kl_", "chat_", "compute_")
"""Beginnings of the names of settings on which the values of facts depend."""
_SPAN_SHARE, _MAX_SPAN = 5 / 32, 5
"""Width of a range of layers. MEMIT's published ranges are five of 32 blocks."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The result of editing a few facts with some settings."""

    editor: str
    """Name of the editor."""
    settings: Settings
    """Its hyperparameters, by name."""
    summary: Summary | None
    """The measurement; ``None`` if the settings do not work."""
    problem: str = ""
    """Why they do not work."""
    seconds: float = 0.0
    """Wall time."""
    toml: str = ""
    """The settings as a preset has them."""

    @property
    def rank(self) -> tuple[float, ...]:
        """The numbers by which trials are compared, greater being better: whether the settings work, then the
        objectives of the evaluator, in order."""
        if self.summary is None:
            return (0.0,)
        objectives = objectives_of(self.summary.measures, self.summary.values())
        values = [(self.summary.value(measure.key), measure.better) for measure in objectives]
        return (
            1.0,
            *(-math.inf if math.isnan(value) else value if way == "higher" else -value for value, way in values),
        )

    @property
    def label(self) -> str:
        """The settings that differ between trials."""
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.settings.items() if name not in FAST)

    def row(self) -> dict[str, object]:
        """The trial as a row of a table."""
        known = self.summary.values() if self.summary else {}
        return {
            "editor": self.editor,
            "settings": ", ".join(f"{name}={_shown(value)}" for name, value in self.settings.items()),
            **(
                {measure.key: self.summary.value(measure.key) for measure in shown(self.summary.measures, known)}
                if self.summary
                else {}
            ),
            "seconds": self.seconds,
            "problem": self.problem,
        }


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def best(trials: Iterable[Trial]) -> Trial:
    """The trial with the greatest rank; the first one of several.

    Raises:
        ModelError: none of them worked. The message has the reason of the first one.
    """
    trials = list(trials)
    chosen = max(trials, key=lambda trial: trial.rank)
    if chosen.summary is None:
        raise ModelError(f"No settings that were tried can edit this model. {trials[0].problem}")
    return chosen


def tunable_editors(plugins: Plugins, names: Sequence[str] = ()) -> list[EditorSpec]:
    """The editors that have a setting ``layers`` or a search, of ``names`` or of all installed ones. Editors that solve
    batches come first, and preferred ones among them; those with a search come last.

    Raises:
        UnknownNameError: there is no such editor.
        PluginError: no editor has a setting ``layers`` or a search, or a named one has neither.
    """
    searches = plugins.components(SEARCH)
    specs = [plugins.editor(name) for name in names] if names else list(plugins.editors().values())
    found = [spec for spec in specs if spec.name in searches or "layers" in _settings_of(spec)]
    if names and len(found) < len(specs):
        other = next(spec.name for spec in specs if spec not in found)
        raise PluginError(
            f"The editor '{other}' has no setting 'layers' and no search, so there is nothing to find out for it."
        )
    if not found:
        raise PluginError("No installed editor has a setting 'layers' or a search, so there is nothing to find out.")
    if names:
        return found

    def rank(spec: EditorSpec) -> tuple[object, ...]:
        return (spec.name in searches, spec.capabilities.max_batch is not None, not spec.preferred, spec.name)

    return sorted(found, key=rank)


def _settings_of(spec: EditorSpec) -> set[str]:
    return {setting.name for setting in describe(resolve(spec.hparams))}


def candidate_layers(num_layers: int, count: int, tracing: Tracing | None) -> list[int]:
    """The ``count`` layers that tracing ranks first; without a tracing, layers spread evenly over the depth.

    The last block is left out if there are others, because what it writes at a subject's token reaches no later token.
    """
    last = max(0, num_layers - 2)
    count = min(count, last + 1)
    if tracing is not None and tracing.used:
        return sorted(tracing.ranked_layers(range(last + 1))[:count])
    step = last / max(1, count - 1)
    return sorted({round(number * step) for number in range(count)})


def span_below(layer: int, num_layers: int) -> tuple[int, ...]:
    """The layers over which an edit may be spread that ends at ``layer``, which is included."""
    width = min(_MAX_SPAN, max(2, round(_SPAN_SHARE * num_layers)))
    return tuple(range(max(0, layer - width + 1), layer + 1))


class Bench:
    """Tries settings on a few facts, one after the other, and measures each.

    Args:
        records: the facts.
        statistics: of the model that is edited.
        evaluator: what measures a trial.
    """

    def __init__(
        self,
        records: Sequence[FactRecord],
        statistics: StatisticsStore,
        *,
        plugins: Plugins,
        evaluator: str = DEFAULT_EVALUATORS[0],
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        self._plugins = plugins
        self._norms: dict[Hashable, dict[int, float]] = {}
        """Lengths of values by block, by the settings with which they are found."""
        [(spec, made)] = make_evaluators(plugins, [evaluator], {})
        if not objectives_of(measures_of([spec])):
            raise PluginError(
                f"The evaluator '{evaluator}' has no metric that trials could be compared by (an objective). Name "
                "another with --evaluator."
            )
        self._evaluators, self._seed = [(spec, made)], seed
        self.model = statistics.model
        self.records = list(records)
        self.statistics = statistics
        self.progress = progress
        self.trials: list[Trial] = []
        backend = RawBackend()
        backend.open(self.model)
        self._model_with_edits = EditedModel(self.model, backend, spec=plugins.backend("raw"), plugins=plugins)
        self._context = EditContext(
            statistics=statistics,
            trial=self._model_with_edits.trial_of,
            plugins=plugins,
            records={record.request.id: record for record in self.records},
            seed=seed,
        )
        self._unedited: Measurement = measure(self._evaluators, self.model, self.records, seed=seed)
        self.before = self._unedited.summary

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The metrics of every trial."""
        return self.before.measures

    def _measure(self) -> Summary:
        unedited = self._unedited.observations
        return measure(self._evaluators, self.model, self.records, unedited=unedited, seed=self._seed).summary

    def scan(self, spec: EditorSpec, layers: Sequence[int]) -> dict[int, Trial]:
        """Try each layer alone."""
        return dict(zip(layers, self._each(spec, "trying layers", [{"layers": (at,)} for at in layers]), strict=True))

    def clamps(self, spec: EditorSpec, layer: int) -> list[Trial]:
        """Try other values of ``clamp_norm_factor`` at one layer; nothing for an editor without that setting."""
        if "clamp_norm_factor" not in _settings_of(spec):
            return []
        return list(
            self._each(spec, "trying clamps", [{"layers": (layer,), "clamp_norm_factor": clamp} for clamp in CLAMPS])
        )

    def alternatives(self, spec: EditorSpec, settings: Settings) -> list[Trial]:
        """Try an editor with settings found with another one: with the same layer, and also spread over the layers
        below it if editor and model allow that."""
        wanted = [dict(settings)]
        span = span_below(settings["layers"][-1], self.model.layout.num_layers)
        if spec.capabilities.multi_layer and self.model.layout.norm_placement == "pre" and len(span) > 1:
            wanted.append({**settings, "layers": span})
        return list(self._each(spec, f"trying {spec.name}", wanted))

    def search(self, spec: EditorSpec, layers: Sequence[int]) -> list[Trial]:
        """Try what the editor's search asks for (:data:`SEARCH`), until it ends or nothing has worked.

        Raises:
            PluginError: the search failed.
        """
        found: list[Trial] = []
        with boundary(f"The search for '{spec.name}' failed: "):
            steps = resolve(self._plugins.components(SEARCH)[spec.name].target)(self.model, tuple(layers))
            wanted = next(steps, None)
        while wanted:
            found += self._each(spec, f"trying {spec.name}", wanted)
            if all(trial.summary is None for trial in found):
                break
            with boundary(f"The search for '{spec.name}' failed: "):
                try:
                    wanted = steps.send(best(found).settings)
                except StopIteration:
                    break
        return found

    def with_value_norms(self, trial: Trial, records: Sequence[FactRecord]) -> Trial:
        """A trial whose preset also has ``v_norms``, measured on ``records`` with its settings. It is as it was for an
        editor without that setting, and if no record can be measured.

        Editors that find values with the same settings share a measurement.
        """
        made = resolve(self._plugins.editor(trial.editor).hparams)
        if not issubclass(made, LocateThenEditHParams):
            return trial
        hparams = build(made, [trial.settings], owner=trial.editor)
        key = tuple(
            (name, value)
            for name, value in sorted(hparams.model_dump().items())
            if name.startswith(_VALUE_SETTINGS) and name in LocateThenEditHParams.model_fields
        )
        if key not in self._norms:
            requests = [record.request for record in records]
            self._norms[key] = measure_value_norms(
                self.model, requests, hparams=hparams, context=self._context, owner=trial.editor
            )
        norms = tuple((layer, float(f"{norm:.4g}")) for layer, norm in self._norms[key].items())
        if not norms:
            return trial
        with_norms = hparams.model_copy(update={"v_norms": norms})
        return replace(trial, toml=to_toml(with_norms, only=[*trial.settings, "v_norms"]))

    def _each(self, spec: EditorSpec, what: str, wanted: Sequence[Settings]) -> Iterator[Trial]:
        with self.progress.task(what, len(wanted)) as advance:
            for settings in wanted:
                yield self._try(spec, settings)
                advance(1)

    def _try(self, spec: EditorSpec, settings: Settings) -> Trial:
        has = _settings_of(spec)
        used = {name: value for name, value in {**settings, **FAST}.items() if name in has}
        known = next((trial for trial in self.trials if (trial.editor, trial.settings) == (spec.name, used)), None)
        if known is not None:
            return known
        start = time.perf_counter()
        summary, problem, text = None, "", ""
        try:
            hparams: HParams = build(resolve(spec.hparams), [used], owner=spec.name)
            text = to_toml(hparams, only=used)
            summary = self._edited(spec, hparams)
        except EditcoreError as error:
            problem = str(error)
        trial = Trial(
            editor=spec.name,
            settings=used,
            summary=summary,
            problem=problem,
            seconds=time.perf_counter() - start,
            toml=text,
        )
        self.trials.append(trial)
        return trial

    def _edited(self, spec: EditorSpec, hparams: HParams) -> Summary:
        """Write all facts, as many at a time as the editor solves together, and measure. The model has its old bits
        when this returns."""
        requests = tuple(record.request for record in self.records)
        size = spec.capabilities.max_batch or len(requests)
        target = resolve(spec.target)
        with boundary(f"The editor '{spec.name}' failed: "), ExitStack() as stack:
            editor: Editor = target(hparams)
            editor.prepare(self.model, self._context)
            for index, start in enumerate(range(0, len(requests), size)):
                batch = EditBatch.of(requests[start : start + size], index=index)
                proposal = editor.propose(self.model, batch, self._context)
                stack.enter_context(self._model_with_edits.trial(proposal.written))
                if isinstance(editor, Remembers):
                    judged = Judged(batch=batch, proposal=proposal, verdicts={}, rejected=())
                    editor.absorb(entry_of(judged, 1.0, ""))
            return self._measure()


def preset_paths(specs: Iterable[EditorSpec], model_name: str, *, replace: bool) -> dict[str, Path]:
    """The path of the user's preset of each editor for the model.

    Raises:
        RunError: a preset is there already and must not be replaced.
    """
    paths = {spec.name: own_folder(spec.name) / f"{model_stem(model_name)}.toml" for spec in specs}
    taken = [str(path) for path in paths.values() if path.exists()]
    if taken and not replace:
        raise RunError(
            f"You already have presets for {model_name}: {', '.join(taken)}. Give --replace to measure again and "
            "replace them."
        )
    return paths


def write_presets(trials: Iterable[Trial], paths: Mapping[str, Path], *, measured: str, before: Summary) -> list[Path]:
    """Write each editor's settings as a preset of the user, with a comment on what it reached.

    Args:
        measured: what was measured, for the preset's first line.

    Raises:
        StorageError: a file cannot be written.
    """
    written = []
    for trial in trials:
        assert trial.summary is not None
        measures = [measure for measure in shown(before.measures, before.values()) if not measure.of]
        after, was = (
            " / ".join(_plain(measure, summary) for measure in measures) for summary in (trial.summary, before)
        )
        names = " / ".join(measure.key for measure in measures)
        head = f"# Measured by editctl onboard on {measured}.\n# {names}: {after} after editing, {was} before.\n"
        write_text(paths[trial.editor], head + trial.toml)
        written.append(paths[trial.editor])
    return written


def _plain(measure: Measure, summary: Summary) -> str:
    return measure.text(summary.value(measure.key)).removesuffix(".0")
