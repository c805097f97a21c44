"""Announces the editor ``emmet``; imports no torch."""

from editcore import Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters and presets."""
    return [
        EditorSpec(
            "emmet",
            "edit_emmet.editor:EmmetEditor",
            hparams="edit_emmet.hparams:EmmetHParams",
            presets="edit_emmet.presets",
            summary="Write a batch of facts as equality constraints of one least-squares problem.",
            capabilities=Capabilities(rewrites_subject=True, uses_held=True, multi_layer=True),
            preferred=True,
        )
    ]
