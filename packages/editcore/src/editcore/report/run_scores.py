"""Sections of a run's report about measurements: summary, relations, forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from editcore._util.words import counted
from editcore.evaluation import Measure, Measurement, Summary, shown
from editcore.figures.scores import per_relation_figure, summary_figure
from editcore.figures.style import png
from editcore.report.cells import between, change, number, quantity, records_table
from editcore.report.document import (
    Block,
    Cell,
    Column,
    Notice,
    Paragraph,
    Picture,
    Row,
    Table,
    Tile,
    Tiles,
    one_line,
)
from editcore.report.measured import Measured
from editcore.report.pictures import FORGETTING_CURVE
from editcore.report.results import RunResults
from editcore.runs.forgetting import Forgetting

__all__ = [
    "forgetting",
    "measured_summary",
    "notices",
    "refusals_in_words",
    "relations",
    "relations_name",
    "summaries_of",
]

_CHECKPOINT: Mapping[str, str] = {
    "num_edits": "facts edited",
    "facts": "facts measured",
}
_CHECKPOINT_COSTS: Mapping[str, str] = {
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity, times the unedited model's",
    "relative_change": "‖ΔW‖/‖W‖",
    "seconds": "seconds",
}
_AGES: Mapping[str, str] = {
    "first": "age from",
    "last": "to",
    "age": "mean age",
    "facts": "facts",
    "retention": "retention (%)",
    "interval": "95 % interval",
}

Values = Mapping[str, float]
"""Means and composites, by key."""


# Summary


def notices(run: RunResults) -> Iterator[Block]:
    """What a reader must not miss."""
    if run.is_older_than_ledger:
        yield Notice(
            "The measurements are older than the ledger: edits were added, undone or redone after the facts were "
            "measured. The table of facts has what is active now."
        )
    if run.ledger.note:
        yield Notice(run.ledger.note)


def refusals_in_words(run: RunResults) -> Iterator[Block]:
    """How many facts gates kept out; nothing if there are none."""
    if run.summary.rejected:
        yield Paragraph(f"{counted(run.summary.rejected, 'fact')} were refused by a gate and not written.")


def summaries_of(results: Measured) -> tuple[Summary, Summary]:
    """The means before and after the edits."""
    metrics = tuple(results.summary.metrics)
    before, after = (Measurement.from_frame(results.phase(phase), metrics).summary for phase in ("before", "after"))
    return before, after


def measured_summary(results: Measured, *, title: str) -> Iterator[Block]:
    """The most important numbers, in tiles and in words, a picture of them, and a table for each evaluator."""
    summary_before, summary_after = summaries_of(results)
    before, after = (
        {key: value for key, value in values.items() if value is not None}
        for values in (results.summary.before, results.summary.after)
    )
    measures = [
        measure
        for measure in shown(results.summary.metrics, {**before, **after})
        if measure.key in before or measure.key in after
    ]
    if measures:
        yield Tiles(
            [
                Tile(
                    name=measure.heading,
                    value=_cell(measure, after).text,
                    note=f"before: {_cell(measure, before).text}" if before else "",
                )
                for measure in measures
            ]
        )
    yield Paragraph(_in_words(summary_before, summary_after))
    for tally in results.summary.tallies:
        yield Paragraph(one_line(tally.sentence()))
    if measures:
        figure = summary_figure(summary_before, summary_after, title=title)
        yield Picture(name="summary", png=png(figure), alt=_summary_alt(measures, before, after))
    for evaluator in dict.fromkeys(measure.evaluator for measure in results.summary.metrics):
        if evaluator in summary_before.facts or evaluator in summary_after.facts:
            yield _metrics(evaluator, (summary_before, summary_after), (before, after))


def _cell(measure: Measure, values: Values) -> Cell:
    return quantity(values.get(measure.key), measure)


def _in_words(before: Summary, after: Summary) -> str:
    values_before = before.values()
    parts = []
    for measure in shown(after.measures, after.values()):
        if (interval := after.interval(measure.key)) is not None:
            key = measure.key
            was = f"; {measure.text(values_before[key])} before" if key in values_before else ""
            value, low, high = (measure.text(number) for number in (after.value(key), *interval))
            unit = f" {measure.unit}" if measure.unit else ""
            parts.append(f"{measure.label} {value}{unit} (95 % interval {low} to {high}{was})")
    if not parts:
        return "Nothing could be measured: no evaluator has a question about these facts."
    return f"{', '.join(parts)}.".replace(" %", "\u00a0%")  # no line break between a number and its sign


def _metrics(evaluator: str, summaries: tuple[Summary, Summary], values: tuple[Values, Values]) -> Table:
    """A table of the metrics of one evaluator, with their meanings.

    Args:
        summaries: before and after the edits, as are ``values``.
    """
    before, after = values
    rows: list[Row] = []
    for measure in summaries[1].measures:
        key = measure.key
        if measure.evaluator != evaluator or measure.show == "data" or (key not in before and key not in after):
            continue
        gain = after.get(key, math.nan) - before.get(key, math.nan)
        better = "" if measure.better == "higher" else " Lower is better."
        rows.append(
            [
                measure.label,
                _cell(measure, before),
                _cell(measure, after),
                _gain(measure, gain),
                *(between(summary.interval(key), measure.text) for summary in summaries),
                measure.unit,
                _facts_averaged(measure, summaries[1]),
                one_line(f"{measure.meaning}{better}"),
            ]
        )
    whole = all(measure.about == "model" for measure in summaries[1].measures if measure.evaluator == evaluator)
    facts = [counted(summary.facts.get(evaluator, 0), "fact") for summary in summaries]
    asked = "the model as a whole" if whole else f"{facts[0]} measured before, {facts[1]} after"
    numbers = ("before", "after", "change", "interval before", "interval after")
    return Table(
        caption=(
            f"Metrics of the evaluator {evaluator}: {asked}. Higher is better unless the table says otherwise. "
            f"Intervals are 95 % intervals over {'questions' if whole else 'facts'}."
        ),
        columns=[
            Column("measure"),
            *(Column(heading, number=True) for heading in numbers),
            Column("unit"),
            Column("questions" if whole else "facts", number=True),
            Column("what it says"),
        ],
        rows=rows,
    )


def _gain(measure: Measure, gain: float) -> Cell:
    if math.isnan(gain):
        return number(gain)
    text = f"{round(gain, 1) + 0.0:+.1f}" if measure.percent else f"{gain:+.4g}"  # + 0.0: a small loss is no -0.0
    return Cell(text, order=gain)


def _facts_averaged(measure: Measure, summary: Summary) -> Cell:
    """The number of facts in a mean."""
    averaged = summary.averages.get(measure.key)
    if averaged is None:
        return Cell("", order=math.nan)
    if measure.about == "model":
        return Cell(f"{averaged.prompts:,}", order=averaged.prompts)
    text = str(averaged.facts) if averaged.within == "facts" else counted(averaged.prompts, "question")
    return Cell(text, order=averaged.units)


def _summary_alt(measures: Sequence[Measure], before: Values, after: Values) -> str:
    pairs = [
        f"{measure.label} {_cell(measure, before).text} before and {_cell(measure, after).text} after"
        for measure in measures
    ]
    return f"Bars: {'; '.join(pairs)}."


# Relations


def relations(results: Measured) -> Iterator[Block]:
    """A picture for each share, and a table, with the facts grouped by relation; nothing if no fact has one. Metrics of
    the model as a whole are left out."""
    metrics = tuple(measure for measure in results.summary.metrics if measure.about == "facts")
    rows_before, rows_after = (
        {str(name): rows for name, rows in results.phase(phase).groupby("relation")} for phase in ("before", "after")
    )
    if not rows_after:
        return
    before, after = (
        {name: Measurement.from_frame(rows, metrics).summary for name, rows in groups.items() if name in rows_after}
        for groups in (rows_before, rows_after)
    )
    known = {key for summary in after.values() for key in summary.values()}
    measures = [measure for measure in shown(metrics, known) if measure.key in known]
    if not measures:
        return
    for measure in measures:
        if not measure.of and measure.share:
            figure = per_relation_figure(before, after, measure=measure, title=f"{measure.label} by relation")
            yield Picture(
                name=relations_name(measure),
                png=png(figure),
                alt=f"{measure.label} of each relation before and after, in percent; the table has the numbers.",
            )
    rows: list[Row] = []
    for name, summary in sorted(after.items()):
        facts = max(summary.facts.values(), default=0)
        changes = [_change(measure, before.get(name), summary) for measure in measures]
        rows.append([name, Cell(str(facts), order=facts), *changes])
    yield Table(
        caption="Before → after, by relation",
        columns=[
            Column("relation"),
            Column("facts", number=True),
            *(Column(measure.heading, number=True) for measure in measures),
        ],
        rows=rows,
    )


def relations_name(measure: Measure) -> str:
    """The name of the picture of a measure by relation."""
    return f"relations_{measure.key}"


def _change(measure: Measure, before: Summary | None, after: Summary) -> Cell:
    value_before = math.nan if before is None else before.value(measure.key)
    return change(value_before, after.value(measure.key), 0 if measure.percent else 2)


# Forgetting


def forgetting(run: RunResults, saved: Mapping[str, Picture]) -> Iterator[Block]:
    """The measurements at checkpoints, and retention by age; nothing for a run without checkpoints.

    Args:
        saved: the run's own figures, by name.
    """
    if not run.summary.checkpoints:
        return
    if FORGETTING_CURVE in saved:
        yield saved[FORGETTING_CURVE]
    found, checkpoints = run.summary.forgetting, run.summary.checkpoints
    if found is not None and (sentences := list(_retention_in_words(found))):
        yield Paragraph(" ".join(sentences))
    measured = (run.summary.before, run.summary.after, *(checkpoint.values for checkpoint in checkpoints))
    known = {key for values in measured for key, value in values.items() if value is not None}
    measures = shown(run.summary.metrics, known)
    rows = [
        {
            **checkpoint.model_dump(include={*_CHECKPOINT, *_CHECKPOINT_COSTS}),
            **{measure.key: checkpoint.values.get(measure.key) for measure in measures},
            "relative_change": max(
                (change for change in checkpoint.relative_change.values() if not math.isnan(change)), default=None
            ),
        }
        for checkpoint in checkpoints
    ]
    names = {**_CHECKPOINT, **{measure.key: measure.heading for measure in measures}, **_CHECKPOINT_COSTS}
    yield records_table("All facts edited so far, measured again at each checkpoint", rows, names=names)
    if found is not None and found.retention_by_age:
        bins = [age_bin.model_dump(mode="json") for age_bin in found.retention_by_age]
        yield records_table("Retention by age, in facts edited since a fact was", bins, names=_AGES)


def _retention_in_words(found: Forgetting) -> Iterator[str]:
    if found.half_life is not None:
        yield f"Half of what was retained at first is gone {found.half_life:g} facts later (half-life)."
    elif found.auc is not None:
        yield "Retention never fell to half of what it was: there is no half-life."
    if found.auc is not None:
        yield f"Mean retention over ages, the area under the curve, is {found.auc:.1f} %."
