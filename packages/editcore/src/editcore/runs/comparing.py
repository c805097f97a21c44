"""Compares the results of two runs or evaluations, on the facts that both measured. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._util.words import counted
from editcore.evaluation.measures import Measure
from editcore.evaluation.paired import PairedDifference, Unit, Values, paired_differences
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.metrics import HOLDS
from editcore.interfaces.values import EditRequest
from editcore.runs.evaluation_record import EVALUATION_NAME, EvaluationRecord
from editcore.runs.record import RUN_NAME, DatasetRecord, RunRecord, read_requests
from editcore.runs.results import RESULTS_NAME, SUMMARY_NAME, RunSummary, read_observations
from editcore.runs.resume import resume_command

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ChangedSides", "ComparedResults", "compare_results"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedSides:
    """The facts that hold in one of two results alone, by one metric."""

    measure: Measure
    """The metric."""
    only_first: tuple[EditRequest, ...]
    """Facts that hold in the first results and not in the second."""
    only_second: tuple[EditRequest, ...]
    """The reverse."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedResults:
    """Two results, compared on what both measured."""

    names: tuple[str, str]
    """Their directories."""
    facts: tuple[int, int]
    """How many facts each has."""
    shared: int
    """Facts that are in both."""
    differences: tuple[PairedDifference, ...]
    """By metric, second minus first."""
    changed: tuple[ChangedSides, ...]
    """By metric that says whether a fact holds."""
    notes: tuple[str, ...]
    """Sentences on what else differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Results:
    """The results in a directory."""

    directory: Path
    metrics: tuple[Measure, ...]
    dataset: DatasetRecord
    model: tuple[str, str]
    """Name and fingerprint of the unedited model."""
    settings: Mapping[str, Any]
    """Hyperparameters of the evaluators, by name."""
    facts: Mapping[Unit, EditRequest]
    values: Mapping[str, Values]
    """By the key of the metric, with the edits."""

    @property
    def about(self) -> str:
        """The facts in words."""
        return f"{counted(len(self.facts), 'fact')} of {self.dataset.name}"


def compare_results(first: Path | str, second: Path | str, *, seed: int = 0) -> ComparedResults:
    """Compare what was measured with the edits, on the questions that both results have an answer to.

    Args:
        first: a finished run directory, or a folder of an evaluation.
        second: the same.
        seed: of the bootstrap.

    Raises:
        RunError: a directory has no results, or they have no fact or no metric in common.
    """
    ours, theirs = _read(Path(first)), _read(Path(second))
    shared = [fact for fact in ours.facts if fact in theirs.facts]
    if not shared:
        raise RunError(
            f"{first} is about {ours.about}, {second} about {theirs.about}: no fact is in both, so they cannot be "
            "compared. 'editctl evaluate TARGET --dataset DATA' measures a model on other facts."
        )
    theirs_by_name = {(measure.evaluator, measure.name): measure for measure in theirs.metrics}
    keys = {
        measure.key: theirs_by_name[measure.evaluator, measure.name].key
        for measure in ours.metrics
        if (measure.evaluator, measure.name) in theirs_by_name
    }
    measures = tuple(measure for measure in ours.metrics if measure.key in keys)
    differences = paired_differences(
        measures,
        ours.values,
        {key: theirs.values[other] for key, other in keys.items() if other in theirs.values},
        seed=seed,
    )
    if not differences:
        raise RunError(
            f"{first} and {second} have {counted(len(shared), 'fact')} in common, and no question that both asked: "
            f"{first} was measured by {_evaluators(ours)}, {second} by {_evaluators(theirs)}."
        )
    return ComparedResults(
        names=(str(first), str(second)),
        facts=(len(ours.facts), len(theirs.facts)),
        shared=len(shared),
        differences=differences,
        changed=tuple(_changed(measures, keys, ours, theirs)),
        notes=tuple(_notes(ours, theirs)),
    )


def _evaluators(results: _Results) -> str:
    return ", ".join(dict.fromkeys(measure.evaluator for measure in results.metrics))


def _read(directory: Path) -> _Results:
    if (directory / EVALUATION_NAME).exists():
        record = EvaluationRecord.read(directory)
        metrics, dataset, model = record.metrics, record.dataset, (record.model.name, record.model.fingerprint)
        settings: Mapping[str, Any] = record.settings
    else:
        if not (directory / RUN_NAME).exists():
            raise RunError(
                f"There are no results in {directory}: it is neither a run directory ({RUN_NAME}) nor a folder of "
                f"'editctl evaluate' ({EVALUATION_NAME})."
            )
        run = RunRecord.read(directory)
        if run.dataset is None:
            raise RunError(
                f"There are no results in {directory}: it was made without a data set. 'editctl evaluate {directory}' "
                "measures its facts."
            )
        if not (directory / SUMMARY_NAME).exists():
            raise RunError(
                f"The run in {directory} has no results yet ({SUMMARY_NAME} is not there); finish it with: "
                f"{resume_command(directory)}"
            )
        metrics, dataset = RunSummary.read(directory).metrics, run.dataset
        model = (run.config.model, run.model.fingerprint)
        settings = {name: own for name, own in run.settings.items() if name in run.config.evaluators}
    requests = [fact.request for fact in read_requests(directory)]
    facts = {request.id: _fact(request) for request in requests}
    frame = read_observations(directory / RESULTS_NAME)
    frame = frame[frame["phase"] == "after"]
    return _Results(
        directory=directory,
        metrics=metrics,
        dataset=dataset,
        model=model,
        settings=settings,
        facts={_fact(request): request for request in requests},
        values=dict(_values(frame, metrics, facts)),
    )


def _fact(request: EditRequest) -> Unit:
    """What a request asks for, whatever its id."""
    return (*request.fact_key, request.continuation, request.target_true or "")


def _values(frame: pd.DataFrame, metrics: Sequence[Measure], facts: Mapping[str, Unit]) -> Iterator[tuple[str, Values]]:
    columns = [frame[name].astype(str).tolist() for name in ("request_id", "metric", "kind", "prompt")]
    rows: dict[str, dict[Unit, dict[Unit, list[float]]]] = {}
    by_key = {measure.key: measure for measure in metrics}
    for request_id, key, kind, prompt, value in zip(*columns, frame["value"].tolist(), strict=True):
        if key not in by_key:
            continue
        fact, question = facts.get(request_id, (request_id,)), (kind, prompt)
        if by_key[key].about == "model":  # its facts mean nothing
            unit: Unit = question
        else:
            unit = fact if by_key[key].average == "facts" else (*fact, *question)
        rows.setdefault(key, {}).setdefault(unit, {}).setdefault(question, []).append(value)
    for key, units in rows.items():
        yield (
            key,
            {
                unit: {question: sum(found) / len(found) for question, found in asked.items()}
                for unit, asked in units.items()
            },
        )


def _changed(
    measures: Sequence[Measure], keys: Mapping[str, str], ours: _Results, theirs: _Results
) -> Iterator[ChangedSides]:
    for measure in measures:
        if not (measure.retention or measure.tally):
            continue
        first, second = ours.values.get(measure.key, {}), theirs.values.get(keys[measure.key], {})
        sides = {
            fact: tuple(sum(found[fact].values()) / len(found[fact]) >= HOLDS for found in (first, second))
            for fact in first
            if fact in second and fact in ours.facts
        }
        if sides:
            yield ChangedSides(
                measure=measure,
                only_first=tuple(ours.facts[fact] for fact, side in sides.items() if side == (True, False)),
                only_second=tuple(ours.facts[fact] for fact, side in sides.items() if side == (False, True)),
            )


def _notes(ours: _Results, theirs: _Results) -> Iterator[str]:
    if ours.model[1] != theirs.model[1]:
        yield (
            f"The base models differ ({ours.model[0]}, {theirs.model[0]}), so a difference may be theirs and not that "
            "of the edits."
        )
    if ours.dataset.hash != theirs.dataset.hash:
        yield f"The facts are not all the same: {ours.about} and {theirs.about}."
    for name in ours.settings.keys() & theirs.settings.keys():
        our, their = ours.settings[name], theirs.settings[name]
        for key in sorted(our.keys() | their.keys()):
            if our.get(key) != their.get(key):
                yield f"{name}.{key} was {our.get(key)} and {their.get(key)}; answers may differ by that."
