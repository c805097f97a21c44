"""A sweep's finished trials as a Markdown table, with what `editctl sweep` does not put into its own tables.

    python tools/study_table.py runs/thousand ES PS NS rewrite_acc facts_said --first 100 --checkpoint
    python tools/study_table.py runs/compare ES rewrite_exact facts_said --transposed

A metric's cell is its value after the edits. The first row has the unedited model's values, if all arms share them;
otherwise they stand in front of an arrow. ``--first N`` is the share of the first N facts that are still retained,
``--checkpoint`` the ratio of perplexities and the largest ‖ΔW‖/‖W‖ at the last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from editcore.evaluation.measures import retention_of
from editcore.interfaces.metrics import HOLDS
from editcore.runs.record import read_requests
from editcore.runs.results import RESULTS_NAME, RunSummary, read_observations
from editcore.sweeps import PLAN_NAME, PlanRecord

NOTHING = "–"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("metrics", nargs="+")
    parser.add_argument("--first", type=int)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--transposed", action="store_true", help="a row per metric instead of one per arm")
    options = parser.parse_args(arguments)
    trials = {
        point.arm: options.sweep / "trials" / point.key
        for point in PlanRecord.read_file(options.sweep / PLAN_NAME).points
        if (options.sweep / "trials" / point.key / "summary.json").exists()
    }
    summaries = {arm: RunSummary.read(trial) for arm, trial in trials.items()}
    rows = {arm: cells(summary, options.metrics) for arm, summary in summaries.items()}
    before = [{name: summary.before.get(name) for name in options.metrics} for summary in summaries.values()]
    if all(values == before[0] for values in before):
        rows = {"unedited": {name: number(value) for name, value in before[0].items()}, **rows}
    else:
        for row, values in zip(rows.values(), before, strict=True):
            row |= {name: f"{number(values[name])} → {row[name]}" for name in options.metrics}
    for arm, summary in summaries.items():
        if options.first:
            rows[arm][f"first {options.first}"] = retained(trials[arm], summary, options.first)
        if options.checkpoint and summary.checkpoints:
            last = summary.checkpoints[-1]
            rows[arm]["perplexity"] = f"{last.perplexity_ratio:.3f}"
            rows[arm]["‖ΔW‖/‖W‖"] = f"{max(last.relative_change.values(), default=0.0):.2f}"
        rows[arm]["s per fact"] = f"{summary.seconds_per_edit:.2f}"
    print(markdown(transposed(rows) if options.transposed else rows))


def cells(summary: RunSummary, metrics: Sequence[str]) -> dict[str, str]:
    """The values after the edits."""
    return {name: number(summary.after.get(name)) for name in metrics}


def number(value: float | None) -> str:
    """A percentage, a ratio or a loss, with one digit."""
    return NOTHING if value is None else f"{value:.1f}"


def retained(trial: Path, summary: RunSummary, count: int) -> str:
    """The share of the first facts that are retained at the end, in percent, by the metric that says so."""
    measure = retention_of(summary.metrics, set(summary.averages.after))
    if measure is None:
        return NOTHING
    ids = [record.request.id for record in read_requests(trial)][:count]
    found = read_observations(trial / RESULTS_NAME)
    mine = found[(found.phase == "after") & (found.evaluator == measure.evaluator) & (found.metric == measure.name)]
    holds = mine[mine.request_id.isin(ids)].groupby("request_id").value.mean() >= HOLDS
    return number(100 * float(holds.mean()))


def transposed(rows: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """A row per column."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return {name: {arm: row.get(name, NOTHING) for arm, row in rows.items()} for name in names}


def markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A table with the names of the rows in the first column."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += [
        f"| {title} | " + " | ".join(row.get(name, NOTHING) for name in names) + " |" for title, row in rows.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
