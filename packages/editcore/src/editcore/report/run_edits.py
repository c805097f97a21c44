"""Sections of a run's report about its edits: gates, facts, generations, batches."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editcore.evaluation import Measure, retention_of, shown
from editcore.interfaces.metrics import HOLDS
from editcore.interfaces.values import FactRecord, RejectedRequest
from editcore.report.cells import change, records_table
from editcore.report.document import Block, Cell, Column, Row, Table, one_line
from editcore.report.measured import Measured
from editcore.report.results import RunResults

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["batches", "facts_table", "gates", "generations", "measured_facts"]

_MAX_UNSEARCHED = 12
"""A table with more rows has a search field."""

_USUAL: Mapping[str, object] = {"undone": 0, "replayed": 0, "scale": 1.0, "reason": "", "notes": ""}
"""Columns of the table of batches, which are left out if every batch has this value."""

Means = Mapping[str, Mapping[str, float]]
"""By request id, a fact's means by metric."""


# Gates


def gates(run: RunResults) -> Iterator[Block]:
    """The verdicts of extensions, and the facts that they refused."""
    verdicts = [
        {
            "batch": entry.batch,
            "by": name,
            "action": verdict.action if verdict.action != "scale" else f"scale by {verdict.scale:.3g}",
            "reason": verdict.reason,
            "figures": _figures(verdict.figures),
        }
        for entry in run.ledger.batches
        for name, verdict in entry.verdicts.items()
    ]
    if verdicts:
        names = {"batch": "batch", "by": "judged by", "action": "verdict", "reason": "reason", "figures": "figures"}
        yield records_table("Verdicts on batches, before they were written", verdicts, names=names, page_only=True)
    if run.refusals:
        yield Table(
            caption="Refused facts: not written into the model",
            columns=[
                Column("id"),
                Column("prompt"),
                Column("edit to"),
                Column("batch", number=True),
                Column("by"),
                Column("reason"),
                Column("figures"),
            ],
            rows=[_refusal(batch, rejected) for batch, rejected in run.refusals],
            search=len(run.refusals) > _MAX_UNSEARCHED,
        )


def _refusal(batch: int, rejected: RejectedRequest) -> Row:
    request = rejected.request
    return [
        *map(one_line, (request.id, request.text, request.target_new)),
        Cell(str(batch), order=batch),
        *map(one_line, (rejected.by, rejected.reason, _figures(rejected.figures))),
    ]


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {one_line(value)}" for name, value in figures.items())


# Facts


def facts_table(run: RunResults) -> Table:
    """A row for every fact: what was written, its state, and its own means."""
    states = {request_id: (batch, state) for (batch, request_id), state in run.ledger.states().items()}
    return measured_facts(run, run.facts, states)


def measured_facts(
    results: Measured, facts: Sequence[FactRecord], states: Mapping[str, tuple[int, str]] | None = None
) -> Table:
    """A row for every fact: its request, its own means, and what the model says. Metrics of the model as a whole are
    left out.

    Args:
        states: by request id, its batch and whether it is active; ``None`` for facts that nobody wrote here.
    """
    of_model = [measure.key for measure in results.summary.metrics if measure.about == "model"]
    phases = (results.phase(phase) for phase in ("before", "after"))
    before, after = (_means_by_fact(rows[~rows["metric"].isin(of_model)]) for rows in phases)
    known = {key for means in (before, after) for values in means.values() for key in values}
    metrics = results.summary.metrics
    columns = _FactColumns(
        measures=[measure for measure in shown(metrics, known) if not measure.of and measure.key in known],
        retention=retention_of(metrics, known),
        before=before,
        after=after,
        answers=_answers(results.phase("after"), {tally.metric for tally in results.summary.tallies}),
        states=states,
    )
    return Table(
        caption=(
            "Every fact: its own mean of each measure, before → after. A measure that is taken on a sample is empty "
            "for the other facts."
        ),
        columns=columns.headings(),
        rows=[columns.row(fact) for fact in facts],
        search=True,
        page_only=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _FactColumns:
    """The columns of the table of facts."""

    measures: Sequence[Measure]
    """A column each."""
    retention: Measure | None
    """The measure that tells whether a fact still holds."""
    before: Means
    after: Means
    answers: Mapping[str, str]
    """By request id, the model's answer, if an evaluator has one."""
    states: Mapping[str, tuple[int, str]] | None
    """By request id, its batch and whether it is active."""

    def headings(self) -> list[Column]:
        """The headings, from left to right."""
        texts = ["subject", "prompt", "edited to", "instead of", "relation"]
        texts += [] if self.states is None else ["state"]
        return [
            *map(Column, [*texts, *(["it says"] if self.answers else [])]),
            *([] if self.states is None else [Column("batch", number=True)]),
            *(Column(measure.heading, number=True) for measure in self.measures),
        ]

    def row(self, fact: FactRecord) -> Row:
        """The cells of one fact."""
        request = fact.request
        batch, state = (None, "active") if self.states is None else self.states.get(request.id, (None, "waiting"))
        state_cell = Cell("refused" if state == "rejected" else state, tone="" if state == "active" else "bad")
        batch_cell = Cell("", order=math.nan) if batch is None else Cell(str(batch), order=batch)
        return [
            one_line(request.subject),
            one_line(request.text),
            one_line(request.target_new),
            one_line(request.target_true or ""),
            one_line(fact.relation or ""),
            *([] if self.states is None else [state_cell]),
            *([one_line(self.answers.get(request.id, ""))] if self.answers else []),
            *([] if self.states is None else [batch_cell]),
            *(self._change(measure, request.id, state) for measure in self.measures),
        ]

    def _change(self, measure: Measure, request_id: str, state: str) -> Cell:
        values = (means.get(request_id, {}).get(measure.key, math.nan) for means in (self.before, self.after))
        before, after = (100 * value if measure.percent else value for value in values)
        cell = change(before, after, 0 if measure.percent else 3)
        if measure is self.retention and state == "active" and after < 100 * HOLDS:
            return Cell(f"{cell.text} lost", order=cell.order, tone="bad")
        return cell


def _means_by_fact(frame: pd.DataFrame) -> Means:
    found: dict[str, dict[str, float]] = {}
    means = frame.groupby(["request_id", "metric"], sort=False)["value"].mean().reset_index()
    for request_id, metric, value in zip(means["request_id"], means["metric"], means["value"], strict=True):
        found.setdefault(str(request_id), {})[str(metric)] = float(value)
    return found


def _answers(frame: pd.DataFrame, metrics: Collection[str]) -> Mapping[str, str]:
    """By request id, the model's answer to the edited prompt, if an evaluator has one."""
    rows = frame[frame["metric"].isin(list(metrics)) & frame["text"].notna()]
    return {str(request_id): str(text) for request_id, text in zip(rows["request_id"], rows["text"], strict=True)}


# Generations and batches


def generations(run: RunResults) -> Table:
    """What the model says before and after the edits."""
    return Table(
        caption="What the model says, greedily, after the first prompts",
        columns=[Column("prompt"), Column("edited to"), Column("before"), Column("after")],
        rows=[
            [one_line(text) for text in (sample.prompt, sample.target_new, sample.before, sample.after)]
            for sample in run.summary.samples
        ],
    )


def batches(run: RunResults) -> Iterator[Block]:
    """The batches in order, with the editor's diagnostics."""
    rows = [
        {
            "batch": entry.batch,
            "state": run.ledger.state(entry),
            "new": entry.num_new,
            "undone": len(run.ledger.undone(entry.batch)),
            "replayed": len(entry.requests) - entry.num_new,
            "scale": entry.scale,
            "reason": entry.reason,
            "notes": "; ".join(entry.notes),
            **entry.diagnostics,
        }
        for entry in run.ledger.batches
    ]
    spare = {name for name, value in _USUAL.items() if all(row[name] == value for row in rows)}
    if rows:
        yield records_table(
            "Batches in the order in which they were written, with the editor's diagnostics",
            [{name: value for name, value in row.items() if name not in spare} for row in rows],
            names={},
            search=len(rows) > _MAX_UNSEARCHED,
            page_only=True,
        )
