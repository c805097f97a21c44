"""The measurements of the unedited model, kept until the run is finished."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from editcore._util.files import json_text, replacing, write_text
from editcore.evaluation.measures import Measure
from editcore.evaluation.summaries import Measurement
from editcore.interfaces.errors import RunError
from editcore.interfaces.values import FactRecord, first_problem
from editcore.plugins.versions import code_versions
from editcore.runs.config import RunConfig
from editcore.runs.held_out import HeldOutText, held_out
from editcore.runs.samples import continuations, sampled

if TYPE_CHECKING:
    from editcore.runs.session import EditSession

__all__ = ["UneditedMeasurement", "measured_before"]

BEFORE_NAME = "before.json"


class _UneditedRecord(BaseModel):
    """``before.json``: everything but the observations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    said: tuple[str, ...]
    text: HeldOutText | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UneditedMeasurement:
    """The measurements of the unedited model. A resumed run reads them instead of measuring again.

    The observations are in ``before.parquet``. The rest is in ``before.json``, which is written last.
    """

    measured: Measurement
    said: tuple[str, ...]
    """What the model says to the prompts of the facts that are shown."""
    text: HeldOutText | None = None
    """The text for the perplexity, in a run with checkpoints."""

    @classmethod
    def read(cls, directory: Path, measures: tuple[Measure, ...]) -> UneditedMeasurement | None:
        """The measurements that a run directory has kept; ``None`` if it has none.

        Args:
            measures: the metrics of the run's evaluators.

        Raises:
            RunError: a file is damaged.
        """
        return cls._read(directory / BEFORE_NAME, measures)

    @classmethod
    def shared(
        cls,
        folder: Path,
        identity: Mapping[str, Any],
        measures: tuple[Measure, ...],
        measure: Callable[[], UneditedMeasurement],
    ) -> tuple[UneditedMeasurement, bool]:
        """Take the measurements that another run made of the same model on the same records. If there are none, measure
        now and keep the result for other runs.

        Args:
            identity: everything that changes the measurement, JSON-able.

        Returns:
            The measurements, and whether another run made them.
        """
        digest = hashlib.sha256(json_text(dict(sorted(identity.items()))).encode()).hexdigest()[:32]
        path = folder / f"before-{digest}.json"
        found = cls._read(path, measures)
        if found is not None:
            return found, True
        measured = measure()
        measured._write(path)
        return measured, False

    @classmethod
    def _read(cls, path: Path, measures: tuple[Measure, ...]) -> UneditedMeasurement | None:
        import pandas as pd

        table = path.with_suffix(".parquet")
        try:
            kept = _UneditedRecord.model_validate_json(path.read_bytes())
            measured = Measurement.from_frame(pd.read_parquet(table), measures)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise RunError(f"{path} is damaged ({first_problem(error)}). Remove it to measure anew.") from error
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
            why = " ".join(str(error).split())
            raise RunError(f"{path} or {table.name} is damaged ({why}). Remove them to measure anew.") from error
        return cls(measured=measured, said=kept.said, text=kept.text)

    def write(self, directory: Path) -> None:
        """Write both files, ``before.json`` last."""
        self._write(directory / BEFORE_NAME)

    def _write(self, path: Path) -> None:
        with replacing(path.with_suffix(".parquet")) as table:
            self.measured.frame({}).to_parquet(table, index=False)
        write_text(path, _UneditedRecord(said=self.said, text=self.text).model_dump_json() + "\n")

    def check(self, records: Sequence[FactRecord], directory: Path) -> None:
        """Check that the kept measurements are of ``records``.

        Raises:
            RunError: they are of other facts.
        """
        ids = {record.request.id for record in records}
        if not ids.issuperset(
            observation.request_id
            for observations in self.measured.observations.values()
            for observation in observations
        ):
            raise RunError(
                f"before.parquet in {directory} is damaged: it has measurements of facts that the run does not edit. "
                "Remove it and before.json to measure the unedited model again."
            )

    @staticmethod
    def remove(directory: Path) -> None:
        """Remove both files. The results have their content by then."""
        path = directory / BEFORE_NAME
        path.unlink(missing_ok=True)  # first: without it the table is ignored
        path.with_suffix(".parquet").unlink(missing_ok=True)


def measured_before(
    session: EditSession,
    records: Sequence[FactRecord],
    config: RunConfig,
    shared: Path | str | None,
) -> UneditedMeasurement:
    """Measure the unedited model, or take the measurements of another run.

    Args:
        shared: a folder in which runs keep such measurements for other runs.
    """

    def measure() -> UneditedMeasurement:
        return session.without_edits(lambda: _measure_unedited(session, records, config))

    if shared is None:
        return measure()
    model = session.model
    text = held_out(config.eval_text, config.seed, beside=session.context.statistics.corpus).identity()
    identity = {
        "model": model.base_fingerprint,
        "device": model.device.type,
        "prompt_form": asdict(model.prompt_form),
        "records": [record.model_dump(mode="json") for record in records],
        "text": None if config.eval_every is None else [text, config.eval_text_tokens],
        "seed": config.seed,
        "evaluators": {
            name: session.settings[name].model_dump(mode="json") if name in session.settings else None
            for name in config.evaluators
        },
        "code": code_versions(session.plugins, config.evaluators),
    }
    before, foreign = UneditedMeasurement.shared(Path(shared), identity, session.measures, measure)
    if foreign:
        session.remember_unedited(before.measured, records)
        session.tell_measured(before.measured, records, phase="before")
    return before


def _measure_unedited(session: EditSession, records: Sequence[FactRecord], config: RunConfig) -> UneditedMeasurement:
    text: HeldOutText | None = None
    if config.eval_every is not None:  # first: a text that is too short should cost no measurement
        statistics = session.context.statistics
        text = HeldOutText.measured(
            session.model,
            held_out(config.eval_text, config.seed, beside=statistics.corpus),
            tokens=config.eval_text_tokens,
            progress=session.context.progress,
        )
    measured = session.evaluate_unedited(records)
    said = continuations(measured, sampled(measured, records), session.generate_unedited)
    return UneditedMeasurement(measured=measured, said=tuple(said), text=text)
