"""The tracker that comes with editcore: the events of a run as JSON lines. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._util.files import json_text
from editcore.interfaces.errors import HParamsError, StorageError
from editcore.interfaces.events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    AfterUndo,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
)
from editcore.interfaces.hookspecs import hookimpl
from editcore.settings.hparams import HParams

if TYPE_CHECKING:
    from editcore.interfaces.history import LedgerEntry
    from editcore.interfaces.protocols import ExtensionContext
    from editcore.interfaces.values import EditRequest

__all__ = ["EVENTS_NAME", "JsonlHParams", "JsonlTracker"]

EVENTS_NAME = "events.jsonl"


class JsonlHParams(HParams):
    """Where the lines go."""

    path: str | None = None
    """File to append to; left out, ``events.jsonl`` in the run directory."""


class JsonlTracker:
    """Appends a line per lifecycle event. Each line is on the disk before the run goes on.

    A resumed run appends a ``before_run`` line with ``resumed`` true, then its own lines. Each event of a batch is
    written once, even if the run was interrupted between. If the ``after_batch`` line of an applied batch was lost, it
    is made from the ledger, with ``seconds`` null.
    """

    def __init__(self, hparams: JsonlHParams, _context: ExtensionContext) -> None:
        self.hparams = hparams
        self._path = Path()
        self._written: set[tuple[str, int]] = set()
        self._marker: dict[str, Any] | None = None

    @hookimpl
    def editcore_before_run(self, event: BeforeRun) -> None:
        """Find the file, and read which events of the run it has already."""
        if self.hparams.path is not None:
            self._path = Path(self.hparams.path).expanduser()
        elif event.directory is not None:
            self._path = event.directory / EVENTS_NAME
        else:
            raise HParamsError(
                "jsonl: the session has no run directory to write to; name a file with the setting path, such as "
                "{'jsonl': {'path': 'events.jsonl'}}."
            )
        own = self.hparams.path is None and self._path.exists()
        resumed = bool(event.history) or own
        self._written = self._read() if resumed else set()
        self._marker = {
            "model": event.model.name,
            "fingerprint": event.model.base_fingerprint,
            "directory": None if event.directory is None else str(event.directory),
            "resumed": resumed,
            "batches": [entry.batch for entry in event.history],
            "num_edits": sum(entry.num_new for entry in event.history),
        }
        lost = [entry for entry in event.history if ("after_batch", entry.batch) not in self._written]
        if lost or not resumed:
            self._begin()
        for entry in lost:
            self._write("after_batch", _applied(entry, seconds=None))

    @hookimpl
    def editcore_before_batch(self, event: BeforeBatch) -> None:
        """The requests of a batch, before anything is computed."""
        self._write("before_batch", {"batch": event.batch.index, "new": _ids(event.batch.requests)})

    @hookimpl
    def editcore_before_apply(self, event: BeforeApply) -> None:
        """What the editor proposes."""
        proposal = event.proposal
        self._write(
            "before_apply",
            {
                "batch": event.batch.index,
                "requests": _ids(event.batch.requests),
                "stages": dict(proposal.seconds),
                "diagnostics": dict(proposal.diagnostics),
                "notes": list(proposal.notes),
            },
        )

    @hookimpl
    def editcore_after_batch(self, event: AfterBatch) -> None:
        """What was written."""
        self._write("after_batch", _applied(event.entry, seconds=event.seconds))

    @hookimpl
    def editcore_after_undo(self, event: AfterUndo) -> None:
        """What was taken out or put back."""
        active = sum(entry.num_new for entry in event.history)
        self._write("after_undo", {"undone": _ids(event.undone), "redone": _ids(event.redone), "num_edits": active})

    @hookimpl
    def editcore_after_evaluation(self, event: AfterEvaluation) -> None:
        """What was measured."""
        self._write(
            "after_evaluation", {"phase": event.phase, "num_edits": event.num_edits, "scores": dict(event.scores)}
        )

    @hookimpl
    def editcore_after_run(self, event: AfterRun) -> None:
        """The end."""
        self._write("after_run", {"num_edits": event.num_edits})

    def _read(self) -> set[tuple[str, int]]:
        """The events of batches that the file has. A last line that was cut off is removed from the file."""
        try:
            raw = self._path.read_bytes()
            whole = raw[: raw.rfind(b"\n") + 1]
            if len(whole) < len(raw):
                os.truncate(self._path, len(whole))
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise StorageError(f"jsonl: {self._path} cannot be read: {error.strerror}.") from error
        found: set[tuple[str, int]] = set()
        for line in whole.splitlines():
            try:
                event = json.loads(line)
                if event["event"] == "before_run" and not event["resumed"]:
                    found.clear()  # a run before this one, in the same file
                elif "batch" in event:
                    found.add((event["event"], event["batch"]))
            except (ValueError, KeyError, TypeError):
                continue  # somebody else's line
        return found

    def _begin(self) -> None:
        """Write ``before_run``. A resumed run writes it with its first event, so that a session in which nothing
        happens leaves no line."""
        if self._marker is not None:
            marker, self._marker = self._marker, None
            self._append("before_run", marker)

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        if "batch" in values:
            if (event, values["batch"]) in self._written:
                return
            self._written.add((event, values["batch"]))
        self._begin()
        self._append(event, values)

    def _append(self, event: str, values: Mapping[str, Any]) -> None:
        line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:  # unbuffered: the whole line in one write
                file.write(f"{json_text(line)}\n".encode())
        except OSError as error:
            raise StorageError(f"jsonl: cannot write {self._path}: {error.strerror}.") from error


def _applied(entry: LedgerEntry, *, seconds: float | None) -> dict[str, Any]:
    known = (fact.figures.get("target_probability") for fact in entry.evidence if not fact.replayed)
    probabilities = [probability for probability in known if probability is not None]
    return {
        "batch": entry.batch,
        "new": list(entry.new_ids),
        "rejected": _ids([rejection.request for rejection in entry.rejected]),
        "replayed": len(entry.requests) - entry.num_new,
        "scale": entry.scale,
        "reason": entry.reason,
        "seconds": seconds,
        "mean_target_probability": sum(probabilities) / len(probabilities) if probabilities else None,
        "diagnostics": dict(entry.diagnostics),
        "notes": list(entry.notes),
    }


def _ids(requests: Sequence[EditRequest]) -> list[str]:
    return [request.id for request in requests]
