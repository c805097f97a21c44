"""Measurements of a session's model, compared with observations of the unedited model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from editcore.evaluation.measuring import measure
from editcore.evaluation.summaries import Measurement
from editcore.interfaces.metrics import Observation
from editcore.interfaces.protocols import EditContext, Evaluator
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord
from editcore.models.edited import EditedModel

__all__ = ["Observer"]

Evaluators = Sequence[tuple[EvaluatorSpec, Evaluator]]


class Observer:
    """Measures a model by evaluators, and remembers their observations of the unedited model."""

    def __init__(
        self, evaluators: Evaluators, edited: EditedModel, context: EditContext, *, folder: Path | None = None
    ) -> None:
        self.evaluators = evaluators
        self.notes: dict[str, None] = {}
        """Sentences of the evaluators for the user, in their order."""
        self._edited, self._context, self._folder = edited, context, folder
        self._unedited: dict[str, dict[str, Sequence[Observation]]] = {spec.name: {} for spec, _ in evaluators}
        """By evaluator and request id."""

    def measure(self, records: Sequence[FactRecord]) -> Measurement:
        """Measure the model as it is now.

        Evaluators that compare are handed their observations of the unedited model. If these are not known yet, they
        are made first, with the edits taken out meanwhile.
        """
        for spec, evaluator in self.evaluators:
            known = self._unedited[spec.name]
            missing = [record for record in records if record.request.id not in known]
            if spec.compares and missing:
                with self._edited.unedited():
                    self.remember(self._observed([(spec, evaluator)], missing, unedited=None), missing)
        unedited = {
            # What is about the model as a whole is entered under any fact, also under one that is not measured now.
            spec.name: list(itertools.chain.from_iterable(self._unedited[spec.name].values()))
            if spec.about_model
            else [
                observation
                for record in records
                for observation in self._unedited[spec.name].get(record.request.id, ())
            ]
            for spec, _ in self.evaluators
        }
        return self._observed(self.evaluators, records, unedited=unedited)

    def measure_unedited(self, records: Sequence[FactRecord]) -> Measurement:
        """Measure the model, which has no edits at this time, and remember the observations."""
        found = self._observed(self.evaluators, records, unedited=None)
        self.remember(found, records)
        return found

    def remember(self, found: Measurement, records: Sequence[FactRecord]) -> None:
        """Remember observations of the unedited model on ``records``, made here or in an earlier process."""
        for evaluator, observations in found.observations.items():
            of_record: dict[str, list[Observation]] = {record.request.id: [] for record in records}
            for observation in observations:
                of_record[observation.request_id].append(observation)
            self._unedited[evaluator] |= of_record

    def _observed(
        self,
        evaluators: Evaluators,
        records: Sequence[FactRecord],
        *,
        unedited: Mapping[str, Sequence[Observation]] | None,
    ) -> Measurement:
        seed, progress = self._context.seed, self._context.progress
        found = measure(
            evaluators, self._edited.model, records, unedited=unedited, seed=seed, progress=progress,
            folder=self._folder,
        )  # fmt: skip
        self.notes |= dict.fromkeys(found.notes)
        return found
