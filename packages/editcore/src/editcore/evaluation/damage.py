"""Damage: what edits do to the rest of the model, measured without any fact.

* ``next_token_kl``: KL(p‖q) of the next-token distributions of the unedited model (p) and the edited one (q) after
  prompts that no edit is about. p is kept for its ``tokens`` likeliest tokens, and the rest of the vocabulary counts as
  one outcome, for which Σ p log(p/q) is a lower bound of the divergence over all tokens.
* ``fluency``: the n-gram entropy of long continuations, as CounterFact has it: the mean of (2/3) H₂ and (4/3) H₃, with
  Hₙ = −Σ f log₂ f over the frequencies f of the runs of n words. It falls when a model repeats itself.
* ``norm_growth``: ‖W‖/‖W₀‖ − 1 of every projection that edits are written into, by Frobenius norms.

Departures from CounterFact: continuations are greedy, without the prompt, and of 60 tokens, so that the values are
lower than the published ones; words are split at white space.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field

from editcore.datasets.subjects import mentions
from editcore.evaluation.capability import capability_items
from editcore.interfaces.metrics import EvaluationContext, MetricSpec, Observation
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord
from editcore.settings.hparams import HParams

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.models import LanguageModel

__all__ = ["DAMAGE", "DamageEvaluator", "DamageHParams", "ngram_entropy"]

_DRIFT, _ENTROPY = "next_token_kl", "next_token_entropy"
_FLUENCY = "fluency"
_GROWTH, _LARGEST, _NORM = "norm_growth", "largest_norm_growth", "projection_norm"
_COMPARED = "an unedited model to compare with"

DAMAGE = EvaluatorSpec(
    "damage",
    target="editcore.evaluation.damage:DamageEvaluator",
    hparams="editcore.evaluation.damage:DamageHParams",
    summary="Damage: drift of next-token distributions on other prompts, fluency, growth of the edited weights.",
    compares=True,
    metrics=(
        MetricSpec(
            name=_DRIFT,
            about="model",
            label="Drift (KL)",
            meaning="The mean KL divergence of the next-token distributions from those of the unedited model, after "
            "prompts that no edit is about: a lower bound from its likeliest tokens.",
            unit="nats",
            better="lower",
            average="prompts",
            needs=_COMPARED,
        ),
        MetricSpec(
            name=_FLUENCY,
            about="model",
            label="Fluency (n-gram entropy)",
            meaning="The weighted entropy of the word pairs and triples of long continuations: low if the text repeats "
            "itself. Compare it with the value before the edits.",
            unit="bits",
            average="prompts",
            keep=True,
            needs="a continuation of three words or more",
        ),
        MetricSpec(
            name=_LARGEST,
            about="model",
            label="Largest growth of a weight",
            meaning="The largest relative growth of the norm of a projection that edits may be written into.",
            better="lower",
            signed=True,
            average="prompts",
            needs=_COMPARED,
        ),
        MetricSpec(
            name=_GROWTH,
            about="model",
            label="Mean growth of the weights",
            meaning="The same, as a mean over the projections of all blocks, edited or not.",
            better="lower",
            signed=True,
            average="prompts",
            show="report",
            needs=_COMPARED,
        ),
        MetricSpec(
            name=_ENTROPY,
            about="model",
            label="Entropy of the next token",
            meaning="The mean entropy of the next-token distributions after the same prompts.",
            unit="nats",
            average="prompts",
            show="data",
        ),
        MetricSpec(
            name=_NORM,
            about="model",
            label="Norm of the projections",
            meaning="The mean Frobenius norm of the projections.",
            unit="",
            better="lower",
            average="prompts",
            show="data",
        ),
    ),
)


class DamageHParams(HParams):
    """How much is measured."""

    prompts: Annotated[int, Field(ge=1)] | None = None
    """Prompts for the drift, evenly spread over the facts among the capability tasks; none for all."""
    tokens: Annotated[int, Field(ge=1)] = 256
    """Likeliest tokens of the unedited model that the drift tells apart."""
    continuations: Annotated[int, Field(ge=0)] = 4
    """Facts with a long continuation, from the front."""
    continuation_tokens: Annotated[int, Field(ge=3)] = 60
    """Its length, in tokens."""


class _Value(NamedTuple):
    """An observation before it is entered under a fact."""

    metric: str
    value: float
    kind: str
    prompt: str
    text: str | None = None


class DamageEvaluator:
    """Measures the model beside its facts. Observations are entered under facts, because they must be, and mean nothing
    there."""

    def __init__(self, hparams: DamageHParams | None = None) -> None:
        self.hparams = hparams or DamageHParams()

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        """Drift prompt by prompt, the norms weight by weight, and fluency fact by fact. Nothing without records."""
        if not records:
            return []
        before = None if context.unedited is None else _by_metric(context.unedited)
        first = records[0].request.id
        values = [*self._drift(model, records, before), *_norms(model, before)]
        found = [_observation(first, value) for value in values]
        return found + [_observation(fact, value) for fact, value in self._fluency(model, records)]

    def _drift(
        self,
        model: LanguageModel,
        records: Sequence[FactRecord],
        before: Mapping[str, Mapping[str, Observation]] | None,
    ) -> Iterator[_Value]:
        from editcore.evaluation.divergence import next_token_log_probabilities  # imports torch

        prompts = self._prompts(records)
        if not prompts:
            return
        for prompt, logs in zip(prompts, next_token_log_probabilities(model, prompts), strict=True):
            kept = logs.topk(min(self.hparams.tokens, len(logs)))
            entropy = -float((logs.exp() * logs).nan_to_num(0.0).sum())
            text = json.dumps({"tokens": kept.indices.tolist(), "logs": kept.values.tolist()})
            yield _Value(_ENTROPY, entropy, _DRIFT, prompt, text)
            known = (before or {}).get(_ENTROPY, {}).get(prompt)
            if known is not None and known.text is not None:
                earlier = json.loads(known.text)
                yield _Value(_DRIFT, _coarse_kl(earlier["tokens"], earlier["logs"], logs), _DRIFT, prompt)

    def _prompts(self, records: Sequence[FactRecord]) -> list[str]:
        """Prompts that name no subject of an edit."""
        prompts = [item.prompt.split("\n")[-1] for item in capability_items() if item.kind == "facts"]
        subjects = {record.request.subject for record in records} - {""}
        prompts = [prompt for prompt in prompts if not any(mentions(prompt, subject) for subject in subjects)]
        count = self.hparams.prompts or len(prompts)
        return prompts[:: max(1, len(prompts) // count)][:count]

    def _fluency(self, model: LanguageModel, records: Sequence[FactRecord]) -> Iterator[tuple[str, _Value]]:
        asked = records[: self.hparams.continuations]
        openings = [
            next((probe.prompt for probe in record.of_kind("generation")), record.request.text) for record in asked
        ]
        texts = model.generate(openings, max_new_tokens=self.hparams.continuation_tokens)
        for record, prompt, text in zip(asked, openings, texts, strict=True):
            if (entropy := ngram_entropy(text)) is not None:
                yield record.request.id, _Value(_FLUENCY, entropy, "generation", prompt, text)


def _by_metric(observations: Sequence[Observation]) -> Mapping[str, Mapping[str, Observation]]:
    found: dict[str, dict[str, Observation]] = {}
    for observation in observations:
        found.setdefault(observation.metric, {})[observation.prompt] = observation
    return found


def _observation(fact: str, value: _Value) -> Observation:
    return Observation(
        request_id=fact, metric=value.metric, value=value.value, kind=value.kind, prompt=value.prompt, text=value.text
    )


def _coarse_kl(tokens: Sequence[int], logs: Sequence[float], after: Tensor) -> float:
    """KL(p‖q) in nats over the given tokens and one outcome for all others.

    Args:
        logs: log p of the tokens.
        after: log q of the whole vocabulary, ``[vocab]``.
    """
    q = after[list(tokens)].tolist()
    rest_p, rest_q = (max(0.0, 1 - math.fsum(map(math.exp, values))) for values in (logs, q))
    known = math.fsum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in zip(logs, q, strict=True))
    tiny = 1e-12  # below it, what is left of the mass is rounding
    rest = rest_p * math.log(rest_p / max(rest_q, tiny)) if rest_p > tiny else 0.0
    return max(0.0, known + rest)


def _norms(model: LanguageModel, before: Mapping[str, Mapping[str, Observation]] | None) -> Iterator[_Value]:
    growths = []
    for layer in range(model.layout.num_layers):
        name = model.layout.weight_name(layer)
        norm = float(model.weight(name).double().norm())
        yield _Value(_NORM, norm, "weight", name)
        known = (before or {}).get(_NORM, {}).get(name)
        if known is not None and known.value > 0:
            growths.append(norm / known.value - 1)
            yield _Value(_GROWTH, growths[-1], "weight", name)
    if growths:
        yield _Value(_LARGEST, max(growths), "weight", "all")


def ngram_entropy(text: str) -> float | None:
    """The mean of (2/3) H₂ and (4/3) H₃ in bits; ``None`` for fewer than three words.

    >>> round(ngram_entropy("a b a b a"), 4)
    0.9455
    """
    words = text.lower().split()
    if len(words) < 3:
        return None
    two, three = (_entropy(Counter(zip(*(words[start:] for start in range(size)), strict=False))) for size in (2, 3))
    return (2 / 3 * two + 4 / 3 * three) / 2


def _entropy(counts: Counter[tuple[str, ...]]) -> float:
    total = counts.total()
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values())
