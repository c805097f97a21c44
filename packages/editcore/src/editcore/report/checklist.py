"""The checklist of a report: everything that a reviewer asks of an edited model. What was not measured says so, and
names the option that measures it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from editcore._util.words import counted
from editcore.evaluation import Measure, Summary
from editcore.interfaces.metrics import ChecklistItem
from editcore.report.document import Cell, Column, Row, Table, one_line
from editcore.runs.evaluation_record import HarnessScore, MethodRecord
from editcore.runs.record import ModelRecord

if TYPE_CHECKING:
    from editcore.plugins.registry import Plugins

__all__ = ["Checked", "checklist", "evaluators_by_item"]

_NAMES: Mapping[ChecklistItem, str] = {
    "teacher-forced success": "Success, teacher-forced",
    "generated success": "Success, generated",
    "rephrase": "Success on rephrased prompts",
    "locality, unchanged": "Locality: unchanged",
    "locality, correct": "Locality: correct",
    "capability": "Capability",
}
_NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What is known of an edited model."""

    model: ModelRecord
    """Of the unedited model."""
    dtype: str
    method: MethodRecord | None
    """``None`` where it is not known how the edits were made."""
    before: Summary
    after: Summary
    first: str
    """A sentence on the facts that were written first; empty where there is none."""
    perplexity: tuple[float, str] | None
    """The edited model's perplexity over the unedited one's, and the text; ``None`` where it was not measured."""
    measure_text: str
    """The option that measures the perplexity."""
    harness: Sequence[HarnessScore]
    """Scores of lm-eval."""
    harness_before: Sequence[HarnessScore]
    seconds_per_edit: float | None
    """``None`` where it is not known."""
    peak_memory: str
    """In words."""


def evaluators_by_item(plugins: Plugins) -> Mapping[str, Sequence[str]]:
    """By item of the checklist, the names of the installed evaluators that answer it."""
    found: dict[str, list[str]] = {}
    for spec in plugins.evaluators().values():
        for item in dict.fromkeys(metric.checklist for metric in spec.metrics if metric.checklist):
            found.setdefault(item, []).append(spec.name)
    return found


def checklist(checked: Checked, evaluators: Mapping[str, Sequence[str]]) -> Table:
    """The checklist as a table.

    Args:
        evaluators: by item, the names of evaluators that answer it.
    """
    rows = [
        *_making(checked),
        *(row for item in get_args(ChecklistItem) for row in _item(item, checked, evaluators.get(item, ()))),
        *_rest(checked),
    ]
    return Table(
        caption="What a reviewer asks, with 95 % intervals. What was not measured says how to measure it.",
        columns=[Column("item"), Column("measure"), Column("before"), Column("after"), Column("of")],
        rows=rows,
    )


def _missing(name: str, how: str) -> Row:
    return [name, "", "", Cell(_NOT_MEASURED, tone="quiet"), one_line(how)]


def _making(checked: Checked) -> Iterator[Row]:
    model, method = checked.model, checked.method
    hub = f"{model.hub.id} at {model.hub.revision or 'an unknown revision'}, " if model.hub is not None else ""
    yield ["Model", one_line(model.name), "", one_line(f"{hub}weights {model.fingerprint[:12]}"), checked.dtype]
    if method is None:
        yield ["Method", "", "", Cell("not known", tone="quiet"), "the files do not say how they were edited"]
        return
    yield ["Method", method.name, "", f"hyperparameters {method.settings_hash}", ""]
    size = "" if method.batch_size is None else f"{method.batch_size} at a time"
    yield ["Edits", "", "", Cell(counted(method.edits, "fact"), order=method.edits), size]


def _item(item: ChecklistItem, checked: Checked, evaluators: Sequence[str]) -> Iterator[Row]:
    name = _NAMES[item]
    asked = [measure for measure in checked.after.measures if measure.checklist == item]
    known = [measure for measure in asked if measure.key in checked.after.averages]
    for measure in known:
        yield [name, measure.label, *(_value(measure, summary) for summary in (checked.before, checked.after)), _of(
            measure, checked.after
        )]  # fmt: skip
    if item == "capability":
        yield from _harness(name, checked)
    if known or (item == "capability" and checked.harness):
        return
    needs = [measure.needs for measure in asked if measure.needs]
    if needs:
        yield _missing(name, f"the records have none: it needs {' or '.join(dict.fromkeys(needs))}")
        return
    options = " or ".join(f"--evaluator {evaluator}" for evaluator in evaluators)
    also = " or --lm-eval TASKS" if item == "capability" else ""
    yield _missing(
        name, f"'editctl evaluate' with {options}{also}" if options else "no installed evaluator measures it"
    )


def _value(measure: Measure, summary: Summary) -> Cell:
    """A mean with its interval."""
    average = summary.averages.get(measure.key)
    if average is None:
        return Cell("", order=math.nan)
    unit = f" {measure.unit}" if measure.unit else ""
    ends = summary.interval(measure.key)
    around = "" if ends is None else f" ({measure.text(ends[0])} to {measure.text(ends[1])})"
    return Cell(f"{measure.text(average.mean)}{unit}{around}", order=average.mean)


def _of(measure: Measure, summary: Summary) -> str:
    """How many facts or questions are behind a mean."""
    average = summary.averages[measure.key]
    if average.within == "facts":
        return counted(average.facts, "fact")
    return counted(average.prompts, "question")


def _harness(name: str, checked: Checked) -> Iterator[Row]:
    before = {(result.task, result.metric): result for result in checked.harness_before}
    for result in checked.harness:
        was = before.get((result.task, result.metric))
        yield [
            name,
            one_line(f"lm-eval {result.task}, {result.metric}"),
            "" if was is None else _score(was),
            _score(result),
            counted(result.questions, "question"),
        ]


def _score(result: HarnessScore) -> Cell:
    ends = result.interval
    around = "" if ends is None else f" ({ends[0]:.4g} to {ends[1]:.4g})"
    return Cell(f"{result.value:.4g}{around}", order=result.value)


def _rest(checked: Checked) -> Iterator[Row]:
    name = "Facts written first"
    if checked.first:
        yield [name, "", "", one_line(checked.first), ""]
    else:
        yield _missing(name, "it needs ten facts or more, written in several batches, and an evaluator of single facts")
    if checked.perplexity is None:
        yield _missing("Perplexity ratio", checked.measure_text)
    else:
        ratio, text = checked.perplexity
        yield ["Perplexity ratio", "", "", Cell(f"{ratio:.4f}", order=ratio), one_line(text)]
    if checked.seconds_per_edit is None or math.isnan(checked.seconds_per_edit):
        yield ["Time per edit", "", "", Cell("not known", tone="quiet"), ""]
    else:
        seconds = checked.seconds_per_edit
        yield ["Time per edit", "", "", Cell(f"{seconds:.2f} s", order=seconds), "without loading and measuring"]
    yield ["Peak memory", "", "", checked.peak_memory, ""]
    yield _missing(
        "Baselines",
        "'editctl compare' measures other methods on the same facts, 'editctl compare-results' compares two results",
    )
