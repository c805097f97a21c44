"""The results of a finished run, read from its directory for a report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from editcore.interfaces.errors import RunError
from editcore.interfaces.values import FactRecord, RejectedRequest
from editcore.ledger.ledger import Ledger
from editcore.runs.record import RunRecord, facts_of, read_requests
from editcore.runs.results import RESULTS_NAME, SUMMARY_NAME, RunSummary, read_observations
from editcore.runs.resume import resume_command

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RunResults"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResults:
    """A finished run."""

    directory: Path
    record: RunRecord
    begun: Collection[str]
    """Ids of the requests that the run was started with."""
    facts: Sequence[FactRecord]
    """The facts of the run, and after them those that sessions added."""
    ledger: Ledger
    summary: RunSummary
    scores: pd.DataFrame
    """``results.parquet``: a row per observation; see :meth:`editcore.evaluation.Measurement.frame`."""

    @classmethod
    def read(cls, directory: Path) -> RunResults:
        """Read a run directory.

        Raises:
            RunError: the run is not finished, or a file is missing or damaged.
        """
        record = RunRecord.read(directory)
        if record.dataset is None:
            raise RunError(
                f"There is no run in {directory} to report: it was made without a data set. "
                f"'editctl status {directory}' and 'editctl log {directory}' say what is in it."
            )
        if not (directory / SUMMARY_NAME).exists():
            raise RunError(
                f"The run in {directory} has no results yet ({SUMMARY_NAME} is not there); finish it with: "
                f"{resume_command(directory)}"
            )
        ledger = Ledger.read(directory)
        return cls(
            directory=directory,
            record=record,
            begun=frozenset(fact.request.id for fact in read_requests(directory)),
            facts=facts_of(directory, ledger),
            ledger=ledger,
            summary=RunSummary.read(directory),
            scores=read_observations(directory / RESULTS_NAME),
        )

    def phase(self, name: str) -> pd.DataFrame:
        """The scores ``before`` or ``after`` the edits."""
        return self.scores[self.scores["phase"] == name]

    @property
    def edits(self) -> tuple[int, int]:
        """The number of active facts from the run itself, and of those that sessions added."""
        active = self.ledger.facts()
        own = sum(fact.id in self.begun for fact in active)
        return own, len(active) - own

    @property
    def is_older_than_ledger(self) -> bool:
        """Whether edits were added, undone or redone since the facts were measured."""
        active = {fact.id for fact in self.ledger.facts()}
        return len(active) != self.summary.edits or not active.issuperset(self.phase("after")["request_id"])

    @property
    def refusals(self) -> list[tuple[int, RejectedRequest]]:
        """The batch index and the rejection of every fact that an extension refused, alone or with its whole batch."""
        return [(entry.batch, rejected) for entry in self.ledger.batches for rejected in entry.all_rejected]
