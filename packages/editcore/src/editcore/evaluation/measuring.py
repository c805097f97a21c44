"""Measures one model with several evaluators, and checks their observations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from editcore.evaluation.measures import measures_of
from editcore.evaluation.summaries import Measurement
from editcore.interfaces.errors import PluginError
from editcore.interfaces.metrics import EvaluationContext, Observation
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.protocols import Evaluator
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord
from editcore.plugins.calls import boundary, resolve

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["measure"]


def measure(
    evaluators: Sequence[tuple[EvaluatorSpec, Evaluator]],
    model: LanguageModel,
    records: Sequence[FactRecord],
    *,
    unedited: Mapping[str, Sequence[Observation]] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    folder: Path | str | None = None,
) -> Measurement:
    """The observations of evaluators on the model in its present state.

    Args:
        unedited: by evaluator, its observations of the unedited model on these records; ``None`` if this is the
            unedited model.
        folder: where evaluators may keep what is costly to ask again (:attr:`editcore.EvaluationContext.folder`).

    Raises:
        PluginError: an evaluator failed, observed what it does not announce, or has a composite that cannot be loaded.
    """
    found: dict[str, tuple[Observation, ...]] = {}
    notes: dict[str, None] = {}
    for spec, evaluator in evaluators:
        for metric in spec.metrics:
            if metric.combine:
                resolve(metric.combine)  # an error is found now rather than after the model is measured
        known = None if unedited is None else tuple(unedited.get(spec.name, ()))
        with boundary(f"The evaluator '{spec.name}' failed: "):
            context = EvaluationContext(
                unedited=known,
                seed=seed,
                progress=progress,
                folder=None if folder is None else Path(folder),
                tell=lambda note: notes.update({note: None}),
            )
            observations = evaluator.evaluate(model, records, context)
            found[spec.name] = tuple(observations)
        _check(spec, found[spec.name], records)
    return Measurement(measures=measures_of(spec for spec, _ in evaluators), observations=found, notes=tuple(notes))


def _check(spec: EvaluatorSpec, observations: Sequence[Observation], records: Sequence[FactRecord]) -> None:
    announced = {metric.name for metric in spec.metrics if not metric.of}
    asked = {record.request.id for record in records}
    for observation in observations:
        if not isinstance(observation, Observation):
            raise PluginError(f"The evaluator '{spec.name}' returned {observation!r:.80} among its observations.")
        if observation.metric not in announced:
            raise PluginError(
                f"The evaluator '{spec.name}' observed '{observation.metric}', which it does not announce; it "
                f"announces: {', '.join(sorted(announced)) or 'none'}."
            )
        if observation.request_id not in asked:
            raise PluginError(
                f"The evaluator '{spec.name}' observed a fact that it was not asked: '{observation.request_id}'."
            )
        if not isinstance(observation.value, Real) or not math.isfinite(observation.value):
            raise PluginError(
                f"The evaluator '{spec.name}' observed {observation.value} as '{observation.metric}' after "
                f"{observation.prompt!r}; leave an observation out if it has no value."
            )
