"""Measures any model on facts: a run, a pack, an adapter, or a model that was edited elsewhere.

What a model was asked is kept by its state (:mod:`editcore.runs.model_state`), in the cache folder. So the same
evaluation, repeated after an interruption or later, asks only what was not asked yet.
"""

from __future__ import annotations

import hashlib
import math
import platform
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from editcore._util.files import json_text, write_text
from editcore._util.folders import new_folder, refuse_existing
from editcore._util.memory import peak_memory_bytes, release
from editcore._util.paths import cache_dir
from editcore.datasets import content_hash
from editcore.evaluation import perplexity
from editcore.evaluation.measures import measures_of
from editcore.evaluation.measuring import measure
from editcore.evaluation.summaries import Measurement, Summary
from editcore.interfaces.documented import documented
from editcore.interfaces.metrics import Observation
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.protocols import Evaluator
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord
from editcore.models.answers import AnswerStore
from editcore.models.language_model import LanguageModel
from editcore.plugins.registry import Plugins
from editcore.plugins.versions import code_versions
from editcore.runs.evaluation_record import (
    EVALUATION_NAME,
    EvaluationRecord,
    HarnessScore,
    Perplexity,
    QuestionCounts,
)
from editcore.runs.harness import HarnessPlan, harness_identity, harness_scores
from editcore.runs.held_out import TEXT_TOKENS, HeldOutText
from editcore.runs.outcome import notes_on, tallies_of
from editcore.runs.parts import make_evaluators
from editcore.runs.record import REQUESTS_NAME, DatasetRecord, installed_versions
from editcore.runs.results import Phases, write_observations
from editcore.runs.targets import Opened, OpenedRecord, Target
from editcore.second_moments.corpora import open_corpus

__all__ = ["Evaluated", "EvaluationPlan", "evaluate"]

ANSWERS = "answers"
"""The folder of the cache with the answers of models."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What is measured."""

    dataset: str
    """Where the records are from, for the record of the evaluation."""
    own_facts: bool = False
    """Whether they are what the target's edits write, in the order in which they were written."""
    evaluators: Sequence[str]
    """Names of evaluators."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Their hyperparameters, by name."""
    text: str | None = None
    """A text for the perplexity, as :func:`editcore.second_moments.open_corpus` knows it; ``None`` for none."""
    text_tokens: int = TEXT_TOKENS
    """Tokens of it, from its start."""
    harness: HarnessPlan | None = None
    """Tasks of lm-eval; ``None`` for none."""
    seed: int = 0
    """Of everything random in the measurements."""
    fresh: bool = False
    """Whether to ask everything again, and to keep nothing."""
    notes: Sequence[str] = ()
    """Sentences on the records."""
    command: Sequence[str] = ()
    """The command line, for the record."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A finished evaluation."""

    directory: Path
    """Its folder."""
    record: EvaluationRecord
    """What is in ``evaluation.json``."""
    before: Summary | None
    """Of the unedited model; ``None`` for a model without a base."""
    after: Summary
    """Of the model with its edits, or of the only one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What was measured of a model in one state."""

    about: OpenedRecord
    measured: Measurement
    text: HeldOutText | None
    perplexity: float
    harness: tuple[HarnessScore, ...]
    peak: int
    """Most bytes of memory so far."""


def evaluate(
    target: Target,
    records: Sequence[FactRecord],
    *,
    plan: EvaluationPlan,
    out: Path | str,
    plugins: Plugins,
    progress: Progress = silent,
) -> Evaluated:
    """Measure a target on records, without its edits and with them, and write the folder of the evaluation.

    Raises:
        EditcoreError: the model cannot be loaded, or an evaluator failed. No folder is written; what was asked is kept
            for the next time.
    """
    out = Path(out)
    refuse_existing(out, option="--out")
    start, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    job = _Job(plan, records, plugins=plugins, progress=progress)
    before, after = job.measured(target)
    measures = measures_of(spec for spec, _ in job.evaluators)
    of_before = Measurement(measures=measures, observations={}) if before is None else before.measured
    about = after.about
    record = EvaluationRecord(
        target=target.name,
        kind=target.kind,
        base=target.base if before is None else before.about.source,
        model=about.record if before is None else before.about.record,
        state=about.state,
        dtype=about.dtype,
        device=about.device,
        method=target.method,
        dataset=DatasetRecord(name=plan.dataset, records=len(records), hash=content_hash(records)),
        own_facts=plan.own_facts,
        evaluators=tuple(plan.evaluators),
        settings=job.settings,
        seed=plan.seed,
        metrics=measures,
        before=of_before.summary.as_json(),
        after=after.measured.summary.as_json(),
        averages=Phases(before=dict(of_before.summary.averages), after=dict(after.measured.summary.averages)),
        tallies=tallies_of(after.measured, records),
        perplexity=None if after.text is None else Perplexity(text=after.text.info(), after=after.perplexity),
        harness_before=() if before is None else before.harness,
        harness=after.harness,
        questions=QuestionCounts(asked=job.asked, known=job.known),
        seconds=time.perf_counter() - start,
        peak_memory_bytes=after.peak,
        notes=tuple(dict.fromkeys([*plan.notes, *job.notes, *notes_on(after.measured, records, plugins)])),
        versions=installed_versions(plugins),
        python=platform.python_version(),
        platform=platform.platform(),
        command=shlex.join(plan.command) if plan.command else None,
        started=started,
    )
    with new_folder(out) as folder:
        write_observations(folder, of_before, after.measured, records)
        write_text(folder / REQUESTS_NAME, "".join(f"{fact.model_dump_json()}\n" for fact in records))
        for kept in [] if job.folder is None else sorted(job.folder.iterdir()):
            shutil.copyfile(kept, folder / kept.name)
        record.write_file(folder / EVALUATION_NAME)
    summary = None if before is None else before.measured.summary
    return Evaluated(directory=out, record=record, before=summary, after=after.measured.summary)


class _Job:
    """Measures models on the same records."""

    def __init__(
        self, plan: EvaluationPlan, records: Sequence[FactRecord], *, plugins: Plugins, progress: Progress
    ) -> None:
        self.plan, self.records = plan, records
        self.evaluators = make_evaluators(plugins, plan.evaluators, plan.settings)
        self.asked = self.known = 0
        """Questions, of all models together."""
        self.notes: dict[str, None] = {}
        """What evaluators have told, in their order."""
        self._plugins, self._progress = plugins, progress

    @property
    def settings(self) -> dict[str, Any]:
        """Hyperparameters of the evaluators that have some, by name."""
        hparams = {spec.name: getattr(evaluator, "hparams", None) for spec, evaluator in self.evaluators}
        return {name: own.model_dump(mode="json") for name, own in hparams.items() if own is not None}

    @cached_property
    def folder(self) -> Path | None:
        """Where evaluators keep what is costly to ask again, such as replies of a judge; ``None`` to keep nothing."""
        if self.plan.fresh:
            return None
        what = json_text([self._records, self.settings])
        folder = cache_dir() / ANSWERS / f"kept-{hashlib.sha256(what.encode()).hexdigest()[:32]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def _records(self) -> str:
        return content_hash(self.records)

    def measured(self, target: Target) -> tuple[_Found | None, _Found]:
        """A target without its edits, if it can be without them, and with them."""
        found: list[_Found] = []
        with closing(target.states(self._plugins, self._progress)) as states:
            for opened in states:
                found.append(self._measure(opened, found[0] if found else None))
                del opened  # before the next model is loaded
                release()
        return (found[0] if len(found) > 1 else None), found[-1]

    def _measure(self, opened: Opened, before: _Found | None) -> _Found:
        model, plan = opened.model, self.plan
        path = cache_dir() / ANSWERS / f"{opened.about.state[:32]}.sqlite"
        store = None if plan.fresh else AnswerStore(path)
        observations: dict[str, Sequence[Observation]] = {}
        with model.remembering(store):
            for spec, evaluator in self.evaluators:
                earlier = None if before is None else before.measured.observations[spec.name]
                observations[spec.name] = self._observed((spec, evaluator), model, earlier)
            text = self._text(model) if before is None else before.text
            value = math.nan if text is None else text.perplexity if before is None else self._perplexity(model, text)
            scores = () if plan.harness is None else self._scores(model, plan.harness)
        if store is not None:
            self.asked += store.asked
            self.known += store.found
        return _Found(
            about=opened.about,
            measured=Measurement(measures=measures_of(spec for spec, _ in self.evaluators), observations=observations),
            text=text,
            perplexity=value,
            harness=scores,
            peak=peak_memory_bytes(model.device),
        )

    def _observed(
        self, pair: tuple[EvaluatorSpec, Evaluator], model: LanguageModel, earlier: Sequence[Observation] | None
    ) -> Sequence[Observation]:
        """The observations of one evaluator, which are kept as a whole, too: it may ask the model in ways of its own.

        Args:
            earlier: its observations of the unedited model; ``None`` while that is measured.
        """
        (spec, _), seed = pair, self.plan.seed
        question = {
            "evaluator": spec.name,
            "settings": self.settings.get(spec.name),
            "code": dict(code_versions(self._plugins, [spec.name])),
            "records": self._records,
            "prompt_form": asdict(model.prompt_form),
            "seed": seed,
            "unedited": None if earlier is None else hashlib.sha256(json_text(_rows(earlier)).encode()).hexdigest(),
        }
        known = self._known(model, "observations", question)
        if known is None:
            unedited = None if earlier is None else {spec.name: earlier}
            measured = measure(
                [pair], model, self.records, unedited=unedited, seed=seed, progress=self._progress, folder=self.folder
            )
            found = measured.observations[spec.name]
            self.notes |= dict.fromkeys(measured.notes)
            if not measured.notes:  # otherwise something is missing that the next time may have
                self._keep(model, "observations", question, _rows(found))
            return found
        return tuple(Observation(**dict(zip(_FIELDS, row, strict=True))) for row in known)

    def _text(self, model: LanguageModel) -> HeldOutText | None:
        """The text for the perplexity, measured on the unedited model."""
        if self.plan.text is None:
            return None
        corpus, tokens = open_corpus(self.plan.text, seed=self.plan.seed), self.plan.text_tokens
        question = [corpus.identity(), tokens]
        known = self._known(model, "text", question)
        if known is not None:
            return HeldOutText.model_validate(known)
        found = HeldOutText.measured(model, corpus, tokens=tokens, progress=self._progress)
        self._keep(model, "text", question, found.model_dump(mode="json"))
        return found

    def _perplexity(self, model: LanguageModel, text: HeldOutText) -> float:
        question = [list(text.ids), text.window]
        known = self._known(model, "perplexity", question)
        if known is None:
            known = perplexity(model, text.ids, window=text.window, progress=self._progress)
            self._keep(model, "perplexity", question, known)
        return float(known)

    def _scores(self, model: LanguageModel, plan: HarnessPlan) -> tuple[HarnessScore, ...]:
        question = harness_identity(plan)
        known = self._known(model, "harness", question)
        if known is not None:
            return tuple(HarnessScore.model_validate(result) for result in known)
        found = harness_scores(model, plan)
        self._keep(model, "harness", question, [result.model_dump(mode="json") for result in found])
        return found

    def _known(self, model: LanguageModel, kind: str, question: object) -> Any:
        if model.answers is None:
            return None
        (known,) = model.answers.known(kind, [question])
        return known

    def _keep(self, model: LanguageModel, kind: str, question: object, answer: object) -> None:
        if model.answers is not None:
            model.answers.keep(kind, [(question, answer)])


_FIELDS = tuple(field.name for field in fields(Observation))


def _rows(observations: Sequence[Observation]) -> list[list[Any]]:
    return [[getattr(observation, name) for name in _FIELDS] for observation in observations]
