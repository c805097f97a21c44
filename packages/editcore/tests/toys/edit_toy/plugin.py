"""Announces the toys; imports no torch."""

from editcore import (
    AttachmentSpec,
    BackendSpec,
    Capabilities,
    ComponentSpec,
    DatasetSpec,
    EditorSpec,
    EvaluatorSpec,
    ExecutorSpec,
    ExtensionSpec,
    MetricSpec,
    hookimpl,
)

HPARAMS = "edit_toy.hparams:{}HParams"


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """One that works, and others with other announcements; one that cannot be made."""
    toy, presets = HPARAMS.format("Toy"), "edit_toy.presets"
    return [
        EditorSpec("toy", "edit_toy.parts:ToyEditor", hparams=toy, presets=presets, summary="Works."),
        EditorSpec(
            "toy-pairs",
            "edit_toy.parts:ToyEditor",
            hparams=toy,
            summary="Takes two facts at a time.",
            capabilities=Capabilities(max_batch=2),
        ),
        EditorSpec(
            "toy-any",
            "edit_toy.parts:ToyEditor",
            hparams=toy,
            summary="Gives what it is told to, and needs no subject.",
            capabilities=Capabilities(gives=frozenset({"factored", "dense", "attachment"}), needs_subject=False),
        ),
        EditorSpec(
            "toy-needy",
            "edit_toy.parts:ToyEditor",
            hparams=toy,
            summary="Does not work alone.",
            capabilities=Capabilities(needs_plugins=("first",), needs_backend="half"),
        ),
        EditorSpec("toy-remembering", "edit_toy.parts:Remembering", hparams=toy, summary="Knows its past."),
        EditorSpec("dead-editor", "edit_toy.parts:Dead", hparams=toy, presets=presets, summary="Cannot be made."),
    ]


@hookimpl
def editcore_backends() -> list[BackendSpec]:
    """One with a hyperparameter, one that cannot be made."""
    return [
        BackendSpec("half", "edit_toy.parts:HalfBackend", hparams=HPARAMS.format("Half"), summary="Writes less."),
        BackendSpec("dead-backend", "edit_toy.parts:Dead", summary="Cannot be made."),
    ]


@hookimpl
def editcore_attachments() -> list[AttachmentSpec]:
    """One that changes logits, one that changes prompts, one that cannot be made."""
    return [
        AttachmentSpec("toy-logits", "edit_toy.beside:Logits", summary="Changes logits."),
        AttachmentSpec("toy-preface", "edit_toy.beside:Preface", summary="Puts a text before prompts."),
        AttachmentSpec("dead-kind", "edit_toy.beside:Broken", summary="Cannot be made."),
    ]


@hookimpl
def editcore_extensions() -> list[ExtensionSpec]:
    """Two that record what they are told, one that judges, two that fail."""
    return [
        ExtensionSpec("first", "edit_toy.parts:First", summary="Records."),
        ExtensionSpec("second", "edit_toy.parts:Second", summary="Records."),
        ExtensionSpec("gate", "edit_toy.parts:Gate", hparams=HPARAMS.format("Gate"), summary="Judges."),
        ExtensionSpec("dead-extension", "edit_toy.parts:Dead", summary="Cannot be made."),
        ExtensionSpec("miscounting", "edit_toy.parts:Miscounting", summary="Fails when asked for statistics."),
    ]


@hookimpl
def editcore_evaluators() -> list[EvaluatorSpec]:
    """One that looks at less, and one that says nothing of facts."""
    return [
        EvaluatorSpec(
            "lengths",
            "edit_toy.parts:Lengths",
            summary="How long the edited prompts are.",
            metrics=(MetricSpec(name="length", label="Length", unit="characters"),),
        ),
        EvaluatorSpec(
            "rewrites",
            "edit_toy.parts:Rewrites",
            summary="The edited prompts alone.",
            metrics=(
                MetricSpec(name="won", label="Won", retention=True, objective=True),
                MetricSpec(name="length", label="Length", unit="characters", better="lower"),
            ),
        ),
    ]


@hookimpl
def editcore_datasets() -> list[DatasetSpec]:
    """One with an argument, and some that go wrong."""
    facts = HPARAMS.format("Facts")
    return [
        DatasetSpec("toy-facts", "edit_toy.data:facts", hparams=facts, argument="file", summary="Those of a file."),
        DatasetSpec("toy-few", "edit_toy.data:facts", hparams=facts, argument="most", summary="So many of a file."),
        DatasetSpec("toy", "edit_toy.data:facts", hparams=facts, summary="Called like the editor."),
        DatasetSpec("toy-subclassed", "edit_toy.data:subclassed", summary="Returns a subclass."),
        DatasetSpec("toy-dicts", "edit_toy.data:dicts", summary="Returns dicts."),
        DatasetSpec("toy-nothing", "edit_toy.data:nothing", summary="Returns nothing."),
        DatasetSpec("toy-broken", "edit_toy.data:broken", summary="Fails."),
    ]


@hookimpl
def editcore_components() -> list[ComponentSpec]:
    """A study."""
    return [ComponentSpec("gates", "edit_toy.studies:gates.toml", kind="study", summary="Two gates.")]


@hookimpl
def editcore_executors() -> list[ExecutorSpec]:
    """One without workers."""
    return [ExecutorSpec("inline", "edit_toy.inline:InlineExecutor", summary="One item after the other, right here.")]
