"""Tables of what evaluators measured, one for each evaluator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from editcore.cli.console import make_console, print_table
from editcore.evaluation.measures import Measure, legend, shown
from editcore.evaluation.summaries import Summary

__all__ = ["show_measures"]


def show_measures(phases: Mapping[str, Summary], what: str, count: int) -> None:
    """Print the metrics of each evaluator that have a value, a row for each phase.

    Args:
        phases: by the name of the row. The last one decides which metrics there are.
        what: what was measured, for the titles, such as ``20 edits``.
        count: how many facts that is.
    """
    *_, last = phases.values()
    values = {name: summary.values() for name, summary in phases.items()}
    known = {key for found in values.values() for key in found}
    measures = [measure for measure in shown(last.measures, known) if measure.key in known]
    console = make_console()
    for evaluator in dict.fromkeys(measure.evaluator for measure in measures):
        mine = [measure for measure in measures if measure.evaluator == evaluator]
        names = [measure.key for measure in mine]
        console.print()
        print_table(
            ("", *names),
            [
                *(
                    (name, *(measure.text(found.get(measure.key)) for measure in mine))
                    for name, found in values.items()
                ),
                *_numbers(last, mine),
            ],
            title=f"{_title(mine, phases, what, count)}; {legend(mine)}",
            right=names,
            console=console,
        )


def _title(measures: Sequence[Measure], phases: Mapping[str, Summary], what: str, count: int) -> str:
    evaluator = measures[0].evaluator
    if all(measure.about == "model" for measure in measures):
        return f"The model as a whole, by {evaluator}"
    facts = max(summary.facts.get(evaluator, 0) for summary in phases.values())
    sampled = f" on {facts} of them" if 0 < facts < count else ""
    return f"{what}, by {evaluator}{sampled}"


def _numbers(summary: Summary, measures: Sequence[Measure]) -> Iterator[tuple[str, ...]]:
    """A row with the number of facts behind each mean, or of observations, if these numbers differ, or if the metrics
    are about no facts."""
    averages = [summary.averages.get(measure.key) for measure in measures]
    found = [average for average in averages if average is not None]
    if len({average.units for average in found}) > 1 or any(measure.about == "model" for measure in measures):
        name = "facts" if all(average.within == "facts" for average in found) else "n"
        yield (name, *("" if average is None else str(average.units) for average in averages))
