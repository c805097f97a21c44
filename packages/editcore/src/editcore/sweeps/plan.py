"""Plans the trials of a sweep: every combination is resolved, checked and given a key. No model is loaded."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from editcore._util.files import file_sha256, write_text
from editcore.datasets import content_hash, dataset_name, is_path
from editcore.evaluation.measures import DEFAULT_EVALUATORS, Measure, measures_of
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import EditcoreError, HParamsError, PluginError, RequestError, UnknownNameError
from editcore.interfaces.specs import EditorSpec, EvaluatorSpec
from editcore.interfaces.values import EditRequest
from editcore.models.catalogue import CATALOGUE
from editcore.models.sources import look_at
from editcore.plugins.registry import Plugins
from editcore.plugins.versions import code_versions
from editcore.runs.config import RunConfig
from editcore.runs.facts import records_of
from editcore.runs.fit import MissingSettingError, UnfitError, check_subjects, needs_subject
from editcore.runs.resolved import editor_settings, hparams_of, resolve_session, with_metrics
from editcore.settings.hparams import HParams
from editcore.settings.toml import run_values
from editcore.sweeps.file import Arm, Sweep, SweepFile, overlaid
from editcore.sweeps.records import PlanRecord, PointRecord, TrialRecord

__all__ = ["PLAN_NAME", "SWEEP_NAME", "Plan", "Point", "Trial", "make_plan"]

PLAN_NAME = "plan.json"
SWEEP_NAME = "sweep.toml"

_KEY_LENGTH = 20
_PARTS = ("editor", "plugin", "backend", "preset")
"""Kinds of names that may be unknown in an optional arm."""
_COLUMNS = ("retention", "edits", "rejected")
"""Columns of the table of trials that figures may show besides metrics."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of a sweep."""

    key: str
    """A hash of everything below."""
    config: RunConfig
    """The configuration, with absolute paths, a batch size that the editor can use, and every hyperparameter in
    ``settings``."""
    versions: Mapping[str, str]
    """Versions of the packages whose code it runs."""
    contents: Mapping[str, str]
    """Hashes of the files and model folders that it reads, by option, and of the records that it edits
    (``records``)."""
    facts: int
    """Number of facts that it edits."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One combination, which is one row of the table. Several points may share a trial."""

    arm: str
    """Name of the arm."""
    values: Mapping[str, Any]
    """Values by axis. Axes that do not concern the arm are absent."""
    seed: int
    """Seed of the run."""
    batch_size: int
    """The batch size that was asked for."""
    key: str
    """Key of its trial."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The trials of a sweep, and the rows of its table."""

    sweep: Sweep
    """The checked sweep file."""
    text: str
    """The sweep file, as it was written."""
    points: tuple[Point, ...]
    """The rows of the table."""
    trials: Mapping[str, Trial]
    """By key, in the order of the points."""
    evaluators: tuple[EvaluatorSpec, ...]
    """The evaluators of all trials, in order."""
    notes: tuple[str, ...]
    """Sentences for the user."""

    @property
    def title(self) -> str:
        """Name of the folder of tables and figures."""
        return self.sweep.title

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The metrics of all its trials."""
        return measures_of(self.evaluators)

    @property
    def axes(self) -> tuple[str, ...]:
        """The settings that vary."""
        return tuple(self.sweep.grid)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that have points, in the order of the sweep file."""
        return tuple(dict.fromkeys(point.arm for point in self.points))

    def check_figures(self) -> None:
        """Refuse a figure that shows a column that will not be there.

        Raises:
            UnknownNameError: there is no such metric.
        """
        keys = [*(measure.key for measure in self.measures), *_COLUMNS]
        for figure in self.sweep.figures:
            for name in figure.shown:
                if (
                    name not in keys and "." not in name
                ):  # a dot means a count of an extension, which is known only at the end
                    raise UnknownNameError("metric", name, keys, hint=f"The figure {figure.file} shows it.")

    def write(self, directory: Path | str) -> None:
        """Write ``sweep.toml`` and ``plan.json``."""
        directory = Path(directory)
        record = PlanRecord(
            metrics=self.measures,
            title=self.title,
            summary=self.sweep.summary,
            arms=self.arms,
            axes=self.sweep.grid,
            seeds=tuple(dict.fromkeys(point.seed for point in self.points)),
            notes=self.notes,
            points=tuple(
                PointRecord(arm=point.arm, values=dict(point.values), seed=point.seed, key=point.key)
                for point in self.points
            ),
            trials={
                key: TrialRecord(config=trial.config, versions=trial.versions, contents=trial.contents)
                for key, trial in self.trials.items()
            },
        )
        write_text(directory / SWEEP_NAME, self.text)
        record.write_file(directory / PLAN_NAME)


def make_plan(file: SweepFile, plugins: Plugins) -> Plan:
    """Resolve and check every combination, so that errors in names, settings and data are found before the sweep
    begins.

    Raises:
        EditcoreError: something in the sweep is wrong, or it has no trials left.
    """
    return _Planner(file, plugins).plan()


class _Planner:
    """Makes a plan. It caches what many combinations have in common."""

    def __init__(self, file: SweepFile, plugins: Plugins) -> None:
        self._sweep, self._text, self._plugins = file.sweep, file.text, plugins
        self._notes: dict[str, None] = {}
        self._left_out: dict[str, list[str]] = {}
        """By reason, the names of the arms that cannot run."""
        self._contents: dict[str, str] = {}
        self._facts: dict[str, tuple[Sequence[EditRequest], str]] = {}
        self._models: set[str] = set()
        self._versions: dict[frozenset[str], Mapping[str, str]] = {}

    @cached_property
    def _mixed(self) -> bool:
        """Whether some of the editors need a subject and others do not."""
        editors = {arm.values.get("editor", self._sweep.base.get("editor")) for arm in self._sweep.variants()}
        editors |= set(map(str, self._sweep.grid.get("editor", ())))
        known = self._plugins.editors()
        return len({known[name].capabilities.needs_subject for name in editors if name in known}) > 1

    def plan(self) -> Plan:
        points: list[Point] = []
        trials: dict[str, Trial] = {}
        used: set[str] = set()
        for arm in self._sweep.variants():
            try:
                for values, seed, options, named in self._combinations(arm):
                    used |= named
                    trial, batch_size = self._trial(options, arm)
                    trials.setdefault(trial.key, trial)
                    points.append(Point(arm=arm.name, values=values, seed=seed, batch_size=batch_size, key=trial.key))
            except (UnknownNameError, UnfitError, PluginError) as error:
                if not arm.optional or (isinstance(error, UnknownNameError) and error.kind not in _PARTS):
                    raise
                points = [point for point in points if point.arm != arm.name]
                why = _why_left_out(error).removeprefix(f"{arm.name}: ")
                self._left_out.setdefault(why, []).append(arm.name)
        sections = [name for name in (*_sections(self._sweep.base), *map(_section, self._sweep.grid)) if name]
        if points and (idle := [name for name in sections if name not in used]):
            raise UnknownNameError(
                "settings section",
                idle[0],
                used,
                hint="A section is named after the plugin that it sets, and no arm here uses that one.",
            )
        for why, names in self._left_out.items():
            self._notes[f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} left out: {why}"] = None
        if not points:
            why = " ".join(self._notes) or "Everything is excluded."
            raise HParamsError(f"The sweep '{self._sweep.title}' has no trials. {why}")
        kept = dict.fromkeys(point.key for point in points)
        evaluators = dict.fromkeys(name for key in kept for name in trials[key].config.evaluators)
        plan = Plan(
            sweep=self._sweep,
            text=self._text,
            points=tuple(points),
            trials=MappingProxyType({key: trials[key] for key in kept}),
            evaluators=tuple(self._evaluator(name, [trials[key] for key in kept]) for name in evaluators),
            notes=tuple(self._notes),
        )
        plan.check_figures()
        return plan

    def _evaluator(self, name: str, trials: Sequence[Trial]) -> EvaluatorSpec:
        """An evaluator with the metrics of all trials: some depend on its settings."""
        spec = self._plugins.evaluator(name)
        metrics = {metric.name: metric for metric in spec.metrics}
        for trial in trials:
            if name in trial.config.evaluators:
                hparams = hparams_of(spec, trial.config.settings.get(name, {}))
                metrics |= {metric.name: metric for metric in with_metrics(spec, hparams).metrics}
        return replace(spec, metrics=tuple(metrics.values()))

    def _combinations(self, arm: Arm) -> Iterator[tuple[dict[str, Any], int, dict[str, Any], set[str]]]:
        """Values by axis, seed and options of every combination that an arm has, and the sections that it uses."""
        sweep = self._sweep
        seen: set[str] = set()
        for chosen in itertools.product(*sweep.grid.values()):
            values = dict(zip(sweep.grid, chosen, strict=True))
            table = overlaid(sweep.base, arm.values)
            for name, value in values.items():
                table = overlaid(table, _nested(name, value))
            options = run_values(table)
            seed = options.pop("seed", 0)
            named = _named(options, self._plugins)
            own = {*_sections(arm.values)}
            settings = {name: part for name, part in options.get("settings", {}).items() if name in named | own}
            mine = {name: value for name, value in values.items() if _section(name) in (None, *named, *own)}
            for trial_seed in sweep.seeds or (seed,):
                if _excluded(sweep.exclude, {**mine, "arm": arm.name, "seed": trial_seed}):
                    continue
                identity = json.dumps([mine, trial_seed], sort_keys=True, default=str)
                if identity in seen:  # it differs only in axes that do not concern the arm
                    continue
                seen.add(identity)
                yield mine, trial_seed, {**options, "seed": trial_seed, "settings": settings}, named

    def _trial(self, options: Mapping[str, Any], arm: Arm) -> tuple[Trial, int]:
        """The trial of a combination, and the batch size that was asked for.

        Raises:
            UnfitError: the arm's editor cannot work with the model, the backend or the data.
            EditcoreError: something else in the combination is wrong.
        """
        try:
            config = RunConfig.create(options, self._plugins)
            self._look_at(config.model)
            settings = resolve_session(
                self._plugins,
                config.model,
                config,
                dataset=config.dataset,
                note=lambda text: self._notes.setdefault(text),
            ).settings
            paths = self._paths(config)
            requests, records = self._records(config)
            editor = self._plugins.editor(config.editor)
            _check_subjects(requests, editor, settings[editor.name])
        except UnfitError as error:
            text = _in_a_sweep(error, config) if isinstance(error, MissingSettingError) else str(error)
            raise UnfitError(text if arm.optional else f"Arm '{arm.name}': {text}") from error
        except HParamsError as error:
            raise HParamsError(f"Arm '{arm.name}': {error}") from error
        most = editor.capabilities.max_batch
        resolved = {name: values.model_dump(mode="json") for name, values in settings.items()}
        fitting = config.model_copy(
            update={
                "batch_size": min(config.batch_size, most or config.batch_size),
                "preset": None,  # its values are in the settings, so the presets on a worker make no difference
                "settings": resolved,
                **{option: str(path) for option, path in paths.items()},
            }
        )
        parts = {
            "config": fitting.model_dump(mode="json"),
            "versions": self._code(config),
            # For a file of records its edited records count, as for a data set.
            "contents": {option: self._hash(path) for option, path in paths.items() if option != "dataset"}
            | {"records": records},
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_KEY_LENGTH]
        trial = Trial(
            key=key,
            config=fitting,
            versions=parts["versions"],
            contents=parts["contents"],
            facts=len(requests),
        )
        return trial, config.batch_size

    def _look_at(self, model: str) -> None:
        """Check once for all trials that the name leads to a model."""
        if model not in self._models:
            look_at(model)
            self._models.add(model)

    def _paths(self, config: RunConfig) -> dict[str, Path]:
        """The options that are files or folders here, as absolute paths, because workers may start in another
        folder."""
        found = {}
        if config.model not in CATALOGUE and (folder := Path(config.model).expanduser()).is_dir():
            found["model"] = folder.resolve()
        if is_path(config.dataset, self._plugins) and (file := Path(config.dataset).expanduser()).is_file():
            found["dataset"] = file.resolve()
        for option, text in (("corpus", config.corpus), ("eval_text", config.eval_text)):
            if text is not None and (file := Path(text).expanduser()).is_file():
                found[option] = file.resolve()
        return found

    def _records(self, config: RunConfig) -> tuple[Sequence[EditRequest], str]:
        """The requests that a run edits, and the hash of its records."""
        own = config.settings.get(dataset_name(config.dataset, self._plugins) or "", {})
        needy = needs_subject(self._plugins.editor(config.editor), editor_settings(self._plugins, config, config.model))
        parts = [config.dataset, config.edits, config.strict, config.plugins, needy, own]
        wanted = json.dumps(parts, sort_keys=True, default=str)
        if wanted not in self._facts:
            # Arms are compared on the same facts, so none may edit fewer because its editor needs subjects.
            records, notes = records_of(config, self._plugins, leave_out_subjectless=not self._mixed)
            self._facts[wanted] = ([record.request for record in records], content_hash(records))
            self._notes.update(dict.fromkeys(notes))
        return self._facts[wanted]

    def _code(self, config: RunConfig) -> Mapping[str, str]:
        dataset = dataset_name(config.dataset, self._plugins)
        names = config.part_names | ({dataset} if dataset is not None else set())
        if names not in self._versions:
            self._versions[names] = code_versions(self._plugins, names)
        return self._versions[names]

    def _hash(self, path: Path) -> str:
        if str(path) not in self._contents:
            self._contents[str(path)] = _content(path)
        return self._contents[str(path)]


def _why_left_out(error: EditcoreError) -> str:
    if isinstance(error, UnknownNameError) and error.kind != "preset":
        return f"the {error.kind} '{error.asked}' is not installed."
    return str(error)


def _in_a_sweep(error: MissingSettingError, config: RunConfig) -> str:
    """A missing setting, with the way to set it in a sweep."""
    cure = f"Set it with --set {config.editor}.{error.setting}={error.example}"
    if error.setting == "layers":
        cure += f", or let 'editctl onboard {config.model}' find it"
    return f"{error.problem} {cure}."


def _check_subjects(requests: Sequence[EditRequest], editor: EditorSpec, hparams: HParams) -> None:
    """Refuse requests without a subject where the editor looks subjects up.

    Raises:
        UnfitError: a request has no subject.
    """
    try:
        check_subjects(requests, editor, hparams)
    except RequestError as error:
        raise UnfitError(str(error)) from error


def _content(path: Path) -> str:
    """SHA-256 of a file, or of those files of a model folder that describe the model."""
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix.lower() not in (".md", ".lock"):
            digest.update(f"{file.name} {_content(file)}\n".encode())
    return digest.hexdigest()


def _section(name: str) -> str | None:
    """The owner of an axis that is a setting; ``None`` for an option of the run."""
    section, dot, _ = name.rpartition(".")
    return section if dot else None


def _nested(name: str, value: Any) -> dict[str, Any]:
    section, dot, key = name.rpartition(".")
    return {section: {key: value}} if dot else {name: value}


def _sections(table: Mapping[str, Any]) -> list[str]:
    return list(run_values(table).get("settings", {}))


def _named(options: Mapping[str, Any], registry: Plugins) -> set[str]:
    """Names of everything that a run uses."""
    plugins = options.get("plugins", ())
    several = [plugins] if isinstance(plugins, str) else plugins
    measuring = options.get("evaluators", DEFAULT_EVALUATORS)
    evaluators = [measuring] if isinstance(measuring, str) else measuring
    parts = (options.get("editor", ""), options.get("backend", "raw"), *several, *evaluators)
    default = RunConfig.model_fields["dataset"].default
    dataset = dataset_name(str(options.get("dataset", default)), registry)
    return {*map(str, parts), *([] if dataset is None else [dataset])}


def _excluded(entries: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> bool:
    return any(
        all(name in values and _is_one_of(values[name], wanted) for name, wanted in entry.items())
        for entry in entries
        if entry
    )


def _is_one_of(value: Any, wanted: Any) -> bool:
    return bool(value == wanted or (isinstance(wanted, list | tuple) and value in wanted))
