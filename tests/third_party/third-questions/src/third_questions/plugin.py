"""Announces the data set ``questions`` and the evaluator ``consequences``; imports no torch."""

from editcore import DatasetSpec, EvaluatorSpec, MetricSpec, hookimpl


@hookimpl
def editcore_datasets() -> list[DatasetSpec]:
    """``--dataset questions:FILE``."""
    return [
        DatasetSpec(
            "questions",
            "third_questions.data:load",
            summary="Facts with what follows from them and what does not.",
            hparams="third_questions.hparams:QuestionsHParams",
            argument="file",
        )
    ]


@hookimpl
def editcore_evaluators() -> list[EvaluatorSpec]:
    """Three metrics, and what two of them make together."""
    return [
        EvaluatorSpec(
            "consequences",
            "third_questions.evaluator:Consequences",
            summary="Does what follows from a fact follow, and does the rest stay?",
            hparams="third_questions.hparams:ConsequencesHParams",
            compares=True,
            metrics=(
                MetricSpec(
                    name="consistent",
                    label="Consistent answers",
                    meaning="The share of questions that follow from the facts whose answer is likelier than before.",
                    retention=True,
                    needs="questions that follow from it",
                ),
                MetricSpec(
                    name="surprise",
                    label="Surprise",
                    meaning="What an answer that follows from a fact costs, per token.",
                    unit="nats",
                    better="lower",
                    needs="questions that follow from it",
                ),
                MetricSpec(
                    name="unchanged",
                    label="Unchanged answers",
                    meaning="The share of questions about other things with the answer of the unedited model.",
                    keep=True,
                    needs="questions about other things",
                ),
                MetricSpec(
                    name="balance",
                    label="Balance",
                    meaning="The smaller one of both shares.",
                    of=("consistent", "unchanged"),
                    combine="third_questions.evaluator:smaller",
                    objective=True,
                ),
            ),
        )
    ]
