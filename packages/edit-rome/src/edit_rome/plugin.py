"""Announces the editor ``rome``; imports no torch."""

from editcore import Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters and presets."""
    return [
        EditorSpec(
            "rome",
            "edit_rome.editor:RomeEditor",
            hparams="edit_rome.hparams:RomeHParams",
            presets="edit_rome.presets",
            summary="Write one fact at a time as a rank-one change of one layer.",
            capabilities=Capabilities(rewrites_subject=True, max_batch=1, uses_held=True),
        )
    ]
