"""Makes the tables of a sweep from the run directories of its trials. Formats: docs/reference/sweeps.md."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from editcore._util.files import replacing
from editcore.evaluation.measures import Measure, retention_of, shown
from editcore.evaluation.summaries import Average, average_of
from editcore.interfaces.errors import RunError
from editcore.interfaces.metrics import HOLDS
from editcore.runs.record import read_requests
from editcore.runs.results import RESULTS_NAME, RunSummary
from editcore.sweeps.file import UNEDITED
from editcore.sweeps.plan import Plan, Point, Trial
from editcore.sweeps.state import failure_of, state_of, trial_directory

__all__ = ["mean_table", "result_table", "retention_table", "unedited_table", "write_tables"]

_TIMES = ("seconds", "seconds_per_edit", "peak_memory_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """A finished trial."""

    summary: RunSummary
    keys: Mapping[str, str]
    """The sweep's key of each metric, by its key in the trial's summary."""
    held: pd.Series[float]
    """By fact, in the order of editing: 1 if it is retained after the last edit, 0 if not, NaN if that is not known,
    because it is not active or was not asked."""


def write_tables(plan: Plan, directory: Path) -> tuple[pd.DataFrame, pd.DataFrame, tuple[str, ...]]:
    """Write every table of a sweep.

    Returns:
        The table of trials and the table of retention by age, from which figures are drawn; and notes on what the
        tables lack.
    """
    folder = directory / plan.title
    results = {key: _read(trial_directory(directory, key), plan.measures) for key in _finished(plan, directory)}
    table = result_table(plan, directory, results)
    retention = retention_table(plan, results)
    known = {key for result in results.values() for key, value in _scores(result, "after").items() if value == value}
    columns = (
        *shown(plan.measures),
        *shown(plan.measures, known),
    )  # the usual columns are always there, even if not measured
    metrics = list(dict.fromkeys(measure.key for measure in columns))
    unedited = unedited_table(plan, results)
    means = mean_table(table, plan.axes, metrics)
    if len(unedited):
        means = pd.concat([mean_table(unedited, plan.axes, metrics), means], ignore_index=True)
    _write_csv(table, folder / f"{plan.title}.csv")
    with replacing(folder / f"{plan.title}.parquet") as path:
        _uniform(table, plan.axes).to_parquet(path, index=False)
    _write_csv(means, folder / f"{plan.title}_mean.csv")
    _write_csv(retention, folder / "retention.csv")
    _write_csv(_timings(plan, results), folder / "timings.csv")
    if len(unedited) or not results:
        return table, retention, ()
    lacking = (
        "The means have no row of the unedited model, because the arms do not share data, model and evaluators. The "
        f"columns before_METRIC of {plan.title}.csv have what was measured of it."
    )
    return table, retention, (lacking,)


def result_table(plan: Plan, directory: Path, results: Mapping[str, _Result]) -> pd.DataFrame:
    """A row per point that was run, in the order of the plan."""
    rows = []
    for point in plan.points:
        state = state_of(directory, point.key)
        if state == "waiting":
            continue
        row = {**_head(plan, point), "key": point.key, "status": state, "error": ""}
        if state == "failed":
            row["error"] = failure_of(directory, point.key).error
        else:
            row = {
                **_measured(results[point.key], point),
                **row,
            }  # the axis ``edits`` has the number that was asked for
        rows.append(row)
    first = list(dict.fromkeys(["arm", *plan.axes, "seed", "key", "status", "error", "edits", "rejected"]))
    metrics = [measure.key for measure in shown(plan.measures)]
    always = [name for metric in metrics for name in (metric, f"{metric}_low", f"{metric}_high")]
    last = list(dict.fromkeys(name for row in rows for name in row))
    before = [name for name in last if name.startswith("before_")]
    measured = {
        name for measure in plan.measures for name in (measure.key, f"{measure.key}_low", f"{measure.key}_high")
    }
    counts = [name for name in last if "." in name and name not in {*plan.axes, *measured, *before}]
    middle = [name for name in last if name not in {*first, *always, *before, *counts, "retention"}]
    columns = [*first, *always, *middle, "retention", *before, *counts]
    counts_of_facts = [name for name in ("edits", "rejected") if name not in plan.axes]
    return _frame(rows, columns, plan.axes).astype(dict.fromkeys(counts_of_facts, "Int64"))


def unedited_table(plan: Plan, results: Mapping[str, _Result]) -> pd.DataFrame:
    """The measurements of the unedited model, as rows like those of trials, one per seed.

    Trials on other data, with another model or with other evaluators have another measurement of the unedited model. It
    has rows of its own, with the values of the axes that distinguish it from the others. If no axes distinguish them,
    there are no rows at all.
    """
    measured: dict[str, list[Point]] = {}
    for point in plan.points:
        if point.key in results:
            measured.setdefault(_unedited_identity(plan.trials[point.key]), []).append(point)
    groups = list(measured.values())
    distinguishing = _distinguishing_values(groups, plan.axes)
    if len({str(values) for values in distinguishing}) < len(groups):
        return pd.DataFrame()
    rows = []
    for points, values in zip(groups, distinguishing, strict=True):
        by_seed = dict(reversed([(point.seed, point.key) for point in points]))  # the first trial of each seed
        rows += [
            {"arm": UNEDITED, **values, "seed": seed, "status": "finished", **_scores(results[key], "before")}
            for seed, key in sorted(by_seed.items())
        ]
    metrics = [f"{measure.key}{end}" for measure in plan.measures for end in ("", "_low", "_high")]
    return _frame(rows, ["arm", *plan.axes, "seed", "status", *metrics, "retention"], plan.axes)


def _unedited_identity(trial: Trial) -> str:
    """Everything that decides the measurement of the unedited model, except the seed."""
    config = trial.config
    parts = {
        "model": [config.model, trial.contents.get("model"), config.device, config.dtype, config.chat_template],
        "records": trial.contents["records"],
        "evaluators": {name: config.settings.get(name) for name in config.evaluators},
    }
    return json.dumps(parts, sort_keys=True, default=str)


def _distinguishing_values(groups: Sequence[Sequence[Point]], axes: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    """For each group of points, the values of the axes that differ between groups but not within a group."""
    distinguishing: list[dict[str, Any]] = [{} for _ in groups]
    for name in axes:
        values = [[point.values.get(name) for point in points] for points in groups]
        constant = all(value == found[0] for found in values for value in found)
        if constant and any(found[0] != values[0][0] for found in values):
            for group, found in zip(distinguishing, values, strict=True):
                group[name] = found[0]
    return distinguishing


def mean_table(table: pd.DataFrame, axes: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Means over seeds with 95 % intervals, a row per arm and values of the axes.

    Over two or more seeds the interval is Student's t; for one seed it is the interval over facts.
    """
    groups: dict[str, list[Any]] = {}
    finished = table[table["status"] == "finished"]
    for place in finished.index:
        identity = json.dumps([_plain(finished.at[place, name]) for name in ("arm", *axes)], default=str)
        groups.setdefault(identity, []).append(place)
    metrics = [name for name in (*metrics, "retention") if name in table]
    rows = []
    for places in groups.values():
        first = finished.loc[places[0]]
        row: dict[str, Any] = {name: first[name] for name in ("arm", *axes)}
        row |= {"seeds": len(places), "interval": "seeds" if len(places) > 1 else "facts"}
        for name in metrics:
            values = finished.loc[places, name].astype(float).dropna().to_numpy()
            facts = [_number(first.get(f"{name}_{end}")) for end in ("low", "high")]
            low, high = interval(values) if len(places) > 1 else facts
            row |= {name: _mean(values), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    columns = ["arm", *axes, "seeds", "interval", *(c for n in metrics for c in (n, f"{n}_low", f"{n}_high"))]
    return _frame(rows, columns, axes)


def retention_table(plan: Plan, results: Mapping[str, _Result]) -> pd.DataFrame:
    """Retention after the last edit, by the number of edits made since a fact was edited, in steps of the batch size.

    Columns: ``arm``, axes, ``seed``, ``age`` (edits made after the fact's batch), ``facts``, ``retained`` in percent
    with its 95 % interval over facts.
    """
    rows = []
    for point in plan.points:
        facts_held = results[point.key].held.to_numpy() if point.key in results else np.array([])
        for start in range(0, len(facts_held), point.batch_size):
            part = facts_held[start : start + point.batch_size]
            known = part[~np.isnan(part)]
            found = average_of([str(number) for number in range(len(known))], known)
            if found is not None:
                age = len(facts_held) - start - len(part)
                low, high = found.interval
                held = {"age": age, "facts": found.facts, "retained": found.mean}
                rows.append({**_head(plan, point), **held, "retained_low": low, "retained_high": high})
    columns = ["arm", *plan.axes, "seed", "age", "facts", "retained", "retained_low", "retained_high"]
    return _frame(rows, columns, plan.axes)


def interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """95 % confidence interval of a mean of independent values, by Student's t; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    from scipy.special import stdtrit  # a quarter of a second, and only tables need it

    half = float(stdtrit(len(values) - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return _mean(values) - half, _mean(values) + half


def _finished(plan: Plan, directory: Path) -> Iterable[str]:
    return (key for key in plan.trials if state_of(directory, key) == "finished")


def _read(trial: Path, measures: Sequence[Measure]) -> _Result:
    try:
        summary = RunSummary.read(trial)
        order = [record.request.id for record in read_requests(trial)]
        table = pd.read_parquet(trial / RESULTS_NAME)
        own = {(metric.evaluator, metric.name): metric.key for metric in summary.metrics}
        keys = {
            own[measure.evaluator, measure.name]: measure.key
            for measure in measures
            if (measure.evaluator, measure.name) in own
        }
        retention_measure = retention_of(measures, [keys[key] for key in summary.averages.after if key in keys])
        after = table[table["phase"] == "after"]
        if retention_measure is not None:
            after = after[after["metric"] == own.get((retention_measure.evaluator, retention_measure.name))]
        values = after.groupby("request_id")["value"].mean()
    except (RunError, OSError, ValueError, KeyError, TypeError) as error:
        why = " ".join(str(error).split()).removesuffix(".")
        raise RunError(
            f"The results of {trial} cannot be read ({why}). Remove the folder to have the trial run again."
        ) from error
    held = values.reindex(order).astype(float) if retention_measure is not None else pd.Series(np.nan, index=order)
    return _Result(summary=summary, keys=keys, held=(held >= HOLDS).astype(float).where(held.notna()))


def _head(plan: Plan, point: Point) -> dict[str, Any]:
    return {"arm": point.arm, **{name: point.values.get(name) for name in plan.axes}, "seed": point.seed}


def _measured(result: _Result, point: Point) -> dict[str, Any]:
    summary = result.summary
    row: dict[str, Any] = {"edits": summary.edits, "rejected": summary.rejected}
    row |= _scores(result, "after")
    row |= {f"before_{key}": _number(summary.before.get(own)) for own, key in result.keys.items()}
    row["retention"] = 100 * _mean(result.held.to_numpy()[: -point.batch_size])
    for owner, counted in summary.extensions.items():
        numbers = {name: value for name, value in counted.items() if isinstance(value, bool | int | float)}
        row |= {f"{owner}.{name}": float(value) for name, value in numbers.items()}
    return row


def _scores(result: _Result, phase: Literal["before", "after"]) -> dict[str, float]:
    """Every metric with its interval over facts."""
    found: dict[str, float] = {}
    values, averages = (getattr(part, phase) for part in (result.summary, result.summary.averages))
    for own, key in result.keys.items():
        found[key] = _number(values.get(own))
        found[f"{key}_low"], found[f"{key}_high"] = _over_facts(averages.get(own))
    return found


def _over_facts(average: Average | None) -> tuple[float, float]:
    """The 95 % interval over the facts of one trial; NaN for a composite, which is not a mean over facts, and for one
    fact."""
    return average.interval if average is not None and average.units > 1 else (math.nan, math.nan)


def _timings(plan: Plan, results: Mapping[str, _Result]) -> pd.DataFrame:
    rows = [
        {
            **_head(plan, point),
            "key": point.key,
            "seconds": sum(results[point.key].summary.seconds.values()),
            "seconds_per_edit": results[point.key].summary.seconds_per_edit,
            "peak_memory_bytes": results[point.key].summary.peak_memory_bytes,
        }
        for point in plan.points
        if point.key in results
    ]
    return _frame(rows, ["arm", *plan.axes, "seed", "key", *_TIMES], plan.axes)


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], axes: Sequence[str]) -> pd.DataFrame:
    """A table in which axes keep their values. Otherwise pandas would turn integers into floats if one is missing."""
    objects = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in axes}
    frame = pd.DataFrame([{k: v for k, v in row.items() if k not in objects} for row in rows], columns=list(columns))
    return frame.assign(**objects)


def _uniform(table: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """The table with axes of mixed or nested values as text, because a column of a Parquet file has one type."""
    mixed = [name for name in axes if len({_sort(value) for value in table[name]} - {type(None)}) > 1]
    nested = [name for name in axes if any(isinstance(value, list | tuple | dict) for value in table[name])]
    return table.assign(**{name: _texts(table[name]) for name in {*mixed, *nested}})


def _sort(value: object) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _texts(column: pd.Series[Any]) -> pd.Series[Any]:
    return column.map(lambda value: None if value is None else str(value))


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(values: np.ndarray[Any, Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
