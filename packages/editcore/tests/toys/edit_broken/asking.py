"""Evaluators: one that keeps the contract, and ones that each break a clause."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from editcore import EvaluationContext, FactRecord, LanguageModel, Observation
from editcore.evaluation import score_targets

from edit_broken.hparams import AskingHParams

Found = list[Observation]


class Honest:
    """What the new object costs after the prompt and its paraphrases; whether it has become cheaper."""

    def __init__(self, hparams: AskingHParams) -> None:
        self.hparams = hparams

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        costs = {
            (observation.request_id, observation.prompt): observation.value
            for observation in context.unedited or ()
            if observation.metric == "cost"
        }
        return [observation for record in records for observation in self.of_record(model, record, costs)]

    def of_record(
        self, model: LanguageModel, record: FactRecord, costs: dict[tuple[str, str], float]
    ) -> Iterator[Observation]:
        paraphrases = record.of_kind("paraphrase")[: self.hparams.paraphrases]
        prompts = [record.request.text, *(paraphrase.prompt for paraphrase in paraphrases)]
        scores = score_targets(model, prompts, [record.request.target_new] * len(prompts))
        for prompt, score in zip(prompts, scores, strict=True):
            asked = {"request_id": record.request.id, "prompt": prompt}
            yield Observation(metric="cost", value=score.nll, text=prompt, **asked)
            if prompt == record.request.text:
                yield Observation(metric="likely", value=math.exp(-score.nll), **asked)
            if (record.request.id, prompt) in costs:
                cheaper = float(score.nll < costs[record.request.id, prompt])
                yield Observation(metric="cheaper", value=cheaper, **asked)


def smaller(likely: float, cheaper: float) -> float:
    return min(likely, cheaper)


def harmonic(likely: float, cheaper: float) -> float:
    """Fails where both are 0."""
    return 2 * likely * cheaper / (likely + cheaper)


def difference(likely: float, cheaper: float) -> float:
    """Announced as a share, and may be negative."""
    return likely - cheaper


class Alone(Honest):
    """Compares with nothing, and announces nothing of the kind."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        return super().evaluate(model, records, dataclasses.replace(context, unedited=None))


class Unsaid(Honest):
    """Does not say that one of its metrics needs paraphrases."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        found = super().evaluate(model, records, context)
        edited = {record.request.text for record in records}
        wordings = [
            observation for observation in found if observation.metric == "cost" and observation.prompt not in edited
        ]
        return [*found, *(dataclasses.replace(wording, metric="wording") for wording in wordings)]


class Secret(Honest):
    """Observes what nobody knows of."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        found = super().evaluate(model, records, context)
        return [
            *found,
            *(
                dataclasses.replace(observation, metric="secret")
                for observation in found
                if observation.metric == "cost"
            ),
        ]


class Boastful(Honest):
    """Observes shares in percent."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        found = super().evaluate(model, records, context)
        return [
            dataclasses.replace(observation, value=100.0) if observation.metric == "likely" else observation
            for observation in found
        ]


class Endless(Honest):
    """Observes what is not finite."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        found = super().evaluate(model, records, context)
        return [
            dataclasses.replace(observation, value=math.inf) if observation.metric == "likely" else observation
            for observation in found
        ]


class Nosy(Honest):
    """Goes on observing what it was asked before."""

    def __init__(self, hparams: AskingHParams) -> None:
        super().__init__(hparams)
        self.seen: dict[str, FactRecord] = {}

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        self.seen |= {record.request.id: record for record in records}
        return super().evaluate(model, list(self.seen.values()), context)


class Moody(Honest):
    """Observes more each time that it compares."""

    compared = 0

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        self.compared += context.unedited is not None
        found = super().evaluate(model, records, context)
        return [
            dataclasses.replace(observation, value=observation.value + 1e-3 * self.compared)
            for observation in found[:1]
        ] + found[1:]


class Training(Honest):
    """Leaves the model in training mode."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        found = super().evaluate(model, records, context)
        model.hf.train()
        return found


class Turning(Honest):
    """Leaves the tokenizer padding on the other side."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        found = super().evaluate(model, records, context)
        model.tokenizer.padding_side = "left"
        return found


class Careless(Honest):
    """Takes its hook off only if nothing goes wrong."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        handle = model.block(0).register_forward_hook(lambda *_: None)
        found = super().evaluate(model, records, context)
        handle.remove()
        return found


class Crashing(Honest):
    """Cannot look at nothing."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        assert max(len(record.probes) for record in records) >= 0
        return super().evaluate(model, records, context)


class Demanding(Honest):
    """Takes it for granted that every record has a true object."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        wanted = [record for record in records if record.request.target_true.lower()]  # type: ignore[union-attr]
        return super().evaluate(model, wanted, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled(Observation):
    """One that no file would keep."""

    label: str = "mine"


class Enriched(Honest):
    """Observes with fields of its own."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        found = super().evaluate(model, records, context)
        return [
            Labelled(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)}) for made in found
        ]


class Keeping(Honest):
    """Knows the unedited model by heart, and does not look at what it is handed."""

    known: tuple[Observation, ...] = ()

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        found = super().evaluate(model, records, dataclasses.replace(context, unedited=self.known))
        if context.unedited is None:
            self.known = tuple(found)
        return found


class Wordy(Honest):
    """Says several times whether a fact is likely."""

    def evaluate(self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext) -> Found:
        found = super().evaluate(model, records, context)
        return [
            *found,
            *(
                dataclasses.replace(observation, prompt="again")
                for observation in found
                if observation.metric == "likely"
            ),
        ]
