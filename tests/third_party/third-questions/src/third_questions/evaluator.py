"""The evaluator."""

from __future__ import annotations

from collections.abc import Sequence

from editcore import EvaluationContext, FactRecord, LanguageModel, Observation
from editcore.evaluation import score_targets

from third_questions.hparams import ConsequencesHParams


class Consequences:
    """Asks what follows from each fact, and something else."""

    def __init__(self, hparams: ConsequencesHParams) -> None:
        self.hparams = hparams

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        """Records in order; ``consistent`` and ``unchanged`` need what was observed of the unedited model."""
        known = context.unedited or ()
        costs = {
            (observation.request_id, observation.prompt): observation.value
            for observation in known
            if observation.metric == "surprise"
        }
        texts = {
            (observation.request_id, observation.prompt): observation.text
            for observation in known
            if observation.text is not None
        }
        return [
            observation
            for record in records
            for observation in (*self._follows(model, record, costs), *self._elsewhere(model, record, texts, context))
        ]

    def _follows(
        self, model: LanguageModel, record: FactRecord, costs: dict[tuple[str, str], float]
    ) -> list[Observation]:
        probes = [probe for probe in record.of_kind("portability") if probe.answers]
        scores = score_targets(model, [probe.prompt for probe in probes], [probe.answers[0] for probe in probes])
        name, found, likelier = record.request.id, [], []
        for probe, score in zip(probes, scores, strict=True):
            asked = {"kind": probe.kind, "prompt": probe.prompt}
            found.append(Observation(request_id=name, metric="surprise", value=score.nll, **asked))
            if (name, probe.prompt) in costs:
                likelier.append(score.nll < costs[name, probe.prompt])
        if likelier:  # one observation: it tells whether the fact is in the model
            share = sum(likelier) / len(likelier)
            fact = {"kind": probes[0].kind, "prompt": record.request.text}
            found.append(Observation(request_id=name, metric="consistent", value=share, **fact))
        return found

    def _elsewhere(
        self,
        model: LanguageModel,
        record: FactRecord,
        texts: dict[tuple[str, str], str],
        context: EvaluationContext,
    ) -> list[Observation]:
        found = []
        for probe in record.of_kind("locality"):
            [text] = model.generate([probe.prompt], max_new_tokens=self.hparams.tokens)
            first = context.unedited is None
            same = 1.0 if first else float(texts.get((record.request.id, probe.prompt)) == text)
            found.append(
                Observation(
                    request_id=record.request.id, metric="unchanged", value=same, kind=probe.kind, prompt=probe.prompt,
                    text=text,
                )
            )  # fmt: skip
        return found


def smaller(consistent: float, unchanged: float) -> float:
    """Of two shares."""
    return min(consistent, unchanged)
