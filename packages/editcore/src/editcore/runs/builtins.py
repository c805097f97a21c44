"""The plugins of editcore itself. They are announced through the same hooks as all others."""

from __future__ import annotations

from editcore.interfaces.hookspecs import hookimpl
from editcore.interfaces.specs import (
    BackendSpec,
    ComponentSpec,
    DatasetSpec,
    EvaluatorSpec,
    ExecutorSpec,
    ExtensionSpec,
)


@hookimpl
def editcore_backends() -> list[BackendSpec]:
    """The backend that writes into the weights."""
    return [
        BackendSpec(
            "raw",
            target="editcore.runs.backends:RawBackend",
            summary="Adds the change to the weights themselves.",
            takes=frozenset({"factored", "dense", "vector", "attachment"}),
        )
    ]


@hookimpl
def editcore_evaluators() -> list[EvaluatorSpec]:
    """CounterFact's measurement, free generation, teacher forcing, chains, long answers, and damage."""
    from editcore.evaluation.capability import CAPABILITY
    from editcore.evaluation.counterfact import COUNTERFACT
    from editcore.evaluation.damage import DAMAGE
    from editcore.evaluation.generation import GENERATION
    from editcore.evaluation.long_answers import LONG_ANSWERS
    from editcore.evaluation.multihop import MULTIHOP
    from editcore.evaluation.teacher_forced import TEACHER_FORCED

    return [COUNTERFACT, GENERATION, TEACHER_FORCED, MULTIHOP, LONG_ANSWERS, CAPABILITY, DAMAGE]


@hookimpl
def editcore_datasets() -> list[DatasetSpec]:
    """The facts that come with editcore."""
    return [
        DatasetSpec(
            "worldfacts",
            target="editcore.datasets:load_worldfacts",
            summary="Counterfactual edits of facts that small models know, in the CounterFact schema.",
        ),
        DatasetSpec(
            "profiles",
            target="editcore.datasets:load_profiles",
            hparams="editcore.datasets:ProfilesHParams",
            argument="facts_per_subject",
            summary="Several facts about each of 40 subjects, invented ones and known ones.",
        ),
    ]


@hookimpl
def editcore_extensions() -> list[ExtensionSpec]:
    """The tracker that writes JSON lines."""
    return [
        ExtensionSpec(
            "jsonl",
            target="editcore.runs.trackers:JsonlTracker",
            hparams="editcore.runs.trackers:JsonlHParams",
            summary="Append what happens in a run to a file, a JSON line per event.",
        )
    ]


@hookimpl
def editcore_executors() -> list[ExecutorSpec]:
    """Processes of this machine."""
    return [
        ExecutorSpec(
            "local",
            target="editcore.execution.executors:LocalExecutor",
            hparams="editcore.execution.executors:LocalHParams",
            summary="Processes of this machine, one to a core or a GPU.",
        )
    ]


@hookimpl
def editcore_components() -> list[ComponentSpec]:
    """The formats of published facts."""
    formats = {
        "run": ("flat:RUN", "The records of a run, in editcore's own form."),
        "counterfact": ("rewrites:COUNTERFACT", "CounterFact and multi_counterfact."),
        "mquake": ("rewrites:MQUAKE", "MQuAKE's chains of edits with multi-hop questions."),
        "rippleedits": ("ripple:RIPPLEEDITS", "RippleEdits: edits with tests that have conditions."),
        "hallueditbench": ("question_sets:HALLUEDITBENCH", "HalluEditBench: a question with ten others about it."),
        "unke": ("question_sets:UNKE", "UnKE and EditEverything: questions with long answers."),
        "zsre-true": ("flat:ZSRE_TRUE", "zsRE without counterfactual answers."),
        "zsre": ("flat:ZSRE", "zsRE with counterfactual answers."),
        "wikibigedit": ("flat:WIKIBIGEDIT", "WikiBigEdit as it was published."),
        "knowedit": ("flat:KNOWEDIT", "KnowEdit: lists of portability and locality by kind."),
        "qaedit": ("flat:QAEDIT", "QAEdit: a question with several about other things."),
        "fastedit": ("flat:FASTEDIT", "FastEdit's facts with queries."),
        "easyedit": ("flat:EASYEDIT", "EasyEdit's flat records, also of CounterFact and WikiBigEdit."),
        "plain": ("flat:PLAIN", "A prompt with its target, and whatever else is known."),
    }
    return [
        ComponentSpec(name, f"editcore.datasets.{target}", kind="dataset.format", summary=summary)
        for name, (target, summary) in formats.items()
    ]
