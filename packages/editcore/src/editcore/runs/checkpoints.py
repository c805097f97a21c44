"""Checkpoints of a run: between batches, all edits made so far are measured again.

A checkpoint scores all active facts, or a sample of them over all ages. It also measures the perplexity on a text that
no edit is about, and the size of the written changes. Each checkpoint is durable before the next batch starts:
``checkpoints/NNNNN.parquet`` (after batch NNNNN) has its scores, ``forgetting.json`` everything else. The end of a run
is its last checkpoint, always over all facts. ``checkpoints.parquet`` then has the scores of all checkpoints.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from editcore._util.files import replacing, write_text
from editcore._util.records import record_text
from editcore.evaluation.measures import Measure, retention_of
from editcore.interfaces.errors import RunError
from editcore.interfaces.metrics import HOLDS
from editcore.runs.checkpoint_history import FORGETTING_NAME, Checkpoint, CheckpointHistory, read_checkpoint_history
from editcore.runs.forgetting import Sighting, ages, forgetting, sample_by_age
from editcore.runs.held_out import HeldOutText
from editcore.runs.sizes import RelativeChanges

if TYPE_CHECKING:
    import pandas as pd

    from editcore.evaluation import Measurement
    from editcore.interfaces.values import FactRecord
    from editcore.runs.session import EditSession

__all__ = ["CHECKPOINTS", "Checkpoints", "Schedule"]

CHECKPOINTS = "checkpoints"
TABLE_NAME = "checkpoints.parquet"

_TYPES = {
    "after_batch": "int64", "num_edits": "int64", "request_id": "string", "batch": "int64", "age": "int64",
    "evaluator": "string", "metric": "string", "kind": "string", "prompt": "string", "value": "float64",
    "text": "string",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When a run has checkpoints, and what is measured at each."""

    every: int
    """Facts between two checkpoints."""
    sample: int | None
    """Facts measured at a checkpoint; ``None`` for all."""
    seed: int
    """Of the sample."""
    text: HeldOutText
    """What the perplexity is of."""


class Checkpoints:
    """Measures a session at checkpoints and writes the results. A resumed run continues after its last checkpoint."""

    def __init__(
        self,
        session: EditSession,
        records: Sequence[FactRecord],
        before: Measurement,
        schedule: Schedule,
        directory: Path,
    ) -> None:
        self._session = session
        self._records = {record.request.id: record for record in records}
        self._before = before
        self._schedule = schedule
        self._directory = directory
        self._sizes = RelativeChanges(session.edited)
        self._found = {checkpoint.batch: checkpoint for checkpoint in self._read()}
        self._frames = self._read_frames()

    @property
    def seconds(self) -> float:
        """Wall time of all checkpoints so far."""
        return sum(checkpoint.seconds for checkpoint in self._found.values())

    def check(self) -> None:
        """Measure if a checkpoint is due after the last batch and was not measured yet.

        A checkpoint is due when the number of handled facts, applied or rejected, reaches or passes a multiple of
        ``every``.
        """
        batches = self._session.ledger.batches
        sizes = [entry.num_new + len(entry.rejected) for entry in batches]
        handled = sum(sizes)
        if not batches or batches[-1].batch in self._found:
            return
        if handled // self._schedule.every == (handled - sizes[-1]) // self._schedule.every:
            return
        start, batch = time.perf_counter(), batches[-1].batch
        requests = sample_by_age(self._session.requests, self._schedule.sample, seed=f"{self._schedule.seed}:{batch}")
        records = [self._records[request.id] for request in requests if request.id in self._records]
        measured = self._session.evaluate(records, phase=str(len(self._session.requests)))
        frame = self._add(batch, measured, [record.request.id for record in records], start)
        with replacing(self._directory / CHECKPOINTS / f"{batch:05d}.parquet") as path:
            frame.to_parquet(path, index=False)
        self._write()

    def finish(self, measured: Measurement, *, start: float) -> CheckpointHistory:
        """Take the measurement at the end of the run as the last checkpoint, and write the table.

        Args:
            measured: scores of all active facts.
            start: when that measurement began, by ``time.perf_counter``.
        """
        batches = self._session.ledger.batches
        measured_ids = [request.id for request in self._session.requests if request.id in self._records]
        self._add(batches[-1].batch if batches else -1, measured, measured_ids, start)
        with replacing(self._directory / TABLE_NAME) as path:
            self._frame().to_parquet(path, index=False)
        history = self._write()
        for batch in self._found:  # the table of all checkpoints has their rows now
            (self._directory / CHECKPOINTS / f"{batch:05d}.parquet").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (self._directory / CHECKPOINTS).rmdir()
        return history

    def _add(self, batch: int, measured: Measurement, ids: Sequence[str], start: float) -> pd.DataFrame:
        from editcore.evaluation import perplexity

        session, text = self._session, self._schedule.text
        value = perplexity(session.model, text.ids, window=text.window, progress=session.context.progress)
        change = self._sizes.of(session.ledger.active())
        now = measured.summary
        self._frames[batch] = _frame(measured, batch, session)
        self._found[batch] = Checkpoint(
            batch=batch,
            num_edits=len(session.requests),
            facts=len(ids),
            values=now.as_json(),
            before=self._before.of_facts(ids).summary.as_json(),
            interval={key: ends for key in now.averages if (ends := now.interval(key)) is not None},
            perplexity=value,
            perplexity_ratio=value / text.perplexity,
            relative_change=change,
            seconds=time.perf_counter() - start,
        )
        return self._frames[batch]

    # On disk

    def _read(self) -> tuple[Checkpoint, ...]:
        if not (self._directory / FORGETTING_NAME).exists():
            return ()
        return read_checkpoint_history(self._directory).checkpoints

    def _read_frames(self) -> dict[int, pd.DataFrame]:
        """The scores of past checkpoints by batch, read from the common table if it exists, else from the table of
        each."""
        import pandas as pd

        table = self._directory / TABLE_NAME
        paths = [table] if table.exists() else [self._directory / CHECKPOINTS / f"{n:05d}.parquet" for n in self._found]
        try:
            read = [pd.read_parquet(path) for path in paths]
            rows = pd.concat(read)[list(_TYPES)] if read else self._empty_table()
        except (OSError, ValueError, KeyError) as error:
            raise RunError(
                f"A table of checkpoints in {self._directory} is damaged or gone ({error}). Remove {FORGETTING_NAME} "
                "to go on without the checkpoints so far."
            ) from error
        return {batch: rows[rows["after_batch"] == batch] for batch in self._found}

    @staticmethod
    def _empty_table() -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(columns=list(_TYPES)).astype(_TYPES)

    def _frame(self) -> pd.DataFrame:
        import pandas as pd

        frames = [self._frames[batch] for batch in sorted(self._frames)]
        return pd.concat(frames, ignore_index=True).astype(_TYPES)

    def _write(self) -> CheckpointHistory:
        frame = self._frame()
        retention = retention_of(self._session.measures, set(frame["metric"]))
        history = CheckpointHistory(
            eval_every=self._schedule.every,
            eval_sample=self._schedule.sample,
            text=self._schedule.text.info(),
            metrics=self._session.measures,
            retention=None if retention is None else retention.key,
            checkpoints=tuple(self._found[batch] for batch in sorted(self._found)),
            forgetting=forgetting(_sightings(frame, retention), step=self._schedule.every),
        )
        write_text(self._directory / FORGETTING_NAME, record_text(history, indent=2) + "\n")
        return history


def _frame(measured: Measurement, batch: int, session: EditSession) -> pd.DataFrame:
    """A row per observation."""
    known = ages(session.ledger.history())
    frame = measured.frame({})
    ids = [str(name) for name in frame["request_id"]]
    return frame.assign(
        after_batch=batch,
        num_edits=len(session.requests),
        batch=[known[name][0] for name in ids],
        age=[known[name][1] for name in ids],
    )[list(_TYPES)].astype(_TYPES)


def _sightings(frame: pd.DataFrame, retention: Measure | None) -> list[Sighting]:
    """The sightings of facts, by the metric that says whether a fact is retained."""
    if retention is None:
        return []
    rows = frame[(frame["evaluator"] == retention.evaluator) & (frame["metric"] == retention.key)]
    columns = (rows[name].tolist() for name in ("request_id", "age", "value"))
    return [(name, age, value >= HOLDS) for name, age, value in zip(*columns, strict=True)]
