"""The second level of judgement: a proposal is applied on trial and measured; then the model is restored to the bit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from editcore import Changes, EditRequest, HParamsError, WeightChange
from editcore.datasets import load_records
from editcore.evaluation import kl_divergences, next_token_log_probabilities, perplexity, score_targets
from editcore.models import rounded
from editcore.second_moments import open_corpus

from edit_trust.hparams import TrustHParams

if TYPE_CHECKING:
    from editcore import LanguageModel, Plugins
    from torch import Tensor

__all__ = ["Baseline", "Measurement", "Probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The measured effect of a batch. A figure is ``None`` where there was nothing to measure."""

    efficacy: float | None
    """Share of the new facts that the model says."""
    retention: float | None
    """Share of the sampled earlier facts that the model still says, among those that it said before."""
    kl: float | None
    """Mean KL(before ‖ after) of the next token after held-out prompts, in nats."""
    perplexity_ratio: float | None
    """Perplexity of the text after the batch divided by that before it."""
    norm_growth: float
    """Largest ‖W + Δ‖ / ‖W‖ − 1 of an edited weight; a weight that is all zero, as many biases are, is not counted."""
    unsaid: frozenset[str]
    """Ids of the new facts that the model does not say."""

    def figures(self) -> dict[str, float]:
        """The figures that were measured, by name."""
        named = {
            "efficacy": self.efficacy,
            "retention": self.retention,
            "kl": self.kl,
            "perplexity_ratio": self.perplexity_ratio,
            "norm_growth": self.norm_growth,
        }
        return {name: number for name, number in named.items() if number is not None}

    def failures(self, hparams: TrustHParams) -> list[str]:
        """The broken limits, in words. NaN breaks every limit."""
        limits = [
            ("efficacy", self.efficacy, ">=", hparams.trust_min_efficacy),
            ("retention", self.retention, ">=", hparams.trust_min_retention),
            ("kl", self.kl, "<=", hparams.trust_max_kl),
            ("perplexity_ratio", self.perplexity_ratio, "<=", hparams.trust_max_perplexity_ratio),
            ("norm_growth", self.norm_growth, "<=", hparams.trust_max_norm_growth),
        ]
        return [
            f"{name} {number:.3g} is not {sign} {limit:g}"
            for name, number, sign, limit in limits
            if number is not None and not (number >= limit if sign == ">=" else number <= limit)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Measurements before a batch, on prompts and facts that the batch is not about."""

    prompts: tuple[str, ...]
    log_probabilities: Tensor | None
    """``[texts, vocab]``, one row per prompt; ``None`` without prompts."""
    facts: tuple[EditRequest, ...]
    """The sampled earlier facts that the model says."""
    perplexity: float | None


class Probe:
    """Held-out prompts and a text, drawn once for a run, and the measurements on them.

    A baseline reads each prompt, each sampled earlier fact and the text once. A measurement reads the new facts too.
    With the default settings and a batch of ten facts, each reads about 700 tokens. Optimising the target of a single
    fact reads some thousands, forwards and backwards.

    Raises:
        UnknownNameError, DatasetError, StatisticsError: there are no such records, or no such text.
        HParamsError: the records have no neighbourhood prompts.
    """

    def __init__(self, hparams: TrustHParams, plugins: Plugins, *, seed: int) -> None:
        self.hparams = hparams
        self.seed = seed
        self.prompts = _held_out(hparams, plugins, seed)
        self.text = ""
        """The text that perplexity is measured on; empty until :meth:`read_text`."""
        self._corpus = open_corpus(hparams.trust_text, seed=seed)

    def read_text(self, model: LanguageModel) -> None:
        """Take the text's first tokens, as the model's tokenizer counts them.

        Raises:
            StatisticsError: the text cannot be read, or has too few tokens.
        """
        tokens = self.hparams.trust_text_tokens
        if tokens:
            rows = self._corpus.sequences(model, tokens, tokens)
            self.text = model.tokenizer.decode(rows[0], skip_special_tokens=True)

    def baseline(
        self, model: LanguageModel, new: Sequence[EditRequest], active: Sequence[EditRequest], *, batch: int
    ) -> Baseline:
        """Measure the model before a batch.

        Args:
            new: the facts of the batch. Prompts that contain one of their subjects are left out, and for a fact without
                a subject those that contain its prompt.
            active: earlier facts. Some are drawn of those that the batch does not edit anew.
            batch: index of the batch. Together with the seed it decides what is drawn.
        """
        spoken_of = {request.subject or request.text for request in new}
        prompts = tuple(prompt for prompt in self.prompts if not any(words in prompt for words in spoken_of))
        edited = {request.fact_key for request in new}
        candidates = [request for request in active if request.fact_key not in edited]
        # Drawn from (seed, batch) and nothing earlier, so that a resumed run draws the same.
        rng = random.Random(f"trust:{self.seed}:{batch}")
        drawn = rng.sample(candidates, min(self.hparams.trust_heldout_samples, len(candidates)))
        said = _says(model, drawn)
        return Baseline(
            prompts=prompts,
            log_probabilities=next_token_log_probabilities(model, prompts) if prompts else None,
            facts=tuple(request for request, is_said in zip(drawn, said, strict=True) if is_said),
            perplexity=perplexity(model, self.text) if self.text else None,
        )

    def measure(
        self,
        model: LanguageModel,
        before: Baseline,
        new: Sequence[EditRequest],
        changes: Changes,
        trial: AbstractContextManager[None],
    ) -> Measurement:
        """Measure the model with a proposal applied. The model is as before, to the bit, when this returns or raises.

        Args:
            changes: the proposal's changes, for the growth of weights.
            trial: applies the proposal inside its block.
        """
        growth = max(
            (_growth(model, *change) for change in changes.items() if model.weight(change[0]).any()), default=0.0
        )
        with trial:
            said = _says(model, [*new, *before.facts])
            kl = ratio = None
            if before.log_probabilities is not None:
                after = next_token_log_probabilities(model, before.prompts)
                kl = float(kl_divergences(before.log_probabilities, after).mean())
            if before.perplexity is not None:
                ratio = _perplexity(model, self.text) / before.perplexity
        written, held = said[: len(new)], said[len(new) :]
        return Measurement(
            efficacy=sum(written) / len(written) if written else None,
            retention=sum(held) / len(held) if held else None,
            kl=kl,
            perplexity_ratio=ratio,
            norm_growth=growth,
            unsaid=frozenset(request.id for request, is_said in zip(new, written, strict=True) if not is_said),
        )


def _held_out(hparams: TrustHParams, plugins: Plugins, seed: int) -> tuple[str, ...]:
    if not hparams.trust_heldout_samples:
        return ()
    records = load_records(hparams.trust_heldout, plugins=plugins)
    found = sorted({probe.prompt for record in records for probe in record.of_kind("neighborhood")})
    if not found:
        raise HParamsError(
            f"trust: the records of '{hparams.trust_heldout}' have no neighbourhood prompts. Set trust_heldout to "
            "others, such as worldfacts, or trust_heldout_samples to 0."
        )
    return tuple(random.Random(f"trust:{seed}").sample(found, min(hparams.trust_heldout_samples, len(found))))


def _says(model: LanguageModel, requests: Sequence[EditRequest]) -> list[bool]:
    """Whether the model says each fact, as ES counts it: the target is more probable than the true one, or, where no
    true one is given, the most probable of all."""
    asked = [(request, request.target_new) for request in requests]
    asked += [(request, request.target_true) for request in requests if request.target_true is not None]
    scores = score_targets(
        model,
        [request.text for request, _ in asked],
        [target for _, target in asked],
        joins=[request.join for request, _ in asked],
    )
    true = iter(scores[len(requests) :])
    return [
        score.correct if request.target_true is None else score.nll < next(true).nll
        for request, score in zip(requests, scores[: len(requests)], strict=True)
    ]


def _perplexity(model: LanguageModel, text: str) -> float:
    try:
        return perplexity(model, text)
    except OverflowError:  # with a change that disables the model
        return math.inf


@torch.no_grad()
def _growth(model: LanguageModel, address: str, change: WeightChange) -> float:
    """‖W + Δ‖ / ‖W‖ − 1, with W + Δ rounded as it would be written."""
    weight = model.weight(address)
    before = model.as_out_in(address, weight).double()
    after = rounded(before + change.to(weight.device).dense().double(), model.weights.type_of(address))
    return float(after.double().norm() / before.norm()) - 1
