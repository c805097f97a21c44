"""The result of a run in words: its title, how many facts hold, and notes for the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editcore._util.words import counted
from editcore.evaluation.measures import DEFAULT_EVALUATORS, Measure, retention_of
from editcore.evaluation.summaries import Measurement, Summary
from editcore.interfaces.metrics import HOLDS
from editcore.interfaces.values import FactRecord
from editcore.plugins.registry import Plugins
from editcore.runs.config import RunConfig
from editcore.runs.log import BatchRecord
from editcore.runs.record import RunRecord
from editcore.runs.results import Tally

if TYPE_CHECKING:
    from editcore.runs.session import EditSession

__all__ = ["first_and_last", "notes_of", "notes_on", "seconds_per_edit", "tallies_of", "title_of"]


def title_of(config: RunConfig, record: RunRecord | None, session: EditSession, records: Sequence[FactRecord]) -> str:
    """The title of the results.

    Args:
        record: of a run that was resumed.
        records: what the run edits. A session may have edited more.
    """
    own_ids = {fact.request.id for fact in records}
    active = session.requests
    own = sum(request.id in own_ids for request in active)
    return config.title(own, data=None if record is None else record.data, more=len(active) - own)


def tallies_of(found: Measurement, records: Sequence[FactRecord]) -> tuple[Tally, ...]:
    """How many facts hold, by the metrics that are always shown; if none of these was measured, by the others."""
    tallies = {measure: Tally.of(measure, found, records) for measure in found.measures if measure.tally}
    known = {measure: tally for measure, tally in tallies.items() if tally is not None}
    shown = [tally for measure, tally in known.items() if measure.show == "always"]
    return tuple(shown or known.values())


def notes_of(
    session: EditSession, found: Measurement, records: Sequence[FactRecord], *, first: Sequence[str]
) -> tuple[str, ...]:
    """Sentences for the user, each once.

    Args:
        found: the measurement of ``records`` at the end.
        first: notes from before the first batch.
    """
    notes = [*first, *(note for entry in session.ledger.batches for note in entry.notes)]
    notes += session.notes
    notes += notes_on(found, records, session.plugins)
    if len(session.ledger.batches) > 1:
        notes += first_and_last(found, records)
    notes += _not_said(session)
    return tuple(dict.fromkeys(notes))


def notes_on(found: Measurement, records: Sequence[FactRecord], plugins: Plugins) -> list[str]:
    """Sentences on a measurement: what could not be measured, and how values are read."""
    return [*_silent_evaluators(found, records), *_conventions(found.summary, plugins)]


def _silent_evaluators(found: Measurement, records: Sequence[FactRecord]) -> list[str]:
    """A sentence for each evaluator that observed nothing, which must not look like success."""
    sentences = []
    for name in (name for name, observations in found.observations.items() if records and not observations):
        needs = next((measure.needs for measure in found.measures if measure.evaluator == name and measure.needs), "")
        why = f"; it needs {needs}" if needs else ""
        sentences.append(f"The evaluator '{name}' observed nothing of the {counted(len(records), 'fact')}{why}.")
    return sentences


def _conventions(summary: Summary, plugins: Plugins) -> list[str]:
    """What must be known about the metrics: why some of those in tables have no value, and how others are read."""
    known = summary.values()
    # Of the evaluators that nobody chose, only what a composite lacks is missed, and what settings ask for.
    names = {measure.evaluator for measure in summary.measures}
    usual = {(name, metric.name) for name in names for metric in plugins.evaluator(name).metrics}
    chosen = names != set(DEFAULT_EVALUATORS)
    parts = {name for measure in summary.measures for name in measure.of}
    missing: dict[str, dict[str, list[str]]] = {}
    for measure in summary.measures:
        asked = chosen or (measure.evaluator, measure.name) not in usual
        told = measure.show == "always" and (asked or measure.of or measure.name in parts)
        if measure.key not in known and told and measure.evaluator in summary.facts:
            missing.setdefault(measure.evaluator, {}).setdefault(_reason(measure, summary), []).append(measure.key)
    sentences = [
        f"{evaluator} could not compute {'; '.join(f'{_listed(keys)} ({reason})' for reason, keys in reasons.items())}."
        for evaluator, reasons in missing.items()
    ]
    return [*sentences, *(measure.caution for measure in summary.measures if measure.caution and measure.key in known)]


_MOST_FIRST = 100
"""Facts from the front whose retention is told."""
_LEAST_FIRST = 5
"""Fewer facts tell nothing."""


def first_and_last(found: Measurement, records: Sequence[FactRecord]) -> list[str]:
    """How many of the facts that were written first hold at the end, beside those that were written last; nothing for
    fewer than ten facts.

    Args:
        found: the measurement at the end.
        records: the facts in the order in which they were written.
    """
    measure = retention_of(found.measures, set(found.summary.averages))
    count = min(_MOST_FIRST, len(records) // 2)
    if measure is None or count < _LEAST_FIRST:
        return []
    values = {observation.request_id: observation.value for observation in found.of(measure)}
    parts = []
    for group in (records[:count], records[-count:]):
        known = [values[record.request.id] for record in group if record.request.id in values]
        if not known:
            return []
        asked = "" if len(known) == count else f" of {len(known)} that were asked"
        parts.append(f"{sum(value >= HOLDS for value in known)}{asked}")
    return [
        f"Of the {count} facts that were written first, {parts[0]} hold at the end by {measure.key}; of the {count} "
        f"that were written last, {parts[1]}."
    ]


def _reason(measure: Measure, summary: Summary) -> str:
    """Why a metric has no value."""
    if measure.of:
        own = {other.name: other.key for other in summary.measures if other.evaluator == measure.evaluator}
        unknown = [own[name] for name in measure.of if own[name] not in summary.averages]
        return f"needs {_listed(unknown)}" if unknown else "has no value for its parts"
    return f"needs {measure.needs}" if measure.needs else "nothing was observed"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _not_said(session: EditSession) -> list[str]:
    from editcore.runs.saying import not_said

    entries = session.ledger.entries
    sentence = not_said(session.requests, [evidence for entry in entries for evidence in entry.evidence])
    return [sentence] if sentence else []


def seconds_per_edit(log: Sequence[BatchRecord]) -> float:
    """Wall time of the batches divided by their new facts. Batches whose time is not known are left out."""
    timed = [(line.seconds, line.new) for line in log if line.seconds is not None]
    seconds, facts = sum(float(time) for time, _ in timed), sum(float(new) for _, new in timed)
    return seconds / max(1.0, facts)
