"""Announces the editor ``finetune``; imports no torch."""

from editcore import Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters."""
    return [
        EditorSpec(
            "finetune",
            "third_finetune.editor:FinetuneEditor",
            hparams="third_finetune.hparams:FinetuneHParams",
            summary="Take a few gradient steps on one weight matrix.",
            capabilities=Capabilities(gives=frozenset({"dense"}), needs_subject=False),
        )
    ]
