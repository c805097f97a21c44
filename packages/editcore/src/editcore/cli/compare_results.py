"""``editctl compare-results``: two runs or evaluations, compared on the facts that both measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editcore.cli.options import AsJson

if TYPE_CHECKING:
    from editcore.evaluation.paired import PairedDifference
    from editcore.interfaces.values import EditRequest
    from editcore.runs.comparing import ComparedResults

__all__ = ["app"]

app = typer.Typer()

_MOST_FACTS = 10
"""Facts that are named for each metric and side; --json has all."""
Results = Annotated[Path, typer.Argument(help="A finished run directory, or a folder of 'editctl evaluate'.")]


@app.command("compare-results")
def compare_results_command(
    first: Results,
    second: Results,
    everything: Annotated[bool, typer.Option("--all", help="Also the metrics that only reports show.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare two results on the questions that both asked: differences with 95 % intervals, fact by fact.

    Intervals are from a paired bootstrap over facts. Facts that hold in one of the two alone are named.
    """
    from editcore.cli.console import print_json
    from editcore.runs.comparing import compare_results

    found = compare_results(first, second, seed=seed)
    if as_json:
        print_json(_as_json(found))
        return
    _show(found, everything=everything)


def _show(found: ComparedResults, *, everything: bool) -> None:
    from editcore._util.words import counted
    from editcore.cli.console import print_table
    from editcore.evaluation.measures import legend, shown

    typer.echo(f"A: {found.names[0]}, {counted(found.facts[0], 'fact')}")
    typer.echo(f"B: {found.names[1]}, {counted(found.facts[1], 'fact')}; {found.shared:,} are in both")
    measures = [row.measure for row in found.differences]
    usual = {measure.key for measure in shown(measures, {measure.key for measure in measures})}
    rows = [row for row in found.differences if everything or row.measure.key in usual]
    for about, title in (("facts", "The facts that both measured"), ("model", "The model as a whole")):
        mine = [row for row in rows if row.measure.about == about]
        if mine:
            typer.echo()
            print_table(
                ("", "A", "B", "B - A", "95 % interval", "n", "differ", ""),
                [_row(row) for row in mine],
                title=f"{title}; {legend([row.measure for row in mine])}",
                right=("A", "B", "B - A", "n", "differ"),
            )
    for changed in found.changed:
        for side, facts in (("A", changed.only_first), ("B", changed.only_second)):
            if facts:
                typer.echo()
                named = "; ".join(_named(fact) for fact in facts[:_MOST_FACTS])
                more = f"; and {len(facts) - _MOST_FACTS:,} more" if len(facts) > _MOST_FACTS else ""
                typer.echo(f"Only in {side}, by {changed.measure.key}: {counted(len(facts), 'fact')}: {named}{more}")
    if found.notes:
        typer.echo()
    for note in found.notes:
        typer.echo(f"Note: {note}")


def _row(row: PairedDifference) -> tuple[str, ...]:
    measure = row.measure
    said = {"first": "A is better", "second": "B is better"}.get(row.better, "")
    if not row.differing:
        said = "the same everywhere"
    elif not said:
        said = "not told apart"
    shown = "-" if row.interval is None else " to ".join(map(measure.text, row.interval))
    difference = measure.text(row.difference)
    sign = "" if difference.startswith("-") else "+"
    return (
        measure.key, measure.text(row.first), measure.text(row.second), f"{sign}{difference}", shown, str(row.units),
        str(row.differing), said,
    )  # fmt: skip


def _named(fact: EditRequest) -> str:
    return f"{fact.text} → {fact.target_new}"


def _as_json(found: ComparedResults) -> dict[str, Any]:
    return {
        "results": list(found.names),
        "facts": list(found.facts),
        "shared": found.shared,
        "differences": [
            {
                **{name: value for name, value in asdict(row).items() if name != "measure"},
                "evaluator": row.measure.evaluator,
                "metric": row.measure.key,
                "about": row.measure.about,
                "unit": row.measure.unit,
                "difference": row.difference,
                "better": row.better,
            }
            for row in found.differences
        ],
        "changed": [
            {
                "metric": changed.measure.key,
                "only_first": [_fact_json(fact) for fact in changed.only_first],
                "only_second": [_fact_json(fact) for fact in changed.only_second],
            }
            for changed in found.changed
        ],
        "notes": list(found.notes),
    }


def _fact_json(fact: EditRequest) -> dict[str, str]:
    return {"id": fact.id, "prompt": fact.text, "target_new": fact.target_new}
