"""Announces the editor ``alphaedit``; imports no torch."""

from editcore import Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters and presets."""
    return [
        EditorSpec(
            "alphaedit",
            "edit_alphaedit.editor:AlphaEditEditor",
            hparams="edit_alphaedit.hparams:AlphaEditHParams",
            presets="edit_alphaedit.presets",
            summary="Write batches of facts inside the null space of ordinary text, and off the keys of earlier facts.",
            capabilities=Capabilities(rewrites_subject=True, uses_held=True, multi_layer=True),
        )
    ]
