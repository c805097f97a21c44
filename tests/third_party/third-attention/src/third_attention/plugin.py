"""Announces the editor ``attention``; imports no torch."""

from editcore import Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters."""
    return [
        EditorSpec(
            "attention",
            "third_attention.editor:AttentionEditor",
            hparams="third_attention.hparams:AttentionHParams",
            summary="Train what one attention writes, its bias included, by a change of low rank.",
            capabilities=Capabilities(gives=frozenset({"factored", "vector"}), needs_subject=False),
        )
    ]
