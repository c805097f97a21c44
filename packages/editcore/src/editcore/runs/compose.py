"""Joins the edits of several runs on one base model into a new run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from editcore._util.files import write_text
from editcore._util.lock import locked
from editcore._util.words import counted
from editcore.datasets.check import with_unique_ids
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import EditRequest, FactRecord, KnownTarget
from editcore.ledger.ledger import Ledger
from editcore.plugins.registry import Plugins
from editcore.runs.record import REQUESTS_NAME, RunRecord, read_requests
from editcore.runs.recording import record_of
from editcore.runs.session import EditSession

__all__ = ["Composition", "Conflict", "compose"]

OnConflict = Literal["error", "first", "last"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """One fact that runs gave different targets."""

    asked: tuple[tuple[Path, EditRequest], ...]
    """Each run directory with its request."""
    kept: EditRequest
    """The request that is in the new run."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """A new run directory with the edits of several."""

    directory: Path
    """The new run directory."""
    edits: int
    """Facts in it."""
    conflicts: tuple[Conflict, ...]
    """What runs disagreed about."""
    notes: tuple[str, ...]
    """Sentences for the user."""


@dataclass(frozen=True, slots=True)
class _Fact:
    run: Path
    record: FactRecord
    known: KnownTarget | None
    """The target it was solved for; ``None`` if its editor keeps none."""

    @property
    def request(self) -> EditRequest:
        return self.record.request


def compose(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    on_conflict: OnConflict = "error",
    plugins: Plugins | None = None,
    progress: Progress = silent,
    command: Sequence[str] = (),
) -> Composition:
    """Join the active facts of several runs and solve them together, each for the target value that its own run found.

    The editor, its settings, backend and text are those of the first run. Targets that the runs have kept are not
    optimised again. Facts of editors that keep no targets are edited anew. For an editor of one layer that takes all
    facts in one batch, the result does not depend on how they were batched before.

    Args:
        on_conflict: what to do where runs give one fact (subject and prompt) different targets: refuse, or keep the
            target of the first or the last run that has the fact.
        command: the command line, for the new run's record.

    Raises:
        RunError: runs have different base models or edited different weights, contradict each other, or ``out`` is
            taken.
    """
    directories, out = [Path(run) for run in runs], Path(out)
    if len(directories) < 2:
        raise RunError("Composing needs at least two runs.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"--out {out} is already there; give a directory that does not exist yet.")
    plugins = plugins or Plugins.load()
    records = [RunRecord.read(run) for run in directories]
    for run, record in zip(directories[1:], records[1:], strict=True):
        if record.model.fingerprint != records[0].model.fingerprint:
            raise RunError(
                f"{directories[0]} and {run} have different base models ({records[0].config.model}, "
                f"{record.config.model}); only edits of one model can be composed."
            )
    facts, conflicts = _joined([list(_facts(run)) for run in directories], on_conflict)
    first = records[0].config
    config = first.model_copy(
        update={
            "plugins": (),
            "edits": None,
            "dataset": " + ".join(map(str, directories)),
            "settings": {
                name: values for name, values in first.settings.items() if name in (first.editor, first.backend)
            },
        }
    )
    with locked(out):
        composed = records[0].model_copy(update={"config": config})
        session = EditSession.open(
            composed.source, composed.session, directory=out, registry=plugins, progress=progress
        )
        joined = list(with_unique_ids(fact.record for fact in facts))
        requests = [record.request for record in joined]
        known = {
            request.id: fact.known for request, fact in zip(requests, facts, strict=True) if fact.known is not None
        }
        results = session.edit(requests, known=known)
        write_text(out / REQUESTS_NAME, "".join(f"{record.model_dump_json()}\n" for record in joined))
        made = record_of(session, config, records=joined, command=command)
        made.model_copy(update={"composed_of": tuple(run.resolve() for run in directories)}).write(out)
    notes = dict.fromkeys(note for result in results for note in result.proposal.notes)
    return Composition(directory=out, edits=len(requests), conflicts=tuple(conflicts), notes=tuple(notes))


def _facts(run: Path) -> list[_Fact]:
    """The active facts of a run, oldest first, each with the target of the last time it was written."""
    ledger = Ledger.read(run)
    records = {record.request: record for record in read_requests(run)}
    known = {request.id: _known(entry, request.id) for entry in ledger.history() for request in entry.new_requests}
    return [
        _Fact(run, records.get(request, FactRecord(request=request)), known[request.id]) for request in ledger.facts()
    ]


def _known(entry: LedgerEntry, name: str) -> KnownTarget | None:
    """The target of a fact, with the figures of its optimisation."""
    known = entry.known.get(name)
    found = (evidence.figures for evidence in entry.evidence if evidence.request_id == name)
    return None if known is None else replace(known, figures=next(found, {}))


def _joined(runs: Sequence[Sequence[_Fact]], on_conflict: OnConflict) -> tuple[list[_Fact], list[Conflict]]:
    groups: dict[tuple[str, str], list[_Fact]] = {}
    for fact in (fact for facts in runs for fact in facts):
        groups.setdefault(fact.request.fact_key, []).append(fact)
    kept, conflicts = [], []
    for group in groups.values():
        chosen = group[0] if on_conflict == "first" else group[-1]
        kept.append(chosen)
        if len({fact.request.continuation for fact in group}) > 1:
            asked = tuple((fact.run, fact.request) for fact in group)
            conflicts.append(Conflict(asked=asked, kept=chosen.request))
    if conflicts and on_conflict == "error":
        targets = " and ".join(f"'{request.target_new}' ({run})" for run, request in conflicts[0].asked)
        raise RunError(
            f"The runs contradict each other about {counted(len(conflicts), 'fact')}, the first being "
            f"'{conflicts[0].kept.text}': {targets}. Choose with --on-conflict first or last."
        )
    weights = {tuple(sorted(fact.known.values)): fact for fact in kept if fact.known is not None}
    if len(weights) > 1:
        (ours, first), (theirs, second), *_ = weights.items()
        raise RunError(
            f"{first.run} edited {', '.join(ours)} and {second.run} {', '.join(theirs)}; only edits of the same "
            "weights can be solved together."
        )
    if not kept:
        raise RunError("None of the runs has an active edit.")
    return kept, conflicts
