"""A few facts of a run with the model's continuations of their prompts, for people to read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from editcore.evaluation.summaries import Measurement
from editcore.interfaces.metrics import REWRITE
from editcore.interfaces.values import FactRecord

__all__ = ["continuations", "sampled"]

_SAMPLES = 3
_SAMPLE_TOKENS = 8


def sampled(before: Measurement, records: Sequence[FactRecord]) -> Sequence[FactRecord]:
    """The facts that are shown. Those whose continuation an evaluator has observed come first."""
    continued = _continued(before, records)
    return sorted(records, key=lambda record: record.request.id not in continued)[:_SAMPLES]


def continuations(found: Measurement, records: Sequence[FactRecord], generate: Callable[..., list[str]]) -> list[str]:
    """The model's continuations of the prompts of ``records``, as an evaluator has observed them or else generated now.

    Args:
        found: observations of the model in its present state.
        generate: continues texts.
    """
    texts = _continued(found, records)
    missing = [record.request for record in records if record.request.id not in texts]
    written = generate([request.text for request in missing], max_new_tokens=_SAMPLE_TOKENS)
    texts |= dict(zip((request.id for request in missing), written, strict=True))
    return [texts[record.request.id] for record in records]


def _continued(found: Measurement, records: Sequence[FactRecord]) -> dict[str, str]:
    """By request id, the first continuation of the edited prompt that an evaluator has observed."""
    prompts = {record.request.id: record.request.text for record in records}
    texts: dict[str, str] = {}
    for observation in itertools.chain.from_iterable(found.observations.values()):
        fact, text = observation.request_id, observation.text
        if observation.kind == REWRITE and text is not None and observation.prompt == prompts.get(fact):
            texts.setdefault(fact, text)
    return texts
